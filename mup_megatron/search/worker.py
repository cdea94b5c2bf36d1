"""Processes that run trials: import once, then fork a child per trial. Knows nothing of studies, storages or Optuna.

    this process  ──fork──▶  worker  ──fork──▶  trial 0, trial 1, …   (one at a time)

The worker is forked before this process opens a database or starts a thread, and it does nothing but fork, listen and
wait. So every trial begins in a process that has all modules imported, a single thread, and no connection that another
process uses. Each of the three dies with the one above it, also by `kill -9` (on Linux).

What a trial starts on its own (data loader processes, torchrun) is the trial's to end.
"""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mup_megatron.errors import InputError

ReportFn: TypeAlias = Callable[[int, float], None]
"""`report(step, loss)`: an intermediate value. Each costs a write to the storage: report tens, not thousands."""

Launch: TypeAlias = Literal["fork", "spawn"]
"""The way a trial's process begins: forked from one that has imported everything, or fresh, importing it all again."""

LEAVE_S = 10.0
"""How long a trial that has given its result may take to leave before it is killed."""


@dataclass(frozen=True)
class TrialOutcome:
    """The outcome of a trial."""

    loss: float | None
    """What the search minimises. None, NaN or infinite: the trial diverged."""
    diverged: bool = False
    """Whether the trial says that it diverged. Its loss is not used then."""
    reason: str | None = None
    """Why it diverged, for people."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, as JSON would hold it."""

    def checked(self) -> "TrialOutcome":
        """Returns the same outcome, diverged if its loss is no finite number, and with a reason if it diverged."""
        if self.diverged:
            return TrialOutcome(None, True, self.reason or "diverged", self.metrics)
        if self.loss is None or not math.isfinite(self.loss):
            return TrialOutcome(None, True, self.reason or f"the loss is {self.loss}", self.metrics)
        return self


Objective: TypeAlias = Callable[[Mapping[str, float], ReportFn], TrialOutcome]
"""Runs one trial with the given hyperparameters. A forked trial may be any callable; a spawned one must pickle."""

Objectives: TypeAlias = Objective | Sequence[Objective]
"""An objective for every trial, or one for each rung of a ladder."""


@dataclass(frozen=True)
class TrialJob:
    """One trial to run."""

    number: int
    parameters: Mapping[str, float]
    rung: int = 0
    """Which of several objectives runs it."""


@dataclass(frozen=True)
class Report:
    """An intermediate value of the running trial."""

    step: int
    value: float


@dataclass(frozen=True)
class Finished:
    """The trial returned an outcome, after so many seconds."""

    outcome: TrialOutcome
    seconds: float


@dataclass(frozen=True)
class Crashed:
    """The trial ended without an outcome: an exception, a signal, an exit."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """The trial raised InputError: what the user gave is wrong, and would be for every other trial."""

    message: str


Result: TypeAlias = Finished | Crashed | Refused
Message: TypeAlias = Report | Result


class WorkerDiedError(Exception):
    """The worker process itself is gone, and its trial with it."""


class Worker:
    """A process that runs one trial after the other: for each, any number of `Report`s, then exactly one `Result`."""

    def __init__(self, objective: Objectives, launch: Launch = "fork", log_folder: Path | None = None) -> None:
        """Forks the worker. Call before this process opens a storage or starts a thread.

        Args:
            objective: runs one trial; of several, the one that a job names.
            launch: how each trial's process begins.
            log_folder: receives what each trial prints, as `trial-00000.log`; None sends it to standard error.
        """
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, objective, launch, log_folder, os.getpid()), name="trial worker"
        )
        self._process.start()
        # Only the worker may hold its end, or its death would not be seen here.
        theirs.close()

    def submit(self, job: TrialJob) -> None:
        """Starts a trial. The worker must be idle.

        Raises:
            WorkerDiedError: it is gone.
        """
        try:
            self.connection.send(job)
        except OSError as error:
            raise WorkerDiedError from error

    def receive(self) -> Message:
        """Waits for the next message and returns it.

        Raises:
            WorkerDiedError: it is gone.
        """
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDiedError from error
        return message

    def close(self) -> None:
        """Ends the worker and the trial that it runs, and waits until the worker is gone. May be called again."""
        if self.connection.closed:
            return
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()


def _serve(connection: Connection, objective: Objectives, launch: Launch, log_folder: Path | None, parent: int) -> None:
    """The worker's life: runs jobs until the other end hangs up."""
    _die_with(parent)
    # Ctrl-C and a batch system's SIGTERM reach every process. The one above decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            job: TrialJob = connection.recv()
        except EOFError:
            return
        connection.send(_run(job, objective, launch, log_folder, connection.send))


def _run(
    job: TrialJob, objective: Objectives, launch: Launch, log_folder: Path | None, send: Callable[[Message], None]
) -> Result:
    """Runs one trial in a process of its own; passes its reports on, whole, and tells what became of it."""
    context = multiprocessing.get_context(launch)
    ours, theirs = context.Pipe(duplex=False)
    # context.Process exists for every start method; the stubs' common base class does not say so.
    process = context.Process(  # type: ignore[attr-defined]
        target=_trial, args=(theirs, objective, job, log_folder, os.getpid()), name=f"trial {job.number}"
    )
    try:
        process.start()
    except OSError as error:
        ours.close()
        theirs.close()
        return Crashed(f"no process for the trial: {error.strerror}")
    theirs.close()
    result: Result | None = None
    with ours:
        while result is None:
            # The end of the trial normally shows as the end of the pipe. If a process that the trial left behind still
            # holds it open, only asking shows it; hence the time limit.
            if not wait([ours], timeout=0.2):
                if process.is_alive():
                    continue
                if not ours.poll():
                    break
            try:
                message: Message = ours.recv()
            except EOFError:
                break
            if isinstance(message, Report):
                send(message)
            else:
                result = message
    process.join(LEAVE_S if result is not None else None)
    if process.exitcode is None:
        process.kill()
        process.join()
    exit_code: int = process.exitcode
    process.close()
    return result if result is not None else Crashed(_why_it_ended(exit_code))


def _why_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"the trial's process left with exit code {exit_code} and no result"
    name = signal.Signals(-exit_code).name
    memory = "; the system may have run out of memory" if -exit_code == signal.SIGKILL else ""
    return f"the trial's process was killed by {name}{memory}"


def _trial(connection: Connection, objective: Objectives, job: TrialJob, log_folder: Path | None, parent: int) -> None:
    """The trial's life, in its own process."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not ignored here: what a trial starts inherits it, and must be able to be terminated.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    started = time.perf_counter()

    def report(step: int, loss: float) -> None:
        connection.send(Report(int(step), float(loss)))

    result: Result
    try:
        _redirect_output(job.number, log_folder)
        run = objective if callable(objective) else objective[job.rung]
        outcome = run(job.parameters, report)
    except InputError as error:
        result = Refused(str(error))
    except Exception as error:  # whatever a trial raises is the trial's result
        traceback.print_exc()
        result = Crashed(f"{type(error).__name__}: {error}".strip())
    else:
        result = Finished(outcome.checked(), time.perf_counter() - started)
    connection.send(result)


def _redirect_output(number: int, log_folder: Path | None) -> None:
    """Keeps what a trial prints away from standard output, which is for answers."""
    sys.stdout.flush()
    sys.stderr.flush()
    if log_folder is None:
        os.dup2(2, 1)
        return
    path = log_folder / f"trial-{number:05d}.log"
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Choose another folder for logs.") from None
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _die_with(parent: int) -> None:
    """Has the system kill this process when its parent dies, in whatever way. Linux only; elsewhere a no-op."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # It may have died before we asked.
    if os.getppid() != parent:
        os._exit(1)
