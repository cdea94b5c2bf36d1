"""Files whose content is of another type, or beyond every size: a sentence that names file and key, and no traceback.

What each reader is for is tested beside it; here are the kinds of damage, at the commands.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command, contents, write

from mup_megatron.deepspeed.entry import configuration
from mup_megatron.errors import InputError

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 64, "n_positions": 32, "n_layer": 2}
LARGE = {**GPT2, "n_embd": 128, "n_head": 8}
TUNED = {"base": {**GPT2, "n_embd": 32, "n_head": 2}, "hyperparameters": {"lr": 0.004}}
DS = {
    "train_batch_size": 16,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10}},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "mup": {"recipe": "gpt2.yaml"},
}


@pytest.fixture
def gpt2(here: Path) -> Path:
    (here / "large.json").write_text(json.dumps(LARGE))
    (here / "ds.json").write_text(json.dumps(DS))
    write(here / "gpt2.yaml", TUNED)
    return here


def refused(run: Command, here: Path, *words: str) -> str:
    before = contents(here)
    code, out, err = run(*words)
    assert (code, out) == (2, ""), err
    assert contents(here) == before
    lines = err.removeprefix("mup-megatron: ").splitlines()
    assert max(map(len, lines)) <= 300, "each thing in 300 characters"
    assert "Traceback" not in err
    return lines[0]


NUMBERS: list[Any] = [True, "fast", [], {"a": 1}, float("nan"), float("inf")]
OBJECTS: list[Any] = [1, True, "llama", [1], float("inf"), [["lr", 1]]]
PARTS: dict[str, tuple[tuple[str, ...], list[Any]]] = {
    "optimizer": (("optimizer",), OBJECTS),
    "optimizer.type": (("optimizer", "type"), [1, [], {"a": False}, ""]),
    "optimizer.params": (("optimizer", "params"), OBJECTS),
    "optimizer.params.lr": (("optimizer", "params", "lr"), NUMBERS),
    "optimizer.params.betas": (("optimizer", "params", "betas"), [True, "fast", ["a", 1], {"a": 1}]),
    "optimizer.params.weight_decay": (("optimizer", "params", "weight_decay"), NUMBERS),
    "scheduler": (("scheduler",), OBJECTS),
    "scheduler.type": (("scheduler", "type"), [1, [], {"a": False}, ""]),
    "scheduler.params": (("scheduler", "params"), OBJECTS),
    "scheduler.params.total_num_steps": (("scheduler", "params", "total_num_steps"), [{"a": 1}, [[1]], float("nan")]),
    "gradient_clipping": (("gradient_clipping",), NUMBERS),
    "zero_optimization": (("zero_optimization",), [*OBJECTS[:-2], 1.5]),
    "zero_optimization.offload_optimizer": (("zero_optimization", "offload_optimizer"), OBJECTS),
    "zero_optimization.offload_optimizer.ratio": (("zero_optimization", "offload_optimizer", "ratio"), ["x", []]),
    "tensor_parallel": (("tensor_parallel",), OBJECTS),
    "tensor_parallel.autotp_size": (("tensor_parallel", "autotp_size"), ["x", 1.5, [1]]),
    "hybrid_engine.enabled": (("hybrid_engine", "enabled"), [1, "yes", {}]),
}


def changed(content: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The content with a value at keys within each other."""
    first, *rest = keys
    inner = changed(content.get(first, {}), tuple(rest), value) if rest else value
    return {**content, first: inner}


@pytest.mark.parametrize("part", PARTS)
def test_a_deepspeed_configuration_of_other_types(part: str) -> None:
    keys, values = PARTS[part]
    for value in values:
        with pytest.raises(InputError) as caught:
            configuration(changed(DS, keys, value), source="ds.json")
        said = str(caught.value)
        where = part.rpartition(".")[0] if keys[-1] in ("lr", "betas", "weight_decay", "total_num_steps") else part
        assert said.startswith(f"ds.json: {where}: "), (value, said)
        assert keys[-1] in said
        assert len(said) <= 300


def test_right_ones_are_read() -> None:
    for content in (
        {},
        DS,
        {"optimizer": None, "zero_optimization": False},
        {"gradient_clipping": "auto", "other": [1]},
    ):
        assert configuration(content, source="ds.json").made_optimizer.type in (None, "AdamW")


@pytest.mark.parametrize("command", ["ds-config --check", "check --output .. --deepspeed"])
def test_both_commands_read_it_so(run: Command, gpt2: Path, command: str) -> None:
    (gpt2 / "ds.json").write_text(json.dumps({**DS, "scheduler": {"type": {"a": False}}}))
    name, *options = command.split()
    said = refused(run, gpt2, name, "large.json", "--recipe", "gpt2.yaml", *options, "ds.json")
    assert said == "ds.json: scheduler.type: should be a valid string, found {'a': False}. Correct this value."


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"type": "StepLR", "params": {"step_size": "x"}}, "scheduler.params: StepLR refuses them ("),
        ({"type": "CosineAnnealingLR", "params": {"T_max": 0}}, "scheduler.params: CosineAnnealingLR refuses them ("),
        ({"type": "OneCycleLR", "params": {"total_steps": -3}}, "scheduler.params: OneCycleLR refuses them ("),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": "ten"}}, "scheduler.params: WarmupLR refuses them ("),
        ({"type": "x" * 900}, 'scheduler.type "xxxxxxxxxxxxxxxxxxxxxxxxxxxxx…" is not known'),
    ],
)
def test_values_that_a_scheduler_refuses(run: Command, gpt2: Path, scheduler: dict[str, Any], said: str) -> None:
    (gpt2 / "ds.json").write_text(json.dumps({**DS, "scheduler": scheduler}))
    code, out, _ = run("ds-config", "large.json", "--recipe", "gpt2.yaml", "--check", "ds.json")
    assert code == 1
    assert said in out
    assert max(map(len, out.splitlines())) <= 310  # with the file's name before it


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a width beyond all": (
        {"n_embd": 2**31},
        "large.json.n_embd: should be a whole number from 1 to 1000000000, found",
    ),
    "as many layers": ({"n_layer": 10**9}, "large.json.n_layer: should be a whole number from 1 to 1000, found"),
    "as many labels": (
        {"num_labels": 10**9},
        "large.json.num_labels: should be a whole number from 0 to 100000, found",
    ),
    "no heads": ({"n_head": 0}, "large.json.n_head: should be a whole number from 1 to 1000000000, found 0."),
    "a negative width": ({"n_embd": -64}, "large.json.n_embd: should be a whole number"),
    "a width that is true": ({"n_embd": True}, "large.json.n_embd: should be a whole number"),
    "a word for a width": ({"n_embd": "auto"}, "large.json.n_embd: should be a whole number"),
    "a size of a nested model": ({"text_config": {"hidden_size": []}}, "large.json.text_config.hidden_size: should"),
    "a matrix beyond all": ({"n_embd": 10**9}, "GPT2LMHeadModel cannot be built from the conf"),
    "NaN for an object": ({"quantization_config": float("nan")}, "large.json.quantization_config: must be a finite"),
    "a word for an object": ({"quantization_config": "x"}, "large.json: not a possible gpt2 configuration: "),
    "NaN": ({"initializer_range": float("nan")}, "large.json.initializer_range: must be a finite number, found nan."),
    "labels that are no names": ({"id2label": [1]}, "large.json: not a possible gpt2 configuration: "),
    "an activation that is none": ({"activation_function": {}}, "large.json: not a possible gpt2 configuration: "),
    "no class": ({"architectures": [1]}, "large.json: architectures is [1], not a list of names."),
    "a type that is none": ({"model_type": {}}, "large.json: model_type is {}, not a name."),
    "a type that nobody has": (
        {"model_type": "x" * 900},
        "large.json.model_type: 'xxxxxxxxxxxx...xxxxxxxxxxxxx' is no",
    ),
    "a nested value that differs": (
        {"summary_type": {"a": ["b" * 900]}},
        "large.json: not a possible gpt2 configuration: ",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hugging_face_configurations(run: Command, gpt2: Path, case: str) -> None:
    changes, said = CONFIGS[case]
    (gpt2 / "large.json").write_text(json.dumps({**LARGE, **changes}))
    answer = refused(run, gpt2, "explain", "large.json", "--recipe", "gpt2.yaml")
    assert answer.removeprefix("gpt2.yaml for large.json: ").startswith(said), answer
    # The base of a recipe is read by the same rules.
    if not said.startswith("large.json:"):
        return
    answer = refused(run, gpt2, "recipe", "--base", "large.json", "--lr", "0.1", "-o", "new.yaml")
    assert answer.startswith(said)


def test_json_is_read_as_json(run: Command, gpt2: Path) -> None:
    """As YAML its Infinity would be a word, and a pair of surrogates two half characters."""
    text = json.dumps({**LARGE, "my_note": "😀", "my_limits": [0.0, float("inf")]}, indent="\t")
    (gpt2 / "large.json").write_text(text)
    assert run("explain", "large.json", "--recipe", "gpt2.yaml", "--brief").code == 0


def test_a_check_does_not_begin_what_it_cannot_train(run: Command, here: Path) -> None:
    widths = ("--widths", "65536,131072,262144")
    answer = refused(run, here, "check", "target.yaml", "--recipe", "r.yaml", "--output", "..", *widths)
    assert answer.startswith("linear_qkv.weight would have")


def test_nor_one_of_hugging_faces(run: Command, gpt2: Path) -> None:
    (gpt2 / "large.json").write_text(json.dumps({**LARGE, "n_inner": 10**7}))
    write(gpt2 / "gpt2.yaml", {**TUNED, "base": {**TUNED["base"], "n_inner": 10**7}})
    answer = refused(run, gpt2, "check", "large.json", "--recipe", "gpt2.yaml", "--output", "..")
    assert "cannot be built smaller than at widths 32, 64, 128, which take a core about" in answer
