"""The five commands of docs/verdict.md, as they stand there, in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest
from support.commands import Command

from mup_megatron.architectures import load_model_file
from mup_megatron.recipe import load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "verdict.md").read_text(encoding="utf-8")


def _block(title: str) -> str:
    found = re.search(rf'^```bash title="{re.escape(title)}"\n(.*?)^```', PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


COMMANDS = [shlex.split(line)[1:] for line in _block("five commands").splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.sh").write_text(_block("run.sh"), encoding="utf-8")
    return tmp_path


def _done(run: Command, command: list[str]) -> str:
    """What a command prints, which has to succeed."""
    answer = run(*command)
    assert answer.code == 0, answer
    return answer.out


def test_they_lead_from_a_script_to_a_plan(run: Command, folder: Path) -> None:
    assert [command[0] for command in COMMANDS] == ["model", "proxy", "recipe", "explain", "check"]
    shown = [_done(run, command) for command in COMMANDS[:-1]][-1]
    target, recipe = load_model_file(folder / "target.yaml"), load_recipe(folder / "gpt.recipe.yaml")
    assert (target.num_layers, target.hidden_size, target.vocab_size) == (24, 1024, 50257)
    assert recipe.megatron_base == load_model_file(folder / "proxy.yaml")
    assert "decoder.layers.0-23.mlp.linear_fc2.weight" in shown


def test_the_recipe_has_what_the_line_says(run: Command, folder: Path) -> None:
    for command in COMMANDS[:3]:
        _done(run, command)
    words = _block("run.sh").replace(")", " ").split()
    said = {name: words[words.index(f"--{name.replace('_', '-')}") + 1] for name in _VALUES}
    recipe = load_recipe(folder / "gpt.recipe.yaml")
    values = {**recipe.hyperparameters.model_dump(), **recipe.schedule.model_dump()}
    assert {name: type(values[name])(text) for name, text in said.items()} == {name: values[name] for name in _VALUES}


_VALUES = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_fraction",
    "weight_decay",
    "adam_beta2",
    "init_method_std",
    "clip_grad",
)


@pytest.mark.slow
def test_they_end_in_a_verdict(run: Command, folder: Path) -> None:
    for command in COMMANDS[:-1]:
        _done(run, command)
    assert _done(run, COMMANDS[-1]).startswith("PASS target.yaml with gpt.recipe.yaml")
