"""`--mup-write-model-file`: Megatron reads its own line, and says what a reader of its flags says."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lines import ACCEPTED, REFUSED, words
from support.lm_runs import SCRIPT, Finished, run_script

from mup_megatron import launch
from mup_megatron.architectures.keys.unread import as_read
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import load_model_file
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.line import read_line
from mup_megatron.megatron.pretrain import model_writer

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

FEW = ("llama", "sizes as Megatron fills them in", "tensor and pipeline parallel", "saved asynchronously")


def write(folder: Path, flags: Sequence[str], environment: dict[str, str] | None = None) -> tuple[Finished, Path]:
    path = folder / "model.yaml"
    given = [*flags, "--mup-write-model-file", str(path)]
    return run_script(SCRIPT, given, folder=folder / "rank", launcher=True, environment=environment), path


def written(folder: Path, flags: Sequence[str]) -> ModelFile:
    finished, path = write(folder, flags)
    finished.require_success()
    return load_model_file(path)


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ACCEPTED]
)
def test_megatron_reads_what_a_reader_of_flags_reads(tmp_path: Path, name: str) -> None:
    if name == "FSDP":  # Megatron wants it with an untied readout
        flags = words(f"{ACCEPTED[name].flags} --untie-embeddings-and-output-weights")
    else:
        flags = words(ACCEPTED[name].flags)
    assert written(tmp_path, flags) == read_line(["pretrain_gpt.py", *flags]).model()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, refused in REFUSED.items() if refused.script == "pretrain_gpt.py"])
def test_what_a_reader_refuses_is_refused_or_read_by_megatron(tmp_path: Path, name: str) -> None:
    finished, path = write(tmp_path, words(REFUSED[name].flags))
    assert "Traceback" not in finished.err[0]
    assert path.exists() == (finished.codes == [0])
    assert finished.codes == [2]


def test_a_checkpoints_arguments_are_megatrons_to_read(tmp_path: Path) -> None:
    """Where there is no checkpoint yet, the line's own arguments hold."""
    flags = [*words("--swiglu"), "--use-checkpoint-args", "--load", str(tmp_path / "none")]
    model = written(tmp_path, flags)
    assert model.swiglu
    assert model == read_line(["pretrain_gpt.py", *flags]).model()


def test_an_error_of_megatrons_is_one_sentence(tmp_path: Path) -> None:
    for number, (flags, said) in enumerate(
        (
            ("--use-checkpoint-args", "requires --load"),
            ("--no-such-flag", "refuses it: unrecognized arguments: --no-such-flag"),
            ("--fp16", "refuses it: assert not args.bf16"),
            ("--lr-warmup-iters 5", "refuses it: can only specify one of lr-warmup-fraction and lr-warmup-iters"),
        )
    ):
        finished, path = write(tmp_path / str(number), words(flags))
        assert finished.codes == [2]
        assert said in finished.err[0].splitlines()[-1]
        assert "Traceback" not in finished.err[0]
        assert not path.exists()


def test_files_that_megatron_cannot_read_are_named(tmp_path: Path) -> None:
    """Megatron itself fails at a number in place of keys, and ends the process at a checkpoint it does not read."""
    (tmp_path / "one.yaml").write_text("1\n")
    saved = tmp_path / "checkpoint" / "iter_0000001" / "mp_rank_00"
    saved.mkdir(parents=True)
    (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("1")
    torch.save({"args": argparse.Namespace(num_layers=2), "more": Path}, saved / "model_optim_rng.pt")
    for number, (flags, said) in enumerate(
        (
            (f"--yaml-cfg {tmp_path}/one.yaml", f"{tmp_path}/one.yaml: no keys with values."),
            (
                f"--use-checkpoint-args --load {tmp_path}/checkpoint --ckpt-format torch",
                "a checkpoint holds more than tensors and plain values",
            ),
        )
    ):
        finished, path = write(tmp_path / str(number), words(flags))
        assert finished.codes == [2]
        assert said in finished.err[0].splitlines()[-1]
        assert not path.exists()


def test_a_tokenizer_without_files_says_what_to_give(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    line = words("", tokenizer=f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path}/none")
    finished, path = write(tmp_path, line, offline)
    assert finished.codes == [2]
    assert "Give its files (--tokenizer-model, " in finished.err[0].splitlines()[-1]
    assert not path.exists()


def test_the_tokenizer_is_megatrons_own(tmp_path: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models

    whole = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i + 1 for i in range(700)}}, unk_token="<unk>"))
    whole.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": "</s>",
        "pad_token": "<p>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert len(transformers.AutoTokenizer.from_pretrained(str(tmp_path))) == 703
    tokenizer = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path}"
    flags = words("", tokenizer=tokenizer)
    model = written(tmp_path, flags)
    assert model.vocab_size == 703
    assert model == read_line(["pretrain_gpt.py", *flags]).model()


def test_one_rank_of_many_writes(tmp_path: Path) -> None:
    finished, path = write(tmp_path, words(""), {"RANK": "1", "WORLD_SIZE": "2"})
    assert finished.codes == [0]
    assert not path.exists()


def test_names_of_a_yaml_file_are_understood() -> None:
    from mup_megatron.megatron.pretrain import model_writer

    values: dict[str, Any] = {
        "language_model": None,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "activation_func": "swiglu",
        "num_moe_experts": None,
        "moe_ffn_hidden_size": 256,
    }
    read = as_read(ModelFile.unread, {**ModelFile.defaults(), **model_writer._of_yaml(values)}, ModelFile.defaults())
    assert (read["swiglu"], read["squared_relu"], read["num_experts"], read["moe_ffn_hidden_size"]) == (
        True,
        False,
        None,
        None,
    )
    assert (read["group_query_attention"], read["num_query_groups"]) == (True, 2)


# ---- before Megatron is imported -----------------------------------------------------------------------------------


def complaint(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        launch.main(given)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, path = tmp_path / "x.py", tmp_path / "m.yaml"
    script.write_text("")
    flag = "--mup-write-model-file"
    assert f"{flag}: no path" in complaint([str(script), flag], capsys)
    assert f"{flag}: no path" in complaint([str(script), flag, "--lr", "1"], capsys)
    assert f"{flag} beside --mup-recipe" in complaint([str(script), flag, str(path), "--mup-recipe", "r"], capsys)
    path.write_text("")
    assert f"{flag} {path}: exists already" in complaint([str(script), flag, str(path)], capsys)


@pytest.mark.parametrize("flag", ["--mup-write-model-file=m.yaml", "--mup-recipe=r.yaml"])
def test_another_program_is_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    for name, said in (
        ("pretrain_vlm.py", "pretrain_vlm.py: multimodal models"),
        ("pretrain_mamba.py", "pretrain_mamba.py builds a hybrid model, and --hybrid-layer-pattern is missing"),
    ):
        script = tmp_path / name
        script.write_text("raise AssertionError('started')")
        assert said in complaint([str(script), flag], capsys)


def test_a_script_that_never_reads_a_line(tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text("import torch\nassert torch.cuda.is_available()\n")  # the CPU's stand-in
    command = [sys.executable, "-m", "mup_megatron.launch", str(script), "--mup-write-model-file", str(tmp_path / "m")]
    root = str(Path(__file__).parents[3])
    ended = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, env=dict(os.environ))
    assert ended.returncode == 2
    assert "the script has ended and never read Megatron's arguments" in ended.stderr


def test_advice_to_run_a_file_is_not_passed_on() -> None:
    advice = "Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` will likely succeed"
    with pytest.raises(InputError) as raised, model_writer.in_one_sentence("cannot read it"):
        raise RuntimeError(advice)
    assert "weights_only" not in str(raised.value)
    assert "more than tensors and plain values" in str(raised.value)
