"""A study and what is in it, as values. How it is stored is in `stored.py`, running it in `sweep.py`.

A study is Optuna's, and every Optuna tool opens it. What this package adds:

- The study's user attribute `sweep` holds what must stay the same when it goes on: seed, sampler, space, context; and
  the best trials of another study, if those are what it runs. `size` holds how many trials were asked for.
- A **slot** is one place in the search, 0 to N - 1; but for TPE it alone gives the hyperparameters. Trials fill
  slots in the order of their numbers, so trial i is slot i, until a trial has failed for good and a later command runs
  its slot again. That makes a further trial, with the slot in its user attribute `retry_of`, which takes no new slot.
- In a search over fidelities a slot is a candidate on a rung of its **ladder** (`ladder.py`), which is recorded too;
  each trial has its slot in its user attribute `slot`.
- Complete: Optuna's COMPLETE, with the loss as value. Diverged: PRUNED, so that no diverged trial is ever the best one
  and TPE learns to stay away. Failed (crashed, no result): FAIL. Both have a user attribute `reason`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel

from mup_megatron.errors import InputError
from mup_megatron.search.ladder import Ladder
from mup_megatron.search.selection import Candidate, Selection
from mup_megatron.search.space import Space

ModelT = TypeVar("ModelT", bound=BaseModel)

Sampler: TypeAlias = Literal["random", "tpe", "best"]
"""Where hyperparameters come from: the space alone, the space and earlier trials, or the best of another study."""
State: TypeAlias = Literal["complete", "diverged", "failed", "running", "waiting"]

SPEC = "sweep"
SIZE = "size"
SOURCE = "source"
RETRY_OF = "retry_of"
SLOT = "slot"
OWNER = "owner"
ATTEMPTS = "attempts"
REASON = "reason"
SECONDS = "seconds"
METRICS = "metrics"

_STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "diverged",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class StudySpec:
    """The search of a study. All but `name` and `storage` is recorded in it and cannot change."""

    name: str
    storage: str
    """An Optuna storage URL."""
    seed: int
    sampler: Sampler
    space: Space
    context: Mapping[str, Any]
    """What a loss depends on besides the hyperparameters (model, data, steps, …), as JSON would hold it."""
    selection: Selection | None = None
    """What the sampler `best` runs; only it has one. Its study's space is this one's."""
    ladder: Ladder | None = None
    """The rungs of a search over fidelities; None: all trials are whole ones."""

    def __post_init__(self) -> None:
        assert (self.selection is not None) == (self.sampler == "best")
        assert self.selection is None or self.ladder is None
        if not self.name:
            raise InputError("--study: empty. Give the study a name.")
        if self.sampler not in get_args(Sampler):
            raise InputError(f"--sampler {self.sampler!r}: unknown. Choose from {', '.join(get_args(Sampler))}.")
        if self.selection is not None and not self.selection.candidates:
            raise InputError("--best 0: must be at least 1.")

    def at(self, slot: int) -> Mapping[str, float]:
        """Returns the hyperparameters of a slot on the lowest rung, which TPE alone does not know beforehand."""
        assert self.sampler != "tpe"
        if self.selection is not None:
            return self.selection.candidates[slot].parameters
        return self.space.sample(self.seed, slot)

    def recorded(self) -> dict[str, Any]:
        """Returns what the study keeps, as JSON gives it back."""
        content = {
            "version": 1,
            "seed": self.seed,
            "sampler": self.sampler,
            "space": self.space.to_json(),
            "context": dict(self.context),
            **({} if self.selection is None else {"selection": self.selection.to_json()}),
            **({} if self.ladder is None else {"ladder": self.ladder.to_json()}),
        }
        plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
        return plain


@dataclass(frozen=True)
class Trial:
    """One trial, as it stands."""

    number: int
    slot: int
    state: State
    loss: float | None
    """Of a complete trial."""
    parameters: Mapping[str, float]
    seconds: float | None
    """What the trial took, of a complete or diverged one."""
    reason: str | None
    """Why it diverged or failed."""
    metrics: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """True if the trial has answered its question: complete or diverged."""
        return self.state in ("complete", "diverged")


@dataclass(frozen=True)
class StudyRecord:
    """A study as it stands."""

    spec: StudySpec
    trials: tuple[Trial, ...]
    size: int
    """How many trials were asked for, of all calls the most."""

    @property
    def best(self) -> Trial | None:
        """The complete whole trial with the lowest loss; of equals the first. None if none is complete."""
        return min(self._complete, key=lambda trial: trial.loss, default=None)  # type: ignore[arg-type, return-value]

    @property
    def _complete(self) -> list[Trial]:
        """Those with a loss whose losses can be compared: on a ladder, of the last rung."""
        last = 0 if self.spec.ladder is None else len(self.spec.ladder.rungs) - 1
        return [trial for trial in self.trials if trial.loss is not None and self.rung_of(trial) == last]

    def rung_of(self, trial: Trial) -> int:
        """Returns the rung that a trial of this study is on; 0 without a ladder."""
        return 0 if self.spec.ladder is None else self.spec.ladder.place(trial.slot)[0]

    def require_best(self) -> Trial:
        """Returns the best trial; raises InputError if none is complete."""
        if self.best is None:
            raise InputError(f"study {self.spec.name!r}: no complete trial yet. Run the sweep on, or widen its space.")
        return self.best

    @property
    def unfinished(self) -> dict[str, int]:
        """The numbers of trials asked for that have no result, by what became of them. Empty: all have one."""
        result = {trial.slot for trial in self.trials if trial.finished}
        latest = {trial.slot: trial.state for trial in self.trials if trial.slot not in result}
        states = [latest.get(slot, "not begun") for slot in self._wanted() if slot not in result]
        return dict(sorted(Counter(states).items()))

    def _wanted(self) -> Sequence[int]:
        """The slots that were asked for; on a ladder, as far as that is certain."""
        if self.spec.ladder is None:
            return range(self.size)
        failed = {trial.slot: math.inf for trial in self.trials if trial.state == "failed"}
        ended = {trial.slot: math.inf if trial.loss is None else trial.loss for trial in self.trials if trial.finished}
        return self.spec.ladder.wanted(failed | ended, {trial.slot for trial in self.trials})

    def select_best(self, count: int, *, accept_unfinished: bool = False) -> Selection:
        """Selects the `count` complete trials with the lowest losses; of equals the first.

        Args:
            count: how many.
            accept_unfinished: whether to choose although trials of this study have no result yet.

        Raises:
            InputError: there are fewer, or the study is not finished.
        """
        if count < 1:
            raise InputError(f"--best {count}: must be at least 1.")
        if self.unfinished and not accept_unfinished:
            missing = ", ".join(f"{number} {state}" for state, number in self.unfinished.items())
            raise InputError(
                f"--of {self.spec.name}: the study is not finished. Of its {self.size} trials, {missing}. Give its own "
                "sweep command again, or add --accept-unfinished to take the best of those that have a result."
            )
        complete = [
            Candidate(trial.number, trial.loss, trial.parameters) for trial in self._complete if trial.loss is not None
        ]
        if count > len(complete):
            raise InputError(
                f"--best {count}: study {self.spec.name!r} has only {len(complete)} complete trials. Give a smaller "
                "number."
            )
        best = sorted(complete, key=lambda candidate: (candidate.loss, candidate.trial))
        return Selection(self.spec.name, tuple(best[:count]))


def trials_of(frozen: Sequence[FrozenTrial]) -> tuple[Trial, ...]:
    """Returns all trials of a study, given all that Optuna has, by number."""
    return tuple(_trial(trial, slot) for trial, slot in zip(frozen, slots_of(frozen), strict=True))


def slots_of(trials: Iterable[FrozenTrial]) -> list[int]:
    """Returns the slot of each trial. Needs all of the study, by number: they are numbered in the order of creation."""
    slots, first_attempts = [], 0
    for trial in trials:
        said = trial.user_attrs.get(RETRY_OF, trial.user_attrs.get(SLOT))
        if said is not None:
            slots.append(int(said))
        else:
            slots.append(first_attempts)
            first_attempts += 1
    return slots


def _trial(trial: FrozenTrial, slot: int) -> Trial:
    state = _STATES[trial.state]
    ended = state in ("complete", "diverged", "failed")
    return Trial(
        number=trial.number,
        slot=slot,
        state=state,
        loss=trial.value if state == "complete" else None,
        parameters=dict(trial.params),
        seconds=trial.user_attrs.get(SECONDS) if ended else None,
        reason=trial.user_attrs.get(REASON) if state in ("diverged", "failed") else None,
        metrics=trial.user_attrs.get(METRICS, {}) if ended else {},
    )
