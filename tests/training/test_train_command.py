"""`mup-megatron train` as a user starts it: on its own, and under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import HANGS_AFTER_S, run_ranks
from support.training_runs import RECIPE, make_text, target

from mup_megatron.recipe import save_recipe
from mup_megatron.yaml_io import dump_yaml

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAYOUT = ("--tensor-model-parallel-size", "2", "--sequence-parallel")


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, text=True, capture_output=True, timeout=HANGS_AFTER_S
    )


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    prefix = run_ranks(make_text, 1, tmp_path)[0]
    (tmp_path / "wide.yaml").write_text(dump_yaml(target().model_dump(mode="json")))
    save_recipe(RECIPE, tmp_path / "a.recipe.yaml")
    size = ["--train-iters", "4", "--global-batch-size", "4"]
    return ["-m", "mup_megatron", "train", "wide.yaml", "--recipe", "a.recipe.yaml", "--data", str(prefix), *size]


def test_one_process(tmp_path: Path, arguments: list[str]) -> None:
    """Results go where they are expected."""
    done = start(tmp_path, *arguments)
    output = Path("results/train") / f"wide-{RECIPE.fingerprint[:12]}-seed1234"
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: 4 iterations, training loss ")
    assert len((tmp_path / output / "metrics.csv").read_text().splitlines()) == 5


def test_torchrun(tmp_path: Path, arguments: list[str]) -> None:
    done = start(tmp_path, *TORCHRUN, *arguments, *LAYOUT, "--output", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "the first rank alone answers"
    assert done.stdout.startswith("out: 4 iterations, training loss ")
    assert len((tmp_path / "out" / "metrics.csv").read_text().splitlines()) == 5


@pytest.mark.slow  # a command's errors are in test_train_refusals.py; here is what torchrun makes of one
def test_torchrun_of_what_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    refused = start(tmp_path, *TORCHRUN, *arguments, *LAYOUT, "--output", "other", "--load", "nowhere")
    assert refused.returncode != 0
    assert refused.stderr.count("mup-megatron: --load nowhere: no checkpoint there") == 1, refused.stderr
    assert "exitcode  : 2" in refused.stderr
    assert "InputError" not in refused.stderr, "the only traceback is torchrun's own"
    assert not (tmp_path / "other").exists()
