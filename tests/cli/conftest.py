import os
from pathlib import Path

import pytest
from support.commands import BASE, RECIPE, TARGET, Command, command, write
from support.quick_databases import quick_databases

from mup_megatron.megatron import cpu

quick_databases()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `mup-megatron WORDS…` in this process."""
    return command(capfd)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base, a target four times as wide, and a recipe tuned at the base."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.yaml", BASE)
    write(tmp_path / "target.yaml", TARGET)
    write(tmp_path / "r.yaml", RECIPE)
    return tmp_path


@pytest.fixture
def data(run: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokens at the prefix `text`."""
    # Other tests of this process need the runtime, and must not find Megatron imported without it.
    cpu.enable()
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # which `sweep` sets
    for name in ("a.txt", "b.txt"):
        (here / name).write_text(f"{name}: the width grows and the rate stays. " * 60)
    assert run("data", "a.txt", "b.txt", "-o", "text", "--tokenizer", "byte").code == 0
    return here / "text"
