"""Programs of Megatron-LM are known by their names, however a line starts them."""

from pathlib import Path

import pytest

from mup_megatron.architectures.registry import architectures
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.programs import (
    ProgramKind,
    builds,
    kind_of,
    require_flags,
    require_supported,
    script_of,
    scripts_in,
)


@pytest.mark.parametrize(
    ("words", "script", "rest"),
    [
        ("torchrun --nproc-per-node 8 pretrain_gpt.py --swiglu", "pretrain_gpt.py", ["--swiglu"]),
        ("torchrun -m mup_megatron.launch a/pretrain_gpt.py --x", "a/pretrain_gpt.py", ["--x"]),
        ("deepspeed --module mup_megatron.launch t.py --x", "t.py", ["--x"]),
        ("python -m torch.distributed.run pretrain_t5.py --x", "pretrain_t5.py", ["--x"]),
        ("python -m examples.bert.pretrain_bert --x", "examples/bert/pretrain_bert.py", ["--x"]),
    ],
)
def test_the_script_of_a_line(words: str, script: str, rest: list[str]) -> None:
    found = script_of(words.split())
    assert found is not None
    assert (found[0], words.split()[found[1] :]) == (script, rest)


def test_flags_alone_name_no_script() -> None:
    assert script_of(["--num-layers", "2"]) is None


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("megatron/elastification/pretrain_hybrid_flex.py", "layers have several sizes"),
        ("pretrain_vlm.py", "multimodal"),
        ("$MEGATRON/examples/vlm/pretrain_vlm.py", "multimodal"),
        ("examples/multimodal/train.py", "multimodal"),
        ("examples/mimo/train.py", "multimodal"),
        ("pretrain_vision_dino.py", "vision"),
        ("pretrain_ict.py", "retrieval"),
        ("pretrain_retro.py", "retrieval"),
        ("./tasks/msdp/main.py", "single tasks"),
        ("train_rl.py", "reinforcement learning"),
        ("examples/post_training/modelopt/finetune.py", "ModelOpt"),
        ("tools/preprocess_data.py", "it trains no model"),
        ("tools/merge_mp_partitions.py", "it trains no model"),
        ("analyze_data.py", "it trains no model"),
        ("tools/create_doc_index.py", "it trains no model"),
        ("pretrain_prefix_lm.py", "prefix language models"),
        ("examples/inference/quantization/text_generation_ptq.py", "ModelOpt"),
        ("PRETRAIN_VLM.PY", "multimodal"),
    ],
)
def test_other_programs_are_refused_by_name(script: str, what: str) -> None:
    with pytest.raises(InputError) as raised:
        require_supported(script, source="run.sh")
    assert str(raised.value).startswith(f"run.sh: {'/'.join(script.split('/')[-2:])}") or script.split("/")[
        -1
    ].lower() in str(raised.value)
    assert what in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("script", ["pretrain_gpt.py", "a/b/pretrain_gpt.py", "tools/run_text_generation_server.py"])
def test_those_that_build_a_gpt_pass(script: str) -> None:
    require_supported(script, source="")
    assert kind_of(script) is ProgramKind.SUPPORTED


@pytest.mark.parametrize("script", ["pretrain_hybrid.py", "megatron/pretrain_mamba.py"])
def test_those_that_build_a_hybrid_model_want_its_pattern(script: str) -> None:
    require_supported(script, source="")
    assert builds(script) is architectures()["hybrid"]
    name = script.rpartition("/")[2]
    for flag in ("--hybrid-layer-pattern", "--hybrid-override-pattern=*-", "--use-checkpoint-args"):
        require_flags(script, [flag, "*-"], source="line")
    with pytest.raises(InputError, match=f"line: {name} builds a hybrid model, and --hybrid-layer-pattern is missing"):
        require_flags(script, ["--num-layers", "2"], source="line")


def test_a_gpts_program_is_given_no_pattern() -> None:
    require_flags("pretrain_gpt.py", ["--num-layers", "2"], source="line")
    require_flags("mine/train.py", ["--hybrid-layer-pattern", "*-"], source="line")
    with pytest.raises(
        InputError, match=r"--is-hybrid-model: a flag of a hybrid model, and pretrain_gpt\.py builds a GPT"
    ):
        require_flags("pretrain_gpt.py", ["--is-hybrid-model"], source="line")


@pytest.mark.parametrize("script", ["train.py", "my/finetune.py", "pretrain_gpt2.py"])
def test_other_names_are_somebodys_own(script: str) -> None:
    require_supported(script, source="")
    assert kind_of(script) is ProgramKind.OWN


def test_the_scripts_that_a_launch_script_names(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text("# was pretrain_t5.py\nS=$DIR/pretrain_bert.py # not pretrain_gpt.py\ntorchrun ${S} x.pyc\n")
    assert scripts_in(path) == ["$DIR/pretrain_bert.py"]
