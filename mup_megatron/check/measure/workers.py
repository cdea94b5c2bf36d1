"""Runs of a check in several processes, one thread each. What comes out does not depend on how many there are.

Processes are forked, because importing torch and Megatron takes longer than many a run, and because what is run may be
a user's own function, which cannot be sent. So there is one process alone where a fork is not safe: on a GPU, and where
ranks have joined.
"""

import importlib
import multiprocessing
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mup_megatron.errors import InputError
from mup_megatron.training import ranks
from mup_megatron.validation import brief

ResultT = TypeVar("ResultT")

MOST = 8
"""Processes by default: there are no more than a dozen runs of one width."""


@dataclass(frozen=True, slots=True)
class WorkerJob(Generic[ResultT]):
    """One run."""

    cost: float
    """Relative to the others: the longest begin first."""
    work: Callable[[], ResultT]


def available_processes() -> int:
    """Returns how many processes pay."""
    # Which cores this process may use, only Linux tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores)


def usable_processes(wanted: int | None) -> int:
    """Returns how many processes there can be here."""
    import torch
    from torch import distributed

    joined = distributed.is_available() and distributed.is_initialized()
    # Which says that there is a GPU, and is not imported where nobody needs it.
    runtime = sys.modules.get("mup_megatron.megatron.cpu")
    has_gpu = torch.cuda.is_available() and not (runtime is not None and runtime.is_enabled())
    if joined or ranks.has_met() or has_gpu or "WORLD_SIZE" in os.environ:
        return 1
    return available_processes() if wanted is None else wanted


def ignored_processes(wanted: int | None, processes: int) -> list[str]:
    """Returns a remark where there are not as many processes as somebody asked for."""
    if wanted is None or wanted == processes:
        return []
    return [
        f"{wanted} processes were asked for, and the models trained one after the other: with a GPU, under torchrun "
        "and where ranks have joined a process cannot be forked."
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread, so that rounding does not depend on how many there are, and processes can be forked."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_jobs(
    jobs: Sequence[WorkerJob[ResultT]],
    processes: int,
    report: Callable[[int], None],
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[ResultT]:
    """Returns the runs, in the order of the jobs.

    Args:
        jobs: independent of each other.
        processes: at most so many; with 1 they run in this one.
        report: called with how many are done.
        within: what a process enters before its first job.

    Raises:
        InputError: a process was ended from outside, or raised what no other process can raise again.
        BaseException: what a job raised.
    """
    if processes == 1:
        runs = []
        with within():
            for job in jobs:
                runs.append(job.work())
                report(len(runs))
        return runs
    # What the first step of any optimizer imports: once here, and not in every process.
    importlib.import_module("torch._dynamo")
    found: dict[int, ResultT] = {}
    order = sorted(range(len(jobs)), key=lambda index: -jobs[index].cost)
    try:
        with (
            _quietly_forked(),
            ProcessPoolExecutor(
                min(processes, len(jobs)),
                mp_context=multiprocessing.get_context("fork"),
                initializer=_begin,
                initargs=(jobs, within),
            ) as pool,
        ):
            futures = {pool.submit(_work, index): index for index in order}
            try:
                for future in as_completed(futures):
                    result = future.result()
                    if isinstance(result, _Failure):
                        raise result.error() from _Where(result.traceback)
                    found[futures[future]] = result
                    report(len(found))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise InputError(
            "a process of the check was ended from outside, as happens where memory runs out. Use fewer: --processes 1."
        ) from None
    return [found[index] for index in range(len(jobs))]


@contextmanager
def _quietly_forked() -> Iterator[None]:
    """Without Python's remark that threads do not survive a fork: none of them is waited for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        yield


_jobs: Sequence[WorkerJob[Any]] = ()
_entered = ExitStack()


def _begin(jobs: Sequence[WorkerJob[Any]], within: Callable[[], AbstractContextManager[None]]) -> None:
    global _jobs
    _jobs = jobs
    # Not left again: the process ends with its last job.
    _entered.enter_context(within())


class _Where(Exception):
    """The traceback of another process, as the cause of what is raised here."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Holds what a job raised.

    Not raised there: what a user's code raises need not come through pickle, and takes the whole pool with it then.
    """

    pickled: bytes
    """Empty where it cannot be pickled."""
    told: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> "_Failure":
        """Returns that of an exception that is being handled."""
        try:
            pickled = pickle.dumps(error)
        except Exception:  # whatever the exception's own class raises
            pickled = b""
        told = "".join(traceback.format_exception_only(error))
        return cls(pickled, told, "".join(traceback.format_exception(error)))

    def error(self) -> BaseException:
        """Returns the same exception, or where it does not come through, what tells of it."""
        try:
            error = pickle.loads(self.pickled)
        except Exception:  # likewise: loading calls its class
            error = None
        if isinstance(error, BaseException):
            return error
        return InputError(
            f"the code that is checked failed ({brief(self.told, 180)}). Correct it; with --processes 1 it is raised "
            "where it arises."
        )


def _work(index: int) -> Any:
    try:
        return _jobs[index].work()
    except BaseException as error:
        return _Failure.of(error)
