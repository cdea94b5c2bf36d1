"""`sweep --wandb-project`: each trial is a run of Weights & Biases, in a group named after the study. Offline."""

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from support.commands import Command, contents
from support.wandb_files import place_of, read_back

ROOT = Path(__file__).parents[2]
SWEEP = ("sweep", "base.yaml", "--data", "text", "--study", "small", "--train-iters", "3", "--global-batch-size", "2",
         "--eval-iters", "1", "--wandb-project", "tuning")  # fmt: skip


def test_each_trial_is_a_run_in_the_studys_group(here: Path, data: Path) -> None:
    # What an attempt that was killed at its end has left of trial 1.
    left = here / "results" / "small" / "wandb" / "trial-1"
    left.mkdir(parents=True)
    for name in ("metrics.csv", "result.json"):
        (left / name).write_text("")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "mup_megatron", *SWEEP, "--trials", "2", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6, "the answer alone"
    trials = optuna.load_study(study_name="small", storage="sqlite:///results/small.db").trials
    for trial in trials:
        (file,) = (here / "results" / "small" / "wandb" / f"trial-{trial.number}").rglob("*.wandb")
        assert place_of(file) == ("tuning", "small", f"trial-{trial.number}")
        config, history = read_back(file)
        drawn = {name: config["recipe"]["hyperparameters"][name] for name in trial.params}
        assert drawn == trial.params
        assert history["validation_loss"] == {3: trial.value}
    assert [trial.value is not None for trial in trials] == [True, True]
    assert not (here / "wandb").exists()


def test_without_wandb_it_is_refused_before_there_is_a_study(
    run: Command, here: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = contents(here)
    code, out, err = run(*SWEEP, "--trials", "1")
    assert (code, out) == (2, "")
    assert "--wandb-project: wandb is not installed. Install it: pip install 'mup-megatron[wandb]'" in err
    assert contents(here) == before
