"""Processes that run trials: import once, then fork a child per trial. Knows nothing of studies, storages or Optuna.

    this process  ──fork──▶  worker  ──fork──▶  trial 0, trial 1, …   (one at a time)

The worker is forked before this process opens a database or starts a thread, and it does nothing but fork, listen and
wait. So every trial begins in a process that has all modules imported, a single thread, and no connection that another
process uses. Each of the three dies with the one above it, also by `kill -9` (on Linux).

What a trial starts on its own (data loader processes, torchrun) is the trial's to end.

SIGTERM, to a worker or to a trial, is a request: a trial that can go on elsewhere keeps its state and leaves, and a
worker that was told itself leaves after it. A trial that cannot is left alone, for the process above to end.
"""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Literal, TypeAlias, cast

from mup_megatron.errors import InputError
from mup_megatron.search.objective import Interruption, Objectives, ReportFn, Resumable, TrialOutcome, can_resume
from mup_megatron.search.states import States

Launch: TypeAlias = Literal["fork", "spawn"]
"""The way a trial's process begins: forked from one that has imported everything, or fresh, importing it all again."""

MOST_WORKERS = 1024
"""At a time: each is a process, with one more for the trial that it runs."""

LEAVE_S = 10.0
"""How long a trial that has given its result may take to leave before it is killed."""

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a worker that was told to leave."""


def require_count(flag: str, value: int, most: int) -> None:
    """Raises InputError unless what a flag says is from 1 to `most`."""
    if value < 1:
        raise InputError(f"{flag} {value}: must be at least 1.")
    if value > most:
        raise InputError(f"{flag} {value}: must be at most {most}. Give a smaller number.")


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


@dataclass(frozen=True)
class Interrupted:
    """The trial left as requested, after so many seconds. If it kept its state it goes on from there."""

    seconds: float


Result: TypeAlias = Finished | Crashed | Refused | Interrupted
Message: TypeAlias = Report | Result


class WorkerDiedError(Exception):
    """The worker process itself is gone, and its trial with it."""


class Worker:
    """A process that runs one trial after the other: for each, any number of `Report`s, then exactly one `Result`."""

    def __init__(
        self,
        objective: Objectives,
        launch: Launch = "fork",
        log_folder: Path | None = None,
        state_folder: Path | None = None,
    ) -> None:
        """Forks the worker. Call before this process opens a storage or starts a thread.

        Args:
            objective: runs one trial; of several, the one that a job names.
            launch: how each trial's process begins.
            log_folder: receives what each trial prints, as `trial-00000.log`; None sends it to standard error.
            state_folder: receives the state of each trial that is interrupted, as `trial-00000`; None: no trial of this
                worker can be.
        """
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.resumable = state_folder is not None and can_resume(objective)
        """Whether SIGTERM has a trial keep its state."""
        setting = _Setting(objective, launch, log_folder, state_folder if self.resumable else None)
        self._process = context.Process(target=_serve, args=(theirs, setting, os.getpid()), name="trial worker")
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

    def interrupt(self) -> None:
        """Has the worker leave, and the trial that it runs keep its state first. Needs `resumable`."""
        assert self.resumable
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid or 0, signal.SIGTERM)

    def was_terminated(self) -> bool:
        """Says if a worker that is gone, or is about to be, left because it was told to."""
        self._process.join(LEAVE_S)
        return self._process.exitcode in (TERMINATED, -signal.SIGTERM)

    def close(self) -> None:
        """Ends the worker and the trial that it runs, and waits until the worker is gone. May be called again."""
        if self.connection.closed:
            return
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()


@dataclass(frozen=True)
class _Setting:
    """The settings that all trials of a worker have in common."""

    objective: Objectives
    launch: Launch
    log_folder: Path | None
    state_folder: Path | None


class _Requests:
    """SIGTERM to a worker: handed on to the trial that runs, after which the worker leaves; without one it leaves."""

    def __init__(self) -> None:
        self.told = False
        self._busy = False
        self._trial: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Acts on the signal."""
        self.told = True
        if not self._busy:
            sys.exit(TERMINATED)
        if self._trial is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._trial, number)

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """For the time of a job."""
        self._busy = True
        yield
        self._busy, self._trial = False, None
        if self.told:
            sys.exit(TERMINATED)

    def start(self, process: multiprocessing.process.BaseProcess) -> None:
        """Starts the trial's process. A signal in between waits until both can handle it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            process.start()
            self._trial = process.pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _serve(connection: Connection, setting: _Setting, parent: int) -> None:
    """The worker's life: runs jobs until the other end hangs up."""
    _die_with(parent)
    # Ctrl-C and a batch system's SIGTERM reach every process. The one above decides what they mean, unless a trial can
    # keep its state: then there is no time to lose.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = _Requests()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if setting.state_folder is None else requests.handle)
    while True:
        try:
            job: TrialJob = connection.recv()
        except EOFError:
            return
        with requests.during():
            connection.send(_run(job, setting, requests, connection.send))


def _run(job: TrialJob, setting: _Setting, requests: _Requests, send: Callable[[Message], None]) -> Result:
    """Runs one trial in a process of its own; passes its reports on, whole, and tells what became of it."""
    context = multiprocessing.get_context(setting.launch)
    ours, theirs = context.Pipe(duplex=False)
    # context.Process exists for every start method; the stubs' common base class does not say so.
    process = context.Process(  # type: ignore[attr-defined]
        target=_trial, args=(theirs, job, setting, os.getpid()), name=f"trial {job.number}"
    )
    try:
        requests.start(process)
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


def _trial(connection: Connection, job: TrialJob, setting: _Setting, parent: int) -> None:
    """The trial's life, in its own process."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not ignored here: what a trial starts inherits it, and must be able to be terminated.
    requested = _until_sigterm() if setting.state_folder is not None else None
    if requested is None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    started = time.perf_counter()

    def report(step: int, loss: float) -> None:
        connection.send(Report(int(step), float(loss)))

    result: Result
    outcome: TrialOutcome | None
    try:
        _redirect_output(job.number, setting.log_folder)
        run = setting.objective if callable(setting.objective) else setting.objective[job.rung]
        if requested is None or setting.state_folder is None:
            outcome = run(job.parameters, report)
        else:
            interruption = Interruption(job.number, States(setting.state_folder).of(job.number), requested)
            outcome = _resumed(cast(Resumable, run), job.parameters, report, interruption)
    except Exception as error:  # whatever a trial raises is the trial's result
        if requested is not None and requested():
            traceback.print_exc()  # there was no time, or no place, to keep its state: it begins again
            result = Interrupted(time.perf_counter() - started)
        elif isinstance(error, InputError):
            result = Refused(str(error))
        else:
            traceback.print_exc()
            result = Crashed(f"{type(error).__name__}: {error}".strip())
    else:
        seconds = time.perf_counter() - started
        result = Interrupted(seconds) if outcome is None else Finished(outcome.checked(), seconds)
    connection.send(result)


def _resumed(
    run: Resumable, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
) -> TrialOutcome | None:
    """Runs a trial; from its beginning if the state that was left of it is of no use."""
    left = interruption.folder.exists()
    try:
        return run.resume(parameters, report, interruption)
    except InputError as error:
        if not left or interruption.requested():
            raise
        print(f"what was kept of this trial cannot be used, so it begins again: {error}", file=sys.stderr)
        shutil.rmtree(interruption.folder, ignore_errors=True)
        return run.resume(parameters, report, interruption)


def _until_sigterm() -> Callable[[], bool]:
    """Returns what says if this process was sent SIGTERM. Processes that it forks are terminated by it as ever."""
    own, requested = os.getpid(), False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        if os.getpid() != own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, handle)
    return lambda: requested


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
