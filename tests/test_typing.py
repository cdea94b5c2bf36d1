"""Types reach those who use the package: it says that it is typed, and a user's script passes mypy strict."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest

USER = """
from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import torch

from mup_megatron.architectures import load_model_file
from mup_megatron.errors import InputError
from mup_megatron.modules import apply_plan, module_base, param_groups, plan_for_module
from mup_megatron.recipe import Hyperparameters, Recipe, load_recipe
from mup_megatron.theory import Plan, PlanEntry, Role, Site


def learning_rates(recipe: Path, target: Path) -> dict[str, float]:
    try:
        plan = load_recipe(recipe).plan(load_model_file(target))
    except InputError as error:
        raise SystemExit(str(error)) from None
    assert_type(plan, Plan)
    assert_type(plan["output_layer.weight"], PlanEntry)
    factors: list[tuple[str, float]] = [(site.module, site.factor) for site in plan.sites]
    assert_type(plan.sites, tuple[Site, ...])
    return dict(factors) | {entry.name: entry.lr for entry in plan.entries if entry.role is Role.HIDDEN}


def optimizer(width: int, base: int = 64) -> torch.optim.Optimizer:
    def build(size: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, size), torch.nn.Linear(size, 2))

    shapes = module_base(lambda: build(base), lambda: build(2 * base))
    recipe = Recipe(base=shapes, hyperparameters=Hyperparameters(lr=0.1))
    plan = plan_for_module(lambda: build(width), recipe)
    model = build(width)
    apply_plan(model, plan)
    return torch.optim.AdamW(param_groups(model.named_parameters(), plan))
"""
WRONG = 'plan["output_layer.weight"], PlanEntry)', 'plan["output_layer.weight"], float)'


def test_the_package_says_that_it_is_typed() -> None:
    # Whatever lies in the package's folder is in its wheel.
    assert importlib.resources.files("mup_megatron").joinpath("py.typed").is_file()


@pytest.mark.slow
def test_a_script_that_uses_the_public_interface_passes_mypy_strict(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    for text, errors in ((USER, 0), (USER.replace(*WRONG), 1)):
        script.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == errors, done.stdout + done.stderr
        assert done.stdout.count(": error: ") == errors, done.stdout
