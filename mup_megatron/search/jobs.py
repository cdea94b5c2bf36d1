"""A fixed list of runs, several at a time, each in a fork. For grids and comparisons; a search is `sweep.py`."""

import contextlib
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.search.objective import Objective, TrialOutcome
from mup_megatron.search.worker import (
    MOST_WORKERS,
    Crashed,
    Finished,
    Refused,
    TrialJob,
    Worker,
    WorkerDiedError,
    require_count,
)


def run_jobs(
    objective: Objective,
    jobs: Sequence[TrialJob],
    *,
    workers: int,
    on_end: Callable[[TrialJob, TrialOutcome], None],
    log_folder: Path | None = None,
) -> None:
    """Runs every job, in their order, `workers` at a time.

    Args:
        objective: as in a sweep; import all it needs before.
        jobs: with distinct numbers.
        workers: processes, at least 1.
        on_end: told of each outcome as it comes.
        log_folder: gets what runs print, a file for each; None sends it to standard error.

    Raises:
        InputError: a job refused its input.
        RuntimeError: a job crashed.
    """
    require_count("--workers", workers, MOST_WORKERS)
    waiting = list(reversed(jobs))
    pool = [Worker(objective, log_folder=log_folder) for _ in range(min(workers, len(jobs)))]
    try:
        running: dict[Connection, tuple[Worker, TrialJob]] = {}
        idle = list(pool)
        while waiting or running:
            while waiting and idle:
                worker, job = idle.pop(), waiting.pop()
                running[worker.connection] = (worker, job)
                with contextlib.suppress(WorkerDiedError):  # which shows on receiving
                    worker.submit(job)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                worker, job = running[connection]
                try:
                    message = worker.receive()
                except WorkerDiedError:
                    message = Crashed("its worker process was killed")
                match message:
                    case Finished(outcome):
                        on_end(job, outcome)
                        idle.append(running.pop(connection)[0])
                    case Refused(text):
                        raise InputError(text)
                    case Crashed(reason):
                        raise RuntimeError(f"run {job.number} ended without a result: {reason}")
                    case _:
                        pass
    finally:
        for worker in pool:
            worker.close()
