"""Runs a study until it holds N finished trials; stopped at any moment, the same call goes on. Not the processes that
run the trials (`worker.py`), nor which trial comes next (`claims.py`).

One process per call holds the storage and decides; its workers run trials and never see the storage. Any number of
calls may work on one study at once, on one machine or, with a database server, on many.

**Why N finished trials are exactly N, with the hyperparameters of an undisturbed run.** Creating a trial is one
transaction in every storage of Optuna, numbers included, and the order of creation gives each trial its slot. A running
trial names its owner. If the owner dies, another takes the *same* trial over. Finishing a trial happens once: a second
result for it, from an owner that only seemed dead, is dropped. Of trials beyond N, made when two calls reach the end
together, none is ever run.
"""

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeAlias

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from mup_megatron.errors import InputError
from mup_megatron.json_io import finite
from mup_megatron.search.claims import Claim, Claims
from mup_megatron.search.owner import Owner, OwnerWatch
from mup_megatron.search.progress import SweepProgress
from mup_megatron.search.report import write_results
from mup_megatron.search.storage import open_storage
from mup_megatron.search.stored import open_study
from mup_megatron.search.study import ATTEMPTS, METRICS, MOST_TRIALS, REASON, SECONDS, StudyRecord, StudySpec, Trial
from mup_megatron.search.worker import (
    Crashed,
    Finished,
    Launch,
    Objectives,
    Refused,
    Report,
    TrialJob,
    TrialOutcome,
    Worker,
    WorkerDiedError,
)

MAX_ATTEMPTS = 2
"""How often a trial that crashes is run before it is given up."""

MOST_WORKERS = 1024
"""Of one call: each is a process, with one more for the trial that it runs."""

POLL_S = 1.0
"""How often to look for something to do while others run the last trials."""

_Files: TypeAlias = tuple[Path | None, Path | None]
"""Where all trials, and the best one, are kept up to date."""


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep."""

    record: StudyRecord
    given_up: tuple[Trial, ...]
    """The last failed trial of each slot that has no result. The same call runs them once more."""

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials of the study, by number; failed ones that were run again later are among them."""
        return self.record.trials

    @property
    def best(self) -> Trial | None:
        """The complete trial with the lowest loss."""
        return self.record.best


def run_sweep(
    spec: StudySpec,
    objective: Objectives,
    n_trials: int,
    *,
    called: Sequence[str] = (),
    workers: int = 1,
    launch: Launch = "fork",
    csv_file: Path | None = None,
    best_file: Path | None = None,
    log_folder: Path | None = None,
    heartbeat_s: float = 10.0,
    grace_s: float = 60.0,
) -> SweepResult:
    """Runs trials until the study holds `n_trials` finished ones, counting those it has already.

    A diverged trial is a finished one. A crashed trial is run a second time, then given up; a later call tries again.
    An InputError in a trial ends the sweep, for what the user gave is wrong for every trial. On Ctrl-C or SIGTERM
    running trials are put back, and KeyboardInterrupt leaves this function.

    Args:
        spec: the study, made if it does not exist. One that exists keeps the trials that were selected for it.
        objective: runs one trial. Import all it needs before this call, so that trials are forked with it; but compute
            nothing with it, for the threads that numerical libraries then start do not survive a fork. Of a study with
            a ladder, one for each rung.
        n_trials: the size of the search, all calls together. A larger number than before extends it; a study of the
            best trials of another has as many as were selected, and one with a ladder those of its rungs.
        called: what to call the rungs of a ladder where progress is shown.
        workers: how many trials to run at a time.
        launch: `fork` runs trials in forks of a process that has imported everything, `spawn` in fresh processes.
        csv_file: gets all trials of the study, kept up to date.
        best_file: gets the best trial as JSON, kept up to date.
        log_folder: gets what trials print, a file for each; None sends it to standard error.
        heartbeat_s: how often this call shows other machines that it is alive.
        grace_s: how long another machine may show nothing before its trials are run again here.

    Raises:
        InputError: the storage cannot be used, the study was made with another space or context, a file cannot be
            written, or a trial refused its input. What the study holds stays.
    """
    for flag, value, most in (("--trials", n_trials, MOST_TRIALS), ("--workers", workers, MOST_WORKERS)):
        if value < 1:
            raise InputError(f"{flag} {value}: must be at least 1.")
        if value > most:
            raise InputError(f"{flag} {value}: must be at most {most}. Give a smaller number.")
    assert spec.selection is None or n_trials == len(spec.selection.candidates)
    assert spec.ladder is None or (n_trials == spec.ladder.trials and not callable(objective))
    assert spec.ladder is None or len(called) in (0, len(spec.ladder.rungs))
    pool = [Worker(objective, launch, log_folder) for _ in range(min(workers, n_trials))]
    owner = Owner.this_process()
    try:
        with (
            _quiet_optuna(),
            _sigterm_as_ctrl_c(),
            open_storage(spec.storage, create=True) as storage,
            SweepProgress(n_trials, called) as progress,
        ):
            study, spec = open_study(spec, storage, n_trials)
            claims = Claims(spec, study, storage, n_trials, owner, OwnerWatch(grace_s))
            sweep = _Sweep(claims, pool, progress, heartbeat_s=heartbeat_s, files=(csv_file, best_file))
            return sweep.run(n_trials)
    finally:
        owner.retire()
        for worker in pool:
            worker.close()


class _Sweep:
    """One call's share of a study: its workers, each with a trial that was claimed for it."""

    def __init__(
        self, claims: Claims, pool: list[Worker], progress: SweepProgress, *, heartbeat_s: float, files: _Files
    ) -> None:
        self._claims = claims
        self._progress = progress
        self._heartbeat_s = heartbeat_s
        self._files = files
        self._idle = list(pool)
        self._running: dict[Connection, tuple[Worker, Claim]] = {}
        self._next_beat = 0.0

    def run(self, n_trials: int) -> SweepResult:
        """Works until every slot has a result or is given up."""
        try:
            self._work(n_trials)
        except KeyboardInterrupt:
            self._progress.say("Stopped. The same command goes on.")
            raise
        finally:
            for worker, _ in self._running.values():
                worker.close()
            self._claims.put_back()
        self._claims.look()
        record = self._claims.record()
        write_results(record, *self._files)
        if self._progress.has_table:
            self._progress.show(record)
        given_up = tuple(record.trials[number] for number in self._claims.given_up())
        for trial in given_up:
            self._progress.say(f"trial {trial.number} has no result: {trial.reason}. The same command tries again.")
        return SweepResult(record, given_up)

    def _work(self, n_trials: int) -> None:
        next_look = 0.0
        while True:
            if self._idle and time.monotonic() >= next_look:
                while self._idle and (claim := self._claims.take()) is not None:
                    self._start(claim)
                if self._idle and not self._running and self._claims.done():
                    return
                next_look = time.monotonic() + POLL_S
            if not self._idle and not self._running:
                raise InputError(
                    f"study {self._claims.record().spec.name!r}: all worker processes were killed; the system may have "
                    "run out of memory. Give the same command again, with fewer --workers."
                )
            for connection in wait(list(self._running), timeout=0.0 if next_look == 0.0 and self._idle else POLL_S):
                assert isinstance(connection, Connection)
                if self._handle(connection):
                    next_look = 0.0
            if time.monotonic() >= self._next_beat:
                self._next_beat = time.monotonic() + self._heartbeat_s
                self._claims.show_alive()
            if self._progress.has_table:
                self._progress.show(self._claims.record())

    def _start(self, claim: Claim) -> None:
        worker = self._idle.pop()
        parameters = self._claims.parameters(claim)
        self._running[worker.connection] = (worker, claim)
        with contextlib.suppress(WorkerDiedError):  # which shows on receiving
            worker.submit(TrialJob(claim.number, parameters, claim.rung))

    def _handle(self, connection: Connection) -> bool:
        """Acts on a worker's message. Returns whether it is free for another trial, or gone."""
        worker, claim = self._running[connection]
        try:
            message = worker.receive()
        except WorkerDiedError:
            self._crashed(claim, "its worker process was killed")
            del self._running[connection]
            return True
        match message:
            case Report(step, value):
                self._claims.report(claim, step, value)
                return False
            case Refused(text):
                raise InputError(text)
            case Finished(outcome, seconds):
                self._finish(claim, outcome, seconds)
            case Crashed(reason):
                self._crashed(claim, reason)
        del self._running[connection]
        self._idle.append(worker)
        return True

    def _finish(self, claim: Claim, outcome: TrialOutcome, seconds: float) -> None:
        attributes: dict[str, Any] = {SECONDS: seconds}
        if outcome.metrics:
            attributes[METRICS] = finite(dict(outcome.metrics))
        if outcome.diverged:
            self._end(claim, TrialState.PRUNED, None, {**attributes, REASON: outcome.reason})
        else:
            self._end(claim, TrialState.COMPLETE, outcome.loss, attributes)

    def _crashed(self, claim: Claim, reason: str) -> None:
        """Puts a crashed trial back, or gives it up."""
        attempts = claim.attempts + 1
        attributes = {ATTEMPTS: attempts, REASON: reason}
        if attempts < MAX_ATTEMPTS:
            self._progress.say(f"trial {claim.number} crashed and is run again: {reason}")
        self._end(claim, TrialState.FAIL if attempts >= MAX_ATTEMPTS else TrialState.WAITING, None, attributes)

    def _end(self, claim: Claim, state: TrialState, loss: float | None, attributes: Mapping[str, Any]) -> None:
        trial = self._claims.end(claim, state, loss, attributes)
        if trial is not None:
            record = self._claims.record()
            write_results(record, *self._files)
            self._progress.ended(trial, record, self._claims.settled())


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Optuna's own lines per trial would repeat ours."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Batch systems end a job with SIGTERM; it is to stop as cleanly as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
