"""A fixed list of runs: all of them, in their order, several at a time, and none left behind when one goes wrong."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from support.blocking import LIMIT_S, Block, own_children, wait_until_dead

from mup_megatron.errors import InputError
from mup_megatron.search import Objective, ReportFn, TrialOutcome
from mup_megatron.search.jobs import run_jobs
from mup_megatron.search.worker import TrialJob

JOBS = [TrialJob(number, {"x": number / 2}) for number in range(5)]


def double(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    report(1, 0.0)
    return TrialOutcome(parameters["x"] * 2, metrics={"pid": os.getpid()})


def ended(objective: Objective, jobs: list[TrialJob], workers: int) -> list[tuple[TrialJob, TrialOutcome]]:
    """What `on_end` was told, in its order."""
    told: list[tuple[TrialJob, TrialOutcome]] = []
    run_jobs(objective, jobs, workers=workers, on_end=lambda job, outcome: told.append((job, outcome)))
    assert own_children() == []
    return told


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_every_job_ends_once_with_its_own_outcome(workers: int) -> None:
    told = ended(double, JOBS, workers)
    assert sorted(job.number for job, _ in told) == [0, 1, 2, 3, 4]
    assert all(outcome.loss == job.number for job, outcome in told)
    assert len({outcome.metrics["pid"] for _, outcome in told}) == len(JOBS), "a process each"


def test_one_worker_takes_them_in_their_order() -> None:
    jobs = [TrialJob(number, {"x": 0.0}) for number in (3, 1, 2)]
    assert [job for job, _ in ended(double, jobs, 1)] == jobs


def test_no_jobs_are_done_at_once() -> None:
    assert ended(double, [], 2) == []


def test_several_run_at_a_time(tmp_path: Path) -> None:
    """Each waits until the other has begun, so one at a time would never end."""
    pipes = [tmp_path / name for name in ("0", "1")]
    for pipe in pipes:
        os.mkfifo(pipe)

    def meet(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        signal.alarm(LIMIT_S)
        for index in range(2):
            # Opening a FIFO waits for the other side.
            flags = os.O_WRONLY if index == parameters["x"] else os.O_RDONLY
            os.close(os.open(pipes[index], flags))
        return TrialOutcome(parameters["x"])

    assert len(ended(meet, [TrialJob(0, {"x": 0}), TrialJob(1, {"x": 1})], 2)) == 2


def test_a_divergence_is_an_outcome_like_others() -> None:
    def diverges(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        return TrialOutcome(float("nan") if parameters["x"] == 0.5 else 1.0)

    told = {job.number: outcome for job, outcome in ended(diverges, JOBS, 2)}
    assert [number for number, outcome in told.items() if outcome.diverged] == [1]
    assert len(told) == len(JOBS)


def kill_itself(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def kill_the_worker(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()
    raise AssertionError


def refuse(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    raise InputError("data.bin: cut short. Make it again.")


@pytest.mark.parametrize(
    ("objective", "error", "said"),
    [
        (refuse, InputError, r"^data\.bin: cut short\. Make it again\.$"),
        (kill_itself, RuntimeError, r"^run 1 ended without a result: the trial's process was killed by SIGKILL"),
        (kill_the_worker, RuntimeError, r"^run 1 ended without a result: its worker process was killed$"),
    ],
)
def test_a_job_without_a_result_ends_all_and_leaves_no_process(
    tmp_path: Path, objective: Objective, error: type[Exception], said: str
) -> None:
    block = Block.new(tmp_path)
    family: list[psutil.Process] = []
    told: list[int] = []

    def work(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        return {0.0: double, 0.5: objective, 1.0: block}[parameters["x"]](parameters, report)

    def on_end(job: TrialJob, outcome: TrialOutcome) -> None:
        # The third runs by now, and for ever; the second goes wrong only after the first has ended.
        told.append(job.number)
        block.wait_until_running()
        family.extend(own_children())

    with pytest.raises(error, match=said):
        run_jobs(work, [JOBS[2], JOBS[0], JOBS[1], JOBS[3]], workers=2, on_end=on_end)
    assert told == [0], "what had ended was told; what had not begun was not run"
    assert len(family) >= 3
    wait_until_dead(family)
    assert own_children() == []


def test_an_error_of_the_caller_ends_all_too(tmp_path: Path) -> None:
    def on_end(job: TrialJob, outcome: TrialOutcome) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_jobs(double, JOBS, workers=2, on_end=on_end)
    assert own_children() == []


def test_what_runs_print_goes_to_a_file_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def prints(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        os.write(1, b"loss 1\n")
        return TrialOutcome(1.0)

    logs = tmp_path / "logs"
    run_jobs(prints, JOBS[:2], workers=1, on_end=lambda job, outcome: None, log_folder=logs)
    assert {path.name: path.read_text() for path in logs.iterdir()} == {
        "trial-00000.log": "loss 1\n",
        "trial-00001.log": "loss 1\n",
    }
    run_jobs(prints, JOBS[:1], workers=1, on_end=lambda job, outcome: None)
    assert capfd.readouterr() == ("", "loss 1\n")


def test_without_a_worker_nothing_could_ever_end() -> None:
    with pytest.raises(InputError, match=r"^--workers 0: must be at least 1"):
        ended(double, JOBS, 0)
