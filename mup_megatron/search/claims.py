"""The trials of a study that a call runs: taken so that no slot is run twice at a time, put back when it stops.

Every method that changes the study may meet another call that has been faster; it then leaves what that one did.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from mup_megatron.search.owner import Owner, OwnerWatch
from mup_megatron.search.sampler import given, sampler_of
from mup_megatron.search.storage import FAILURES, Storage
from mup_megatron.search.study import (
    ATTEMPTS,
    OWNER,
    REASON,
    RETRY_OF,
    SECONDS,
    SIZE,
    SLOT,
    SOURCE,
    StudyRecord,
    StudySpec,
    Trial,
    slots_of,
    trials_of,
)

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Claim:
    """A trial that this call runs."""

    trial_id: int
    number: int
    slot: int
    rung: int
    attempts: int
    """How often it has crashed."""
    seconds: float
    """How long it has run before, as far as it was stopped in order."""


@dataclass
class Claims:
    """The trials of a study as one call saw them last, and those among them that it runs."""

    spec: StudySpec
    study: optuna.Study
    storage: Storage
    n_trials: int
    """The number of slots that are to be filled, of a study without a ladder."""
    owner: Owner
    watch: OwnerWatch

    def __post_init__(self) -> None:
        """Reads the study."""
        self._backend = self.storage.backend
        self._size = int(self.study.user_attrs[SIZE])
        self._study_id = self._backend.get_study_id_from_name(self.spec.name)
        self._beat = 0
        self._outages = self.storage.patience.outages
        self._held: dict[int, Claim] = {}
        """Number → the claims that have not ended."""
        self._to_retry: set[int] = set()
        """Slots that earlier calls gave up, each to be tried once more by this one."""
        self.look()
        self._to_retry = {slot for slot in self._wanted if slot in self._slots and _failed(self._slots[slot])}
        self.look()

    # ---- what is in the study

    def look(self) -> None:
        """Reads the study. Between two looks this call works with what it saw."""
        self._trials = self.study.get_trials(deepcopy=False)
        if self._outages != self.storage.patience.outages:
            self._outages = self.storage.patience.outages
            self.watch.begin_again()
        self._slots: dict[int, list[FrozenTrial]] = {}
        for trial, slot in zip(self._trials, slots_of(self._trials), strict=True):
            self._slots.setdefault(slot, []).append(trial)
        self._results = {
            slot: _loss(trials)
            for slot, trials in self._slots.items()
            if _finished(trials) or (_failed(trials) and slot not in self._to_retry)
        }
        ladder = self.spec.ladder
        self._wanted: Sequence[int] = (
            range(self.n_trials) if ladder is None else ladder.wanted(self._results, self._slots)
        )

    def record(self) -> StudyRecord:
        """Returns the study as it was at the last look."""
        return StudyRecord(self.spec, trials_of(self._trials), self._size)

    def settled(self) -> int:
        """Counts the slots that need nothing more from this call."""
        return sum(slot in self._results for slot in self._wanted)

    def done(self) -> bool:
        """True if no slot needs anything more from this call, now or later."""
        return self.settled() == len(self._wanted)

    def given_up(self) -> list[int]:
        """Lists the number of the last failed trial of each slot that has no result."""
        return [
            self._slots[slot][-1].number for slot in self._wanted if slot in self._slots and _failed(self._slots[slot])
        ]

    # ---- taking a trial

    def take(self) -> Claim | None:
        """Takes a trial: a waiting one, one whose owner is dead, a new one, or a further attempt at one given up."""
        with self.storage.lock():
            claim = self._next()
        if claim is not None:
            self._held[claim.number] = claim
        return claim

    def _next(self) -> Claim | None:
        self.look()
        for slot in self._wanted:
            if slot not in self._slots:
                return self._create({} if self.spec.ladder is None else {SLOT: slot})
            trials = self._slots[slot]
            if _finished(trials) or _failed(trials):
                continue
            trial = next(trial for trial in trials if trial.state != TrialState.FAIL)
            if self._take_over(trial):
                return self._claim(trial, slot)
        for slot in sorted(self._to_retry):
            self._to_retry.remove(slot)
            if _failed(self._slots[slot]):
                return self._create({RETRY_OF if self.spec.ladder is None else SLOT: slot})
        return None

    def _take_over(self, trial: FrozenTrial) -> bool:
        """Becomes the owner of a trial that waits or whose owner is dead; False if that is not so any more."""
        try:
            if trial.state == TrialState.WAITING:
                # The owner first: a running trial without one could be nobody's for ever.
                self._own(trial._trial_id)
                return self._backend.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            if trial.number in self._held or not self._is_orphan(trial):
                return False
            if self.storage.excludes:
                self._own(trial._trial_id)
                return True
            if self._backend.get_trial(trial._trial_id).user_attrs.get(OWNER) != trial.user_attrs.get(OWNER):
                return False  # another has just taken it
            self._own(trial._trial_id)
            self.storage.settle()  # of those that take it together, the last to write has it
            return self._is_own(trial._trial_id)
        except UpdateFinishedTrialError:
            return False

    def _is_orphan(self, trial: FrozenTrial) -> bool:
        """Says if nobody runs a running trial any more."""
        owner = trial.user_attrs.get(OWNER)
        if owner is not None and owner["token"] == self.owner.token:
            # This call does not know of it: the storage went away when it was created or taken. Or another call has it
            # and has not shown so yet, both having taken it at once.
            return self.watch.stands_still(trial.number, owner)
        return self.watch.is_dead(trial.number, owner)

    def _is_own(self, trial_id: int) -> bool:
        """Says if the storage has this call as the owner of a trial."""
        owner = self._backend.get_trial(trial_id).user_attrs.get(OWNER)
        return owner is not None and owner["token"] == self.owner.token

    def _create(self, attributes: Mapping[str, Any]) -> Claim | None:
        """Makes a trial, for the next slot unless attributes say one; None if a call elsewhere has been faster."""
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING, user_attrs={OWNER: self.owner.record(self._beat), **attributes}
        )
        trial_id = self._backend.create_new_trial(self._study_id, template)
        self.look()
        slot, trial = next(
            (slot, trial) for slot, trials in self._slots.items() for trial in trials if trial._trial_id == trial_id
        )
        if self.spec.ladder is None and slot >= self.n_trials:
            # It stays for a larger search.
            self._backend.set_trial_state_values(trial_id, TrialState.WAITING)
            return None
        if any(other.number < trial.number and other.state != TrialState.FAIL for other in self._slots[slot]):
            self._backend.set_trial_user_attr(trial_id, REASON, "not run: another process has begun this slot")
            self._backend.set_trial_state_values(trial_id, TrialState.FAIL)
            return None
        return self._claim(trial, slot)

    def _claim(self, trial: FrozenTrial, slot: int) -> Claim:
        rung = 0 if self.spec.ladder is None else self.spec.ladder.place(slot)[0]
        attempts, seconds = trial.user_attrs.get(ATTEMPTS, 0), trial.user_attrs.get(SECONDS, 0.0)
        return Claim(trial._trial_id, trial.number, slot, rung, attempts, seconds)

    def _own(self, trial_id: int) -> None:
        self._backend.set_trial_user_attr(trial_id, OWNER, self.owner.record(self._beat))

    # ---- a trial that was taken

    def parameters(self, claim: Claim) -> dict[str, float]:
        """Draws the hyperparameters of a trial, and records where they come from."""
        self.study.sampler = self._sampler(claim)
        if self.spec.selection is not None:
            chosen = self.spec.selection.candidates[claim.slot]
            source = {"study": self.spec.selection.study, "trial": chosen.trial, "loss": chosen.loss}
            self._backend.set_trial_user_attr(claim.trial_id, SOURCE, source)
        trial = optuna.trial.Trial(self.study, claim.trial_id)
        return {
            name: trial.suggest_float(name, bounds.low, bounds.high, log=bounds.log)
            for name, bounds in self.spec.space.ranges.items()
        }

    def _sampler(self, claim: Claim) -> optuna.samplers.BaseSampler:
        if self.spec.ladder is None or claim.rung == 0:
            return sampler_of(self.spec, claim.slot)
        _, candidate = self.spec.ladder.place(claim.slot)
        drawn = next(trial for trial in self._slots[candidate] if trial.state in _FINISHED)
        return given(drawn.params)

    def report(self, claim: Claim, step: int, value: float) -> None:
        """Records an intermediate value."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._backend.set_trial_intermediate_value(claim.trial_id, step, value)

    def end(self, claim: Claim, state: TrialState, loss: float | None, attributes: Mapping[str, Any]) -> Trial | None:
        """Records what became of a trial. Returns it; None if it is to be run again, or another call has ended it."""
        with self.storage.lock():
            try:
                for key, value in attributes.items():
                    self._backend.set_trial_user_attr(claim.trial_id, key, value)
                if state == TrialState.WAITING:
                    self._wait_for_next(claim)
                else:
                    self.study.tell(claim.number, loss, state, skip_if_finished=True)
            except UpdateFinishedTrialError:
                state = TrialState.WAITING
        del self._held[claim.number]
        if state == TrialState.WAITING:
            return None
        self.look()
        return self.record().trials[claim.number]

    def show_alive(self) -> None:
        """Shows other machines that this call is alive."""
        self._beat += 1
        for claim in self._held.values():
            # Another call that took this one for dead may have finished the trial.
            with contextlib.suppress(UpdateFinishedTrialError):
                self._own(claim.trial_id)

    def put_back(self) -> None:
        """Lets the trials that were running be taken by the next call at once. Without it they count as orphans."""
        # If the storage is what failed, the next call finds them as orphans.
        with contextlib.suppress(UpdateFinishedTrialError, *FAILURES), self.storage.lock():
            for claim in self._held.values():
                self._wait_for_next(claim)

    def _wait_for_next(self, claim: Claim) -> None:
        """Lets a trial be taken by anybody; unless another, for whom this call seemed dead, has it already."""
        if self._is_own(claim.trial_id):
            self._backend.set_trial_state_values(claim.trial_id, TrialState.WAITING)


def _finished(trials: list[FrozenTrial]) -> bool:
    return any(trial.state in _FINISHED for trial in trials)


def _loss(trials: list[FrozenTrial]) -> float:
    """Returns that of the trial of a slot that is complete; infinite if none is."""
    losses = (trial.value for trial in trials if trial.state == TrialState.COMPLETE)
    return next((loss for loss in losses if loss is not None), math.inf)


def _failed(trials: list[FrozenTrial]) -> bool:
    return all(trial.state == TrialState.FAIL for trial in trials)
