"""SIGTERM to `sweep`: the trial goes on, elsewhere, with bitwise the losses of an undisturbed one."""

import os
import select
import signal
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import optuna
import psutil
import pytest
from support.blocking import LIMIT_S, give_time_to_stop
from support.commands import Command
from support.processes import fork_server

from mup_megatron.cli import main as cli
from mup_megatron.search import Interruption, ReportFn, TrialOutcome
from mup_megatron.training import ranks
from mup_megatron.tuning import ProxyTraining

SWEEP = ("sweep", "base.yaml", "--data", "text", "--train-iters", "40", "--global-batch-size", "2", "--eval-iters", "2",
         "--trials", "1")  # fmt: skip
STOP_AFTER = 20


def started(*words: str, marker: Path | None = None) -> ForkServerProcess:
    """A command in a process without threads, as a user's is; with a marker, one that is told to stop."""
    process = fork_server().Process(target=_command, args=([*SWEEP, *words], Path.cwd(), marker))
    process.start()
    return process


def _command(words: list[str], folder: Path, marker: Path | None) -> None:
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        give_time_to_stop(patch)
        if marker is not None:
            patch.setattr(ProxyTraining, "resume", told_once(marker))
        ranks.preload()
        cli.main(words)


def code_of(process: ForkServerProcess) -> int:
    process.join(LIMIT_S)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def told_once(marker: Path) -> Callable[..., TrialOutcome | None]:
    """Returns a trial that, after twenty iterations, once has its whole search told to stop."""
    resume = ProxyTraining.resume

    def resume_and_tell(
        self: ProxyTraining, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
    ) -> TrialOutcome | None:
        def report_and_tell(step: int, loss: float) -> None:
            report(step, loss)
            with marker.with_name("reported").open("a") as reported:
                reported.write(f"{step}\n")
            if step == STOP_AFTER and not marker.exists():
                marker.touch()
                for pid in (psutil.Process(os.getppid()).ppid(), os.getppid(), os.getpid()):
                    os.kill(pid, signal.SIGTERM)
                while not interruption.requested():
                    select.select([], [], [], 0.01)

        return resume(self, parameters, report_and_tell, interruption)

    return resume_and_tell


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_terminated_trial_goes_on_with_bitwise_the_same_losses(
    run: Command, here: Path, data: Path, shared: bool
) -> None:
    assert code_of(started("--study", "undisturbed")) == 0
    marker = here / "marker"
    assert code_of(started("--study", "stopped", marker=marker)) == 128 + signal.SIGTERM
    kept = here / "results" / "stopped" / "checkpoints" / "trial-00000"
    assert [folder.name for folder in kept.glob("iter_*")] == [f"iter_{STOP_AFTER:07d}"]
    if not shared:
        kept.rename(here / "elsewhere")
    assert code_of(started("--study", "stopped", marker=marker)) == 0
    assert not kept.exists()
    found, expected = (
        optuna.load_study(study_name=name, storage=f"sqlite:///results/{name}.db").trials
        for name in ("stopped", "undisturbed")
    )
    assert found[0].intermediate_values == expected[0].intermediate_values
    assert sorted(expected[0].intermediate_values) == [10, 20, 30, 40]
    assert found[0].value == expected[0].value
    assert found[0].user_attrs["metrics"] == expected[0].user_attrs["metrics"]
    steps = [10, 20, 30, 40] if not shared else [30, 40]
    assert [int(line) for line in (here / "reported").read_text().split()] == [10, 20, *steps]
