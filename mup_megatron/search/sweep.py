"""Runs a study until it holds N finished trials; stopped at any moment, the same call goes on. Not the processes that
run the trials (`worker.py`), and not what is in a study (`study.py`).

One process per call holds the storage and decides; its workers run trials and never see the storage. Any number of
calls may work on one study at once, on one machine or, with a database server, on many.

**Why N finished trials are exactly N, with the hyperparameters of an undisturbed run.** Creating a trial is one
transaction in every storage of Optuna, numbers included, and the order of creation gives each trial its slot. A running
trial names its owner. If the owner dies, another takes the *same* trial over. Finishing a trial happens once: a second
result for it, from an owner that only seemed dead, is dropped. Of trials beyond N, made when two calls reach the end
together, none is ever run.
"""

import contextlib
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mup_megatron.errors import InputError
from mup_megatron.search.owner import Owner, Watch
from mup_megatron.search.report import Progress, plain, write_results
from mup_megatron.search.storage import FAILURES, Storage, open_storage
from mup_megatron.search.study import (
    ATTEMPTS,
    METRICS,
    MOST_TRIALS,
    OWNER,
    REASON,
    RETRY_OF,
    SECONDS,
    SIZE,
    SOURCE,
    SPEC,
    StudyRecord,
    StudySpec,
    Trial,
    reading,
    require_sound,
    size_of,
    slots_of,
    spec_of,
    trials_of,
)
from mup_megatron.search.worker import (
    Crashed,
    Finished,
    Job,
    Launch,
    Objective,
    Outcome,
    Refused,
    Report,
    Worker,
    WorkerDiedError,
)
from mup_megatron.validation import brief

MAX_ATTEMPTS = 2
"""How often a trial that crashes is run before it is given up."""

MOST_WORKERS = 1024
"""Of one call: each is a process, with one more for the trial that it runs."""

SHOWN_DIFFERENCES = 5

SHOWN_ENTRIES = 10
"""A list that is longer is not written out where it differs."""

POLL_S = 1.0
"""How often to look for something to do while others run the last trials."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has come to."""

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
    objective: Objective,
    n_trials: int,
    *,
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
            nothing with it, for the threads that numerical libraries then start do not survive a fork.
        n_trials: the size of the search, all calls together. A larger number than before extends it; a study of the
            best trials of another has as many as were selected.
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
    pool = [Worker(objective, launch, log_folder) for _ in range(min(workers, n_trials))]
    owner = Owner.this_process()
    try:
        with (
            _quiet_optuna(),
            _sigterm_as_ctrl_c(),
            open_storage(spec.storage, create=True) as storage,
            Progress(n_trials) as progress,
        ):
            study, spec = _open_study(spec, storage, n_trials)
            sweep = _Sweep(
                spec=spec,
                study=study,
                storage=storage,
                n_trials=n_trials,
                pool=pool,
                owner=owner,
                watch=Watch(grace_s),
                heartbeat_s=heartbeat_s,
                csv_file=csv_file,
                best_file=best_file,
                progress=progress,
            )
            return sweep.run()
    finally:
        owner.retire()
        for worker in pool:
            worker.close()


def _open_study(spec: StudySpec, storage: Storage, n_trials: int) -> tuple[optuna.Study, StudySpec]:
    """The study, made or found, and the same as before in all that must not change; and its spec as it is recorded."""
    with storage.lock(), reading(storage, spec.name):
        study = optuna.create_study(
            study_name=spec.name, storage=storage.backend, direction="minimize", load_if_exists=True
        )
        if study.directions != [StudyDirection.MINIMIZE]:
            raise InputError(
                f"{storage.label}: study {spec.name!r} is no minimisation. Choose another name with --study."
            )
        # Trials before settings: on a database server another call may be making both, in the other order.
        trials = study.get_trials(deepcopy=False)
        if SPEC not in study.user_attrs:
            if trials:
                raise InputError(
                    f"{storage.label}: study {spec.name!r} was not made by a sweep. Choose another name with --study."
                )
            study.set_user_attr(SPEC, spec.recorded())
        # Read back, for on a database server another call may have written at the same time.
        attributes = study.user_attrs
        found = spec_of(attributes[SPEC], storage, name=spec.name, storage_url=spec.storage)
        require_sound(trials, found, storage)
        size = size_of(attributes, storage, spec.name, 0)
        spec = _as_selected(spec, found)
        differences = _differences(attributes[SPEC], spec.recorded())
        if not differences and n_trials > size:
            study.set_user_attr(SIZE, n_trials)
    if differences:
        more = f"; and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise InputError(
            f"{storage.label}: study {spec.name!r} was made with other settings: "
            f"{'; '.join(differences[:SHOWN_DIFFERENCES])}{more}. Give those of the study to go on with it, or another "
            "name with --study. Nothing was changed."
        )
    return study, spec


def _as_selected(spec: StudySpec, recorded: StudySpec) -> StudySpec:
    """The spec with the trials that the study has recorded, if it is one of as many trials of the same other study.

    That one may go on and have other best trials by now, also while two calls make this study at the same moment.
    """
    selection = recorded.selection
    if spec.selection is None or selection is None:
        return spec
    same = (selection.study, len(selection.candidates)) == (spec.selection.study, len(spec.selection.candidates))
    return replace(spec, selection=selection) if same else spec


def _differences(recorded: Any, wanted: Any, key: str = "") -> list[str]:
    """What differs between two JSON values, one sentence for each difference."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        missing = object()
        found = []
        for name in [*recorded, *(name for name in wanted if name not in recorded)]:
            inner = f"{key}.{name}" if key else name
            before, now = recorded.get(name, missing), wanted.get(name, missing)
            if before is missing:
                found.append(f"{inner} is new")
            elif now is missing:
                found.append(f"{inner} is missing now")
            else:
                found.extend(_differences(before, now, inner))
        return found
    if isinstance(recorded, list) and isinstance(wanted, list) and recorded != wanted:
        if len(recorded) != len(wanted):
            return [f"{key} had {len(recorded)} entries and has {len(wanted)}"]
        if len(recorded) > SHOWN_ENTRIES:
            return [f"{key} has other entries"]
    if recorded == wanted:
        return []
    return [f"{brief(key, 60)} was {brief(repr(recorded), 80)} and is {brief(repr(wanted), 80)}"]


@dataclass(frozen=True)
class _Claim:
    """A trial that this call runs."""

    trial_id: int
    number: int
    slot: int
    attempts: int
    """How often it has crashed."""


class _Sweep:
    """One call's share of a study."""

    def __init__(
        self,
        *,
        spec: StudySpec,
        study: optuna.Study,
        storage: Storage,
        n_trials: int,
        pool: list[Worker],
        owner: Owner,
        watch: Watch,
        heartbeat_s: float,
        csv_file: Path | None,
        best_file: Path | None,
        progress: Progress,
    ) -> None:
        self._spec = spec
        self._study = study
        self._backend = storage.backend
        self._size = int(study.user_attrs[SIZE])
        self._study_id = storage.backend.get_study_id_from_name(spec.name)
        self._storage = storage
        self._n_trials = n_trials
        self._owner = owner
        self._watch = watch
        self._heartbeat_s = heartbeat_s
        self._files = (csv_file, best_file)
        self._progress = progress
        self._idle = list(pool)
        self._running: dict[Connection, tuple[Worker, _Claim]] = {}
        self._beat = 0
        self._next_beat = 0.0
        self._trials: list[FrozenTrial] = []
        """All trials of the study at the last look."""
        self._slots: dict[int, list[FrozenTrial]] = {}
        """Slot → its trials, by number, at the last look."""
        self._look()
        # Slots that earlier calls gave up, each to be tried once more by this one.
        self._to_retry = {slot for slot, trials in self._slots.items() if _failed(trials)}

    def run(self) -> SweepResult:
        """Works until every slot has a result or is given up."""
        try:
            self._work()
        except KeyboardInterrupt:
            self._progress.say("Stopped. The same command goes on.")
            raise
        finally:
            for worker, _ in self._running.values():
                worker.close()
            self._put_back()
        self._look()
        record = self._record()
        write_results(record, *self._files)
        lost = [trials[-1] for slot, trials in self._slots.items() if slot < self._n_trials and _failed(trials)]
        given_up = tuple(record.trials[trial.number] for trial in lost)
        for trial in given_up:
            self._progress.say(f"trial {trial.number} has no result: {trial.reason}. The same command tries again.")
        return SweepResult(record, given_up)

    def _work(self) -> None:
        next_look = 0.0
        while True:
            if self._idle and time.monotonic() >= next_look:
                while self._idle and (claim := self._claim()) is not None:
                    self._start(claim)
                if self._idle and not self._running and self._settled() == self._n_trials:
                    return
                next_look = time.monotonic() + POLL_S
            if not self._idle and not self._running:
                raise InputError(
                    f"study {self._spec.name!r}: all worker processes were killed; the system may have run out of "
                    "memory. Give the same command again, with fewer --workers."
                )
            for connection in wait(list(self._running), timeout=0.0 if next_look == 0.0 and self._idle else POLL_S):
                assert isinstance(connection, Connection)
                if self._handle(connection):
                    next_look = 0.0
            self._show_alive()
            if self._progress.has_bar:
                self._progress.show(self._settled(), len(self._running), self._record().best)

    # What is in the study

    def _look(self) -> None:
        """Reads the study. Between two looks this call works with what it saw."""
        self._trials = self._study.get_trials(deepcopy=False)
        self._slots = {}
        for trial, slot in zip(self._trials, slots_of(self._trials), strict=True):
            self._slots.setdefault(slot, []).append(trial)

    def _record(self) -> StudyRecord:
        return StudyRecord(self._spec, trials_of(self._trials), self._size)

    def _settled(self) -> int:
        """How many of the slots need nothing more from this call."""
        return sum(
            slot < self._n_trials and (_finished(trials) or (_failed(trials) and slot not in self._to_retry))
            for slot, trials in self._slots.items()
        )

    # Which trial to run

    def _claim(self) -> _Claim | None:
        """Takes a trial: a waiting one, one whose owner is dead, a new one, or a further attempt at one given up."""
        with self._storage.lock():
            self._look()
            for slot in range(self._n_trials):
                if slot not in self._slots:
                    return self._create({})
                trials = self._slots[slot]
                if _finished(trials) or _failed(trials):
                    continue
                trial = next(trial for trial in trials if trial.state != TrialState.FAIL)
                if self._take(trial):
                    return _Claim(trial._trial_id, trial.number, slot, trial.user_attrs.get(ATTEMPTS, 0))
            for slot in sorted(slot for slot in self._to_retry if slot < self._n_trials):
                self._to_retry.remove(slot)
                if _failed(self._slots[slot]):
                    return self._create({RETRY_OF: slot})
        return None

    def _take(self, trial: FrozenTrial) -> bool:
        """Becomes the owner of a trial that waits or whose owner is dead; False if that is not so any more."""
        try:
            if trial.state == TrialState.WAITING:
                # The owner first: a running trial without one could be nobody's for ever.
                self._own(trial._trial_id)
                return self._backend.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            if trial.number in {claim.number for _, claim in self._running.values()}:
                return False
            if not self._watch.is_dead(trial.number, trial.user_attrs.get(OWNER)):
                return False
            self._own(trial._trial_id)
            return True
        except UpdateFinishedTrialError:
            return False

    def _create(self, attributes: Mapping[str, Any]) -> _Claim | None:
        """A new trial, for the next slot unless said otherwise; None if a call elsewhere has been faster."""
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING, user_attrs={OWNER: self._owner.record(self._beat), **attributes}
        )
        trial_id = self._backend.create_new_trial(self._study_id, template)
        self._look()
        slot, trial = next(
            (slot, trial) for slot, trials in self._slots.items() for trial in trials if trial._trial_id == trial_id
        )
        if slot >= self._n_trials:
            # It stays for a larger search.
            self._backend.set_trial_state_values(trial_id, TrialState.WAITING)
            return None
        if any(other.number < trial.number and other.state != TrialState.FAIL for other in self._slots[slot]):
            self._backend.set_trial_user_attr(trial_id, REASON, "not run: another process has tried this slot again")
            self._backend.set_trial_state_values(trial_id, TrialState.FAIL)
            return None
        return _Claim(trial_id, trial.number, slot, attempts=0)

    def _own(self, trial_id: int) -> None:
        self._backend.set_trial_user_attr(trial_id, OWNER, self._owner.record(self._beat))

    def _show_alive(self) -> None:
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + self._heartbeat_s
        self._beat += 1
        for _, claim in self._running.values():
            # Another call that took this one for dead may have finished the trial.
            with contextlib.suppress(UpdateFinishedTrialError):
                self._own(claim.trial_id)

    def _put_back(self) -> None:
        """Lets the trials that were running be taken by the next call at once. Without it they count as orphans."""
        # If the storage is what failed, the next call finds them as orphans.
        with contextlib.suppress(UpdateFinishedTrialError, *FAILURES), self._storage.lock():
            for _, claim in self._running.values():
                trial = self._backend.get_trial(claim.trial_id)
                if trial.user_attrs[OWNER]["token"] == self._owner.token and not trial.state.is_finished():
                    self._backend.set_trial_state_values(claim.trial_id, TrialState.WAITING)

    # Running it

    def _start(self, claim: _Claim) -> None:
        worker = self._idle.pop()
        self._study.sampler = _sampler(self._spec, claim.slot)
        if self._spec.selection is not None:
            chosen = self._spec.selection.candidates[claim.slot]
            source = {"study": self._spec.selection.study, "trial": chosen.trial, "loss": chosen.loss}
            self._backend.set_trial_user_attr(claim.trial_id, SOURCE, source)
        trial = optuna.trial.Trial(self._study, claim.trial_id)
        parameters = {
            name: trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
            for name, dimension in self._spec.space.dimensions.items()
        }
        self._running[worker.connection] = (worker, claim)
        with contextlib.suppress(WorkerDiedError):  # which shows on receiving
            worker.submit(Job(claim.number, parameters))

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
                with contextlib.suppress(UpdateFinishedTrialError):
                    self._backend.set_trial_intermediate_value(claim.trial_id, step, value)
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

    def _finish(self, claim: _Claim, outcome: Outcome, seconds: float) -> None:
        attributes: dict[str, Any] = {SECONDS: seconds}
        if outcome.metrics:
            attributes[METRICS] = plain(dict(outcome.metrics))
        if outcome.diverged:
            self._end(claim, TrialState.PRUNED, None, {**attributes, REASON: outcome.reason})
        else:
            self._end(claim, TrialState.COMPLETE, outcome.loss, attributes)

    def _crashed(self, claim: _Claim, reason: str) -> None:
        """Puts a crashed trial back, or gives it up."""
        attempts = claim.attempts + 1
        attributes = {ATTEMPTS: attempts, REASON: reason}
        if attempts < MAX_ATTEMPTS:
            self._progress.say(f"trial {claim.number} crashed and is run again: {reason}")
        self._end(claim, TrialState.FAIL if attempts >= MAX_ATTEMPTS else TrialState.WAITING, None, attributes)

    def _end(self, claim: _Claim, state: TrialState, loss: float | None, attributes: Mapping[str, Any]) -> None:
        """Records what became of a trial, unless another call has done so."""
        with self._storage.lock():
            try:
                for key, value in attributes.items():
                    self._backend.set_trial_user_attr(claim.trial_id, key, value)
                if state == TrialState.WAITING:
                    self._backend.set_trial_state_values(claim.trial_id, state)
                else:
                    self._study.tell(claim.number, loss, state, skip_if_finished=True)
            except UpdateFinishedTrialError:
                return
        if state != TrialState.WAITING:
            self._look()
            record = self._record()
            write_results(record, *self._files)
            self._progress.ended(record.trials[claim.number], self._settled())


def _finished(trials: list[FrozenTrial]) -> bool:
    return any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)


def _failed(trials: list[FrozenTrial]) -> bool:
    return all(trial.state == TrialState.FAIL for trial in trials)


class _SlotSampler(optuna.samplers.BaseSampler):
    """The slot's hyperparameters, whichever trials came before."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = values

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        assert isinstance(param_distribution, FloatDistribution)
        return self._values[param_name]


def _sampler(spec: StudySpec, slot: int) -> optuna.samplers.BaseSampler:
    if spec.sampler != "tpe":
        return _SlotSampler(spec.at(slot))
    seed = random.Random(f"{spec.seed}/{slot}").getrandbits(32)
    # Trials that are still running count as bad ones, so that workers do not all try the same place.
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


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
