"""The Slurm array of a search, with stand-ins for Slurm's commands."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "sweep_slurm.sh"
WORDS = ("proxy.yaml", "--data", "my data", "--study", "s", "--trials", "3", "--storage", "grpc://node1:13000")


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", SCRIPT, *words], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, **environment},
    )  # fmt: skip


def stand_in(folder: Path, name: str, status: int = 0) -> None:
    """A command that writes what it was given to `called`."""
    (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{folder}/called"\nexit {status}\n')
    (folder / name).chmod(0o755)


def test_a_dry_run_prints_the_step(tmp_path: Path) -> None:
    done = run(tmp_path, *WORDS, DRY_RUN="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert shlex.split(done.stdout) == ["srun", "--kill-on-bad-exit=1", "mup-megatron", "sweep", *WORDS]


@pytest.mark.parametrize(
    "url", ["postgresql://me:s3c4et@node1/studies", "postgresql://node1/s?user=me&password=s3c4et"]
)
def test_a_dry_run_prints_no_password(tmp_path: Path, url: str) -> None:
    done = run(tmp_path, *WORDS[:-1], url, DRY_RUN="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "s3c4et" not in done.stdout
    assert "node1" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (WORDS[:-2], "give a --storage that all nodes reach"),
        ((*WORDS[:-1], "sqlite:///results/s.db"), "SQLite is for one machine"),
        ((*WORDS[:-2], "--storage=sqlite:///results/s.db"), "SQLite is for one machine"),
    ],
)
def test_a_storage_of_one_machine_is_refused(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = run(tmp_path, *words, DRY_RUN="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.parametrize(("status", "left", "requeued"), [(0, 0, False), (143, 0, True), (2, 2, False)])
def test_a_job_that_was_stopped_is_queued_again_and_no_other(
    tmp_path: Path, status: int, left: int, requeued: bool
) -> None:
    stand_in(tmp_path, "srun", status)
    stand_in(tmp_path, "scontrol")
    stand_in(tmp_path, "nvidia-cuda-mps-control")
    done = run(tmp_path, *WORDS, SLURM_JOB_ID="77", MPS="1")
    assert done.returncode == left
    called = (tmp_path / "called").read_text().splitlines()
    assert called[0] == "nvidia-cuda-mps-control -d"
    assert called[1].startswith("srun --kill-on-bad-exit=1 mup-megatron sweep proxy.yaml")
    assert called[2:-1] == (["scontrol requeue 77"] if requeued else [])
    assert called[-1] == "nvidia-cuda-mps-control"
