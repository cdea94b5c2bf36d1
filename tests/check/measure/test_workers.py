"""Runs in several processes: their order, their failures, and that their number changes nothing."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from mup_megatron.check.measure import workers
from mup_megatron.check.measure.workers import WorkerJob, run_jobs
from mup_megatron.errors import InputError


def _jobs() -> list[WorkerJob[tuple[int, int]]]:
    return [WorkerJob(cost, lambda cost=cost: (cost, os.getpid())) for cost in (3, 1, 2, 5)]  # type: ignore[misc]


@pytest.mark.parametrize("processes", [1, 2, 9])
def test_what_comes_back_is_in_the_order_of_the_jobs(processes: int) -> None:
    told: list[int] = []
    found = run_jobs(_jobs(), processes, told.append)
    assert [cost for cost, _ in found] == [3, 1, 2, 5]
    assert told == [1, 2, 3, 4]
    assert (os.getpid() in {process for _, process in found}) == (processes == 1)


def test_each_process_enters_what_it_needs_once() -> None:
    entered: list[int] = []

    @contextmanager
    def within() -> Iterator[None]:
        entered.append(os.getpid())
        yield

    jobs = [WorkerJob(1, lambda: list(entered)) for _ in range(6)]
    for of_job in run_jobs(jobs, 2, lambda _: None, within):
        assert len(of_job) == 1
        assert of_job != [os.getpid()]


def _wrong() -> int:
    raise InputError("width 7: cannot be built.")


def test_a_users_mistake_in_a_process_is_told_as_it_is() -> None:
    with pytest.raises(InputError, match="width 7"):
        run_jobs([WorkerJob(1, _wrong), WorkerJob(1, lambda: 1)], 2, lambda _: None)


class Demanding(Exception):
    """Its message is not all that it is made of."""

    def __init__(self, layer: str, width: int) -> None:
        super().__init__(f"{layer} is {width} wide")


class Holding(Exception):
    """Holds what no other process can have."""

    def __init__(self, message: str) -> None:
        super().__init__(message, lambda: None)


def _demanding() -> int:
    raise Demanding("fc1", 7)


def _holding() -> int:
    raise Holding("fc1")


def _local() -> int:
    class Local(RuntimeError):
        pass

    raise Local("fc1")


@pytest.mark.parametrize(
    ("work", "told"), [(_demanding, "Demanding: fc1 is 7 wide"), (_holding, "Holding: "), (_local, "Local: fc1")]
)
def test_an_exception_that_no_other_process_can_raise_is_told_with_its_traceback(
    work: Callable[[], int], told: str
) -> None:
    with pytest.raises(InputError, match=told) as raised:
        run_jobs([WorkerJob(1, work), WorkerJob(1, lambda: 1)], 2, lambda _: None)
    assert f"in {work.__name__}" in str(raised.value.__cause__)


def _unlike() -> int:
    raise ZeroDivisionError("by 0")


def test_an_exception_of_a_process_is_the_same_here() -> None:
    with pytest.raises(ZeroDivisionError, match="by 0") as raised:
        run_jobs([WorkerJob(1, _unlike), WorkerJob(1, lambda: 1)], 2, lambda _: None)
    assert "in _unlike" in str(raised.value.__cause__)


def test_a_process_that_is_ended_from_outside_is_no_traceback() -> None:
    with pytest.raises(InputError, match="--processes 1"):
        run_jobs([WorkerJob(1, lambda: os._exit(9)), WorkerJob(1, lambda: 1)], 2, lambda _: None)


def test_where_ranks_may_have_met_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(workers.ranks, "has_met", lambda: False)
    assert workers.usable_processes(3) == 3
    monkeypatch.setattr(workers.ranks, "has_met", lambda: True)
    assert workers.usable_processes(3) == 1
    monkeypatch.setattr(workers.ranks, "has_met", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert workers.usable_processes(3) == 1


def test_that_other_processes_were_asked_for_is_said() -> None:
    assert workers.ignored_processes(None, 1) == workers.ignored_processes(3, 3) == []
    [remark] = workers.ignored_processes(3, 1)
    assert remark.startswith("3 processes were asked for")


def test_cores_are_counted_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert workers.available_processes() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert workers.available_processes() == 1
