"""Runs the command line in this process, and small files to give to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mup_megatron.cli import main as cli
from mup_megatron.yaml_io import dump_yaml

BASE: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 1,
    "vocab_size": 300,
    "seq_length": 16,
}
TARGET: dict[str, Any] = {**BASE, "hidden_size": 128, "num_attention_heads": 4}
RECIPE: dict[str, Any] = {"base": BASE, "hyperparameters": {"lr": 0.006}}


class Answer(NamedTuple):
    """What a command has come to."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]


def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """A function that runs `mup-megatron WORDS…`."""

    def run(*words: object) -> Answer:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return Answer(exit_.value.code, out, err)

    return run


def write(path: Path, content: dict[str, Any]) -> Path:
    """A YAML file."""
    path.write_text(dump_yaml(content), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name: to see that nothing has changed."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
