"""The check as an assertion in somebody's own tests."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from support.small_nets import OPTIONS, Net, recipe_for

from mup_megatron.check.modules import assert_mup

ROOT = Path(__file__).parents[2]
PLUGIN = "mup_megatron.check.pytest_plugin"

TESTS = """
import torch
from support.small_nets import OPTIONS, Net, recipe_for


def without_widths(model, task):
    return torch.optim.AdamW(model.parameters(), lr=task.recipe.hyperparameters.lr)


def test_right(assert_mup):
    assert_mup(Net, recipe_for(), **OPTIONS)


def test_wrong(assert_mup):
    assert_mup(Net, recipe_for(), prepare=without_widths, **OPTIONS)
"""


def test_a_model_that_fails_says_the_verdict() -> None:
    with pytest.raises(AssertionError, match=r"(?s)^FAIL .*learning rate.*blocks\.0\.up\.weight|blocks\.0\.up\.weight"):
        assert_mup(Net, recipe_for(), prepare=lambda model, _task: torch.optim.AdamW(model.parameters()), **OPTIONS)


def test_the_plug_in_gives_pytest_the_fixture(tmp_path: Path) -> None:
    (tmp_path / "test_somebodys_model.py").write_text(TESTS)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", "-q", "-rA", str(tmp_path)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 1 passed" in ran.stdout
    assert "PASSED test_somebodys_model.py::test_right" in ran.stdout
    assert "AssertionError: FAIL the model" in ran.stdout


def test_pytest_finds_it_once_the_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"mup_megatron": PLUGIN}
