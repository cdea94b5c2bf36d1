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

from mup_megatron.errors import InputError, Terminated
from mup_megatron.json_io import finite
from mup_megatron.search.claims import Claim, Claims
from mup_megatron.search.ladder import MOST_TRIALS
from mup_megatron.search.objective import Objectives, TrialOutcome
from mup_megatron.search.owner import Owner, OwnerWatch
from mup_megatron.search.patience import Patience
from mup_megatron.search.progress import SweepProgress
from mup_megatron.search.results import write_results
from mup_megatron.search.states import States
from mup_megatron.search.stopping import Stop
from mup_megatron.search.storage import FAILURES, open_storage
from mup_megatron.search.stored import open_study
from mup_megatron.search.study import ATTEMPTS, METRICS, REASON, SECONDS, StudyRecord, StudySpec, Trial
from mup_megatron.search.worker import (
    MOST_WORKERS,
    Crashed,
    Finished,
    Interrupted,
    Launch,
    Refused,
    Report,
    TrialJob,
    Worker,
    WorkerDiedError,
    require_count,
)

MAX_ATTEMPTS = 2
"""How often a trial that crashes is run before it is given up."""

INTERRUPT_S = 7.0
"""How long trials may take to keep their state when the sweep is to stop."""

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
    state_folder: Path | None = None,
    heartbeat_s: float = 10.0,
    grace_s: float = 60.0,
    away_s: float = 600.0,
) -> SweepResult:
    """Runs trials until the study holds `n_trials` finished ones, counting those it has already.

    A diverged trial is a finished one. A crashed trial is run a second time, then given up; a later call tries again.
    An InputError in a trial ends the sweep, for what the user gave is wrong for every trial. On Ctrl-C or SIGTERM
    running trials are put back, and KeyboardInterrupt or Terminated leaves this function. A `Resumable` objective's
    trials keep their state first, and go on from it wherever they are run next with the same `state_folder`.

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
        state_folder: gets the state of trials that are stopped, until they end; None: they begin again.
        heartbeat_s: how often this call shows other machines that it is alive.
        grace_s: how long another machine may show nothing before its trials are run again here.
        away_s: how long a storage on a server may be away before this call ends.

    Raises:
        InputError: the storage cannot be used, the study was made with another space or context, a file cannot be
            written, or a trial refused its input. What the study holds stays.
    """
    require_count("--trials", n_trials, MOST_TRIALS)
    require_count("--workers", workers, MOST_WORKERS)
    assert spec.selection is None or n_trials == len(spec.selection.candidates)
    assert spec.ladder is None or (n_trials == spec.ladder.trials and not callable(objective))
    assert spec.ladder is None or len(called) in (0, len(spec.ladder.rungs))
    pool = [Worker(objective, launch, log_folder, state_folder) for _ in range(min(workers, n_trials))]
    owner = Owner.this_process()
    try:
        with (
            _quiet_optuna(),
            Stop().listening() as stop,
            SweepProgress(n_trials, called) as progress,
            open_storage(spec.storage, create=True, patience=Patience(away_s, stop.sleep, progress.say)) as storage,
            _stopped_in_order(stop),
        ):
            study, spec = open_study(spec, storage, n_trials)
            claims = Claims(spec, study, storage, n_trials, owner, OwnerWatch(grace_s))
            files, states = (csv_file, best_file), States(state_folder)
            sweep = _Sweep(claims, pool, progress, stop, states, heartbeat_s=heartbeat_s, files=files)
            return sweep.run(n_trials)
    finally:
        owner.retire()
        for worker in pool:
            worker.close()


class _Sweep:
    """One call's share of a study: its workers, each with a trial that was claimed for it."""

    def __init__(
        self,
        claims: Claims,
        pool: list[Worker],
        progress: SweepProgress,
        stop: Stop,
        states: States,
        *,
        heartbeat_s: float,
        files: _Files,
    ) -> None:
        self._claims = claims
        self._progress = progress
        self._stop = stop
        self._states = states
        self._heartbeat_s = heartbeat_s
        self._files = files
        self._idle = list(pool)
        self._running: dict[Connection, tuple[Worker, Claim]] = {}
        self._next_beat = 0.0
        self._terminated = False
        """Whether a worker left because it was told to."""

    def run(self, n_trials: int) -> SweepResult:
        """Works until every slot has a result or is given up."""
        try:
            self._work(n_trials)
        except KeyboardInterrupt:
            self._progress.say("Stopped. The same command goes on.")
            raise
        finally:
            self._interrupt()
            for worker, _ in self._running.values():
                worker.close()
            self._claims.put_back()
        self._claims.look()
        record = self._claims.record()
        write_results(record, *self._files)
        if self._progress.has_table:
            self._progress.show(record)
        self._states.forget(trial.number for trial in record.trials if trial.finished)
        given_up = tuple(record.trials[number] for number in self._claims.given_up())
        for trial in given_up:
            self._progress.say(f"trial {trial.number} has no result: {trial.reason}. The same command tries again.")
        return SweepResult(record, given_up)

    def _interrupt(self) -> None:
        """Lets the trials that run keep their state, if they can, for as long as there is time."""
        deadline = time.monotonic() + INTERRUPT_S
        for worker, _ in self._running.values():
            if worker.resumable:
                worker.interrupt()
        while waited := [connection for connection, (worker, _) in self._running.items() if worker.resumable]:
            ready = wait(waited, max(0.0, deadline - time.monotonic()))
            if not ready:
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                # What is wrong with one trial, or with the storage, has been said or will be by the next call.
                with contextlib.suppress(InputError, *FAILURES):
                    self._handle(connection)

    def _work(self, n_trials: int) -> None:
        next_look = 0.0
        while True:
            if self._stop.requested:
                raise self._stop.error()
            if self._idle and time.monotonic() >= next_look:
                while self._idle and (claim := self._claims.take()) is not None:
                    self._start(claim)
                if self._idle and not self._running and self._claims.done():
                    return
                next_look = time.monotonic() + POLL_S
            if not self._idle and not self._running:
                if self._terminated:
                    raise Terminated
                raise InputError(
                    f"study {self._claims.record().spec.name!r}: all worker processes were killed; the system may have "
                    "run out of memory. Give the same command again, with fewer --workers."
                )
            waited: list[Connection | int] = [*self._running, self._stop.fileno()]
            for connection in wait(waited, timeout=0.0 if next_look == 0.0 and self._idle else POLL_S):
                if isinstance(connection, Connection) and self._handle(connection):
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
            del self._running[connection]
            if worker.was_terminated():
                self._terminated = True
                self._end(claim, TrialState.WAITING, None, {})
            else:
                self._crashed(claim, "its worker process was killed")
            return True
        match message:
            case Report(step, value):
                self._claims.report(claim, step, value)
                return False
            case Refused(text):
                raise InputError(text)
            case Interrupted(seconds):
                self._end(claim, TrialState.WAITING, None, {SECONDS: claim.seconds + seconds})
            case Finished(outcome, seconds):
                self._finish(claim, outcome, claim.seconds + seconds)
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
        self._states.forget([claim.number])  # it may be what the trial crashes of
        attempts = claim.attempts + 1
        attributes = {ATTEMPTS: attempts, REASON: reason}
        if attempts < MAX_ATTEMPTS:
            self._progress.say(f"trial {claim.number} crashed and is run again: {reason}")
        self._end(claim, TrialState.FAIL if attempts >= MAX_ATTEMPTS else TrialState.WAITING, None, attributes)

    def _end(self, claim: Claim, state: TrialState, loss: float | None, attributes: Mapping[str, Any]) -> None:
        trial = self._claims.end(claim, state, loss, attributes)
        if trial is not None:
            self._states.forget([claim.number])
            record = self._claims.record()
            write_results(record, *self._files)
            self._progress.ended(trial, record, self._claims.settled())


@contextlib.contextmanager
def _stopped_in_order(stop: Stop) -> Iterator[None]:
    """Once a sweep was told to stop nobody waits for a storage that is away, and that is not why it ends."""
    try:
        yield
    except FAILURES:
        if not stop.requested:
            raise
        raise stop.error() from None


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
