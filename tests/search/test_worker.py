"""Processes that run trials: what they inherit, what they give back, and that none outlives the one above it."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support.blocking import Block, own_children, wait_until_dead

from mup_megatron.errors import InputError
from mup_megatron.search import Objective, ReportFn, TrialOutcome
from mup_megatron.search.worker import (
    Crashed,
    Finished,
    Launch,
    Message,
    Refused,
    Report,
    TrialJob,
    Worker,
    WorkerDiedError,
)

# pytest-xdist runs a thread beside the tests, and Python warns of every fork then.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

changed_after_import: list[str] = []


def see_process(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    return TrialOutcome(0.0, metrics={"pid": os.getpid(), "changed": list(changed_after_import)})


@contextmanager
def worker(objective: Objective, launch: Launch = "fork", log_folder: Path | None = None) -> Iterator[Worker]:
    made = Worker(objective, launch, log_folder)
    try:
        yield made
    finally:
        made.close()


def messages(worker: Worker, number: int = 0, **parameters: float) -> list[Message]:
    """Everything that one job brings, the result last."""
    worker.submit(TrialJob(number, parameters))
    found = [worker.receive()]
    while isinstance(found[-1], Report):
        found.append(worker.receive())
    return found


def only_result(objective: Objective) -> Message:
    with worker(objective) as made:
        (result,) = messages(made)
    return result


def test_a_trial_gets_its_hyperparameters_and_gives_reports_and_an_outcome() -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        report(1, 4.0)
        report(2, 3.0)
        return TrialOutcome(parameters["x"] * 2, metrics={"tokens": 7})

    with worker(objective) as made:
        *reports, result = messages(made, x=1.5)
    assert reports == [Report(1, 4.0), Report(2, 3.0)]
    assert isinstance(result, Finished)
    assert result.outcome == TrialOutcome(3.0, metrics={"tokens": 7})


@pytest.mark.parametrize("launch", ["fork", "spawn"])
def test_every_trial_has_a_process_of_its_own(launch: Launch) -> None:
    with worker(see_process, launch) as made:
        pids = []
        for number in range(2):
            (result,) = messages(made, number)
            assert isinstance(result, Finished)
            pids.append(result.outcome.metrics["pid"])
    assert len({*pids, os.getpid()}) == 3


@pytest.mark.parametrize(("launch", "inherited"), [("fork", ["here"]), ("spawn", [])])
def test_a_forked_trial_begins_with_what_was_imported_and_a_spawned_one_afresh(
    launch: Launch, inherited: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "changed_after_import", ["here"])
    with worker(see_process, launch) as made:
        (result,) = messages(made)
    assert isinstance(result, Finished)
    assert result.outcome.metrics["changed"] == inherited


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf"), None])
def test_a_loss_that_is_no_number_is_a_divergence(loss: float | None) -> None:
    result = only_result(lambda parameters, report: TrialOutcome(loss))
    assert isinstance(result, Finished)
    assert result.outcome == TrialOutcome(None, diverged=True, reason=f"the loss is {loss}")


def test_a_trial_can_say_that_it_diverged_and_why() -> None:
    result = only_result(lambda parameters, report: TrialOutcome(9.0, diverged=True, reason="loss rose at step 3"))
    assert isinstance(result, Finished)
    assert result.outcome == TrialOutcome(None, diverged=True, reason="loss rose at step 3")


def test_an_exception_a_signal_and_an_exit_are_results(capfd: pytest.CaptureFixture[str]) -> None:
    def raises(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        raise ZeroDivisionError("no layers")

    def killed(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def terminated(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    def leaves(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        sys.exit(3)

    assert only_result(raises) == Crashed("ZeroDivisionError: no layers")
    assert "ZeroDivisionError" in capfd.readouterr().err  # with its traceback
    assert only_result(killed) == Crashed(
        "the trial's process was killed by SIGKILL; the system may have run out of memory"
    )
    assert only_result(terminated) == Crashed("the trial's process was killed by SIGTERM")
    assert only_result(leaves) == Crashed("the trial's process left with exit code 3 and no result")


def test_bad_input_is_told_apart_from_a_crash() -> None:
    def refuses(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        raise InputError("data.bin: cut short. Make it again.")

    assert only_result(refuses) == Refused("data.bin: cut short. Make it again.")


def test_a_worker_goes_on_after_a_crash() -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        if parameters["x"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return TrialOutcome(parameters["x"])

    with worker(objective) as made:
        assert isinstance(messages(made, x=0.0)[-1], Crashed)
        assert isinstance(messages(made, x=1.0)[-1], Finished)


def test_a_process_that_a_trial_leaves_behind_does_not_hold_it_up() -> None:
    """It has inherited the trial's end of the pipe, so the pipe does not end with the trial."""
    alive, held = os.pipe()

    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        if os.fork() == 0:
            os.close(held)
            os.read(alive, 1)
            os._exit(0)
        os._exit(4)

    try:
        assert only_result(objective) == Crashed("the trial's process left with exit code 4 and no result")
    finally:
        os.close(held)
        os.close(alive)


def test_what_trials_print_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        os.write(1, b"to output")
        return TrialOutcome(0.0)

    only_result(objective)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "to output"


def test_what_trials_print_goes_to_a_file_each_if_there_is_a_folder(tmp_path: Path) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        os.write(1, b"to output\n")
        os.write(2, b"to error\n")
        return TrialOutcome(0.0)

    with worker(objective, log_folder=tmp_path / "logs") as made:
        for number in (0, 7):
            messages(made, number)
    assert {file.name: file.read_text() for file in (tmp_path / "logs").iterdir()} == {
        "trial-00000.log": "to output\nto error\n",
        "trial-00007.log": "to output\nto error\n",
    }


def test_a_log_folder_that_cannot_be_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with worker(see_process, log_folder=tmp_path / "file") as made:
        (result,) = messages(made)
    assert isinstance(result, Refused)
    assert "trial-00000.log: cannot be written" in result.message


@pytest.mark.parametrize("launch", ["fork", "spawn"])
def test_closing_ends_worker_and_trial(tmp_path: Path, launch: Launch) -> None:
    block = Block.new(tmp_path)
    made = Worker(block, launch)
    made.submit(TrialJob(0, {}))
    block.wait_until_running()
    family = own_children()
    made.close()
    made.close()  # and again does nothing
    wait_until_dead(family)
    assert own_children() == []


def test_a_dead_worker_is_noticed_and_its_trial_dies(tmp_path: Path) -> None:
    block = Block.new(tmp_path)
    with worker(block) as made:
        made.submit(TrialJob(0, {}))
        block.wait_until_running()
        family = own_children()
        family[0].kill()
        with pytest.raises(WorkerDiedError):
            made.receive()
        wait_until_dead(family)


@pytest.mark.parametrize("launch", ["fork", "spawn"])
def test_worker_and_trial_die_with_their_parent(tmp_path: Path, launch: Launch) -> None:
    block = Block.new(tmp_path)

    def parent() -> None:
        made = Worker(block, launch)
        made.submit(TrialJob(0, {}))
        made.receive()

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    block.wait_until_running()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.kill()
    process.join()
    wait_until_dead(family)


def test_ctrl_c_is_for_the_process_above(tmp_path: Path) -> None:
    """A terminal sends it to every process. Worker and trial must live on until they are told otherwise."""

    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        os.kill(os.getppid(), signal.SIGINT)
        os.kill(os.getppid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return TrialOutcome(1.0)

    assert isinstance(only_result(objective), Finished)
