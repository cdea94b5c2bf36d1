"""The check as an assertion in somebody's own tests."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from support.processes import HANGS_AFTER_S
from support.small_nets import OPTIONS, Net, recipe_for
from torch import nn

from mup_megatron.check.run_modules import assert_mup
from mup_megatron.check.subjects.scripts import Task
from mup_megatron.modules import apply_plan, param_groups

ROOT = Path(__file__).parents[2]
PLUGIN = "mup_megatron.check.pytest_plugin"

TESTS = """
import pytest
import torch
from support.small_nets import OPTIONS, Net, keep_references, recipe_for

keep_references(pytest.MonkeyPatch())


def without_widths(model, task):
    return torch.optim.AdamW(model.parameters(), lr=task.recipe.hyperparameters.lr)


def test_right(assert_mup):
    assert_mup(Net, recipe_for(), seeds=2, **OPTIONS)


def test_wrong(assert_mup):
    assert_mup(Net, recipe_for(), prepare=without_widths, seeds=2, **OPTIONS)
"""


def test_a_model_that_fails_says_the_verdict() -> None:
    with pytest.raises(AssertionError, match=r"(?s)\AFAIL the model: .*up\.weight: learning rate"):
        assert_mup(Net, recipe_for(), prepare=_one_rate, **OPTIONS)


def _one_rate(model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """The right model with the base's learning rate for all of it."""
    apply_plan(model, task.plan)
    groups = param_groups(model.named_parameters(), task.plan)
    return torch.optim.AdamW([{**group, "lr": task.plan.lr} for group in groups], betas=(0.9, 0.95))


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
        timeout=HANGS_AFTER_S,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 1 passed" in ran.stdout
    assert "PASSED test_somebodys_model.py::test_right" in ran.stdout
    assert "AssertionError: FAIL the model" in ran.stdout


def test_pytest_finds_it_once_the_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"mup_megatron": PLUGIN}
