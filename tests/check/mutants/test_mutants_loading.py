"""Mistakes are loaded where somebody asks for one, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import RECIPE, TARGET, write

_COMMAND = """
import sys
from mup_megatron.cli import main
try:
    main.main(["check", *sys.argv[1:]])
except SystemExit as end:
    assert end.code == {code}, end.code
"""
_TOLD = "print('mup_megatron.check.mutants' in sys.modules)"


def is_loaded(program: str, *arguments: str, folder: Path) -> bool:
    command = [sys.executable, "-c", f"{program}\n{_TOLD}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize("module", ["cli.check", "check.run_megatron", "check.run_launch_line", "check.run_modules"])
def test_importing_what_checks_loads_no_mistakes(module: str, tmp_path: Path) -> None:
    assert not is_loaded(f"import sys, mup_megatron.{module}", folder=tmp_path)


@pytest.mark.slow
def test_a_check_loads_mistakes_if_one_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "target.yaml", TARGET)
    write(tmp_path / "r.yaml", RECIPE)
    words = (
        "target.yaml",
        "--recipe",
        "r.yaml",
        "--widths",
        "32,64,128",
        "--seeds",
        "2",
        "--processes",
        "1",
        "--fresh",
    )
    assert is_loaded(_COMMAND.format(code=2), *words, "--mutant", "unknown", folder=tmp_path)
    assert not is_loaded(_COMMAND.format(code=0), *words, folder=tmp_path)
    assert (tmp_path / "results" / "check").is_dir()
