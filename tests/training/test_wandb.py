"""An offline run of Weights & Biases, read back from what wandb wrote."""

import os
from pathlib import Path

import pytest
from support.processes import run_ranks
from support.training_runs import RECIPE, make_text, options, target
from support.wandb_files import read_back
from support.watching_page import names, require_same

from mup_megatron.training.options import TrainingOptions
from mup_megatron.training.train import run_training


def train_offline(folder: Path, chosen: TrainingOptions) -> None:
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    run_training(target(), RECIPE, make_text(folder), chosen)


def test_an_offline_run_holds_recipe_fingerprint_and_learning_rates(tmp_path: Path) -> None:
    chosen = options(tmp_path, wandb_project="widths", wandb_exp_name="double", eval_interval=8)
    run_ranks(train_offline, 1, tmp_path, chosen)
    (file,) = (tmp_path / "out").rglob("*.wandb")
    config, history = read_back(file)
    assert config["fingerprint"] == RECIPE.fingerprint
    assert config["recipe"] == RECIPE.model_dump(mode="json")
    assert config["options"]["train_iters"] == 12

    h = RECIPE.hyperparameters
    linear = {n: h.min_lr + (1 - (n - 1) / 12) * (h.lr - h.min_lr) for n in (4, 8, 12)}
    assert history["lr/input"] == pytest.approx(linear, rel=1e-12)
    assert history["lr/hidden"] == pytest.approx({n: lr / 2 for n, lr in linear.items()}, rel=1e-12)
    assert set(history["validation_loss"]) == {8, 12}

    titles, *lines = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    assert history["loss"] == {n: float(lines[n - 1].split(",")[1]) for n in (4, 8, 12)}

    # docs/watching.md has every name, and no other
    require_same(names("train"), {name for name in history if not name.startswith("_")})
    assert [name for name in names("train", "column of metrics.csv") if name] == titles.split(",")[1:]
