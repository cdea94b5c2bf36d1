"""A fixed list of runs, several at a time, each in a fork. For grids and comparisons; a search is `sweep.py`."""

from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.search.worker import Crashed, Finished, Job, Objective, Outcome, Refused, Worker


def run_jobs(
    objective: Objective,
    jobs: Sequence[Job],
    *,
    workers: int,
    on_end: Callable[[Job, Outcome], None],
    log_folder: Path | None = None,
) -> None:
    """Runs every job, in their order, `workers` at a time.

    Args:
        objective: as in a sweep; import all it needs before.
        jobs: with distinct numbers.
        workers: processes.
        on_end: told of each outcome as it comes.
        log_folder: gets what runs print, a file for each; None sends it to standard error.

    Raises:
        InputError: a job refused its input.
        RuntimeError: a job crashed.
    """
    waiting = list(reversed(jobs))
    pool = [Worker(objective, log_folder=log_folder) for _ in range(min(workers, len(jobs)))]
    try:
        running: dict[Connection, tuple[Worker, Job]] = {}
        idle = list(pool)
        while waiting or running:
            while waiting and idle:
                worker, job = idle.pop(), waiting.pop()
                worker.submit(job)
                running[worker.connection] = (worker, job)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                worker, job = running[connection]
                match worker.receive():
                    case Finished(outcome):
                        on_end(job, outcome)
                        idle.append(running.pop(connection)[0])
                    case Refused(message):
                        raise InputError(message)
                    case Crashed(reason):
                        raise RuntimeError(f"run {job.number} ended without a result: {reason}")
                    case _:
                        pass
    finally:
        for worker in pool:
            worker.close()
