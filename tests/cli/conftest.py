from pathlib import Path

import pytest
from support.commands import BASE, RECIPE, TARGET, Command, command, write


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
