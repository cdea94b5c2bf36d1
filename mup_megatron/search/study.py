"""What a study is and what is in it: reading only. Running it is `sweep.py`.

A study is Optuna's, and every Optuna tool opens it. What this package adds:

- The study's user attribute `sweep` holds what must stay the same when it goes on: seed, sampler, space, context; and
  the best trials of another study, if those are what it runs. `size` holds how many trials were asked for.
- A **slot** is one place in the search, 0 to N - 1; but for TPE it alone gives the hyperparameters. Trials fill
  slots in the order of their numbers, so trial i is slot i, until a trial has failed for good and a later command runs
  its slot again. That makes a further trial, with the slot in its user attribute `retry_of`, which takes no new slot.
- Complete: Optuna's COMPLETE, with the loss as value. Diverged: PRUNED, so that no diverged trial is ever the best one
  and TPE learns to stay away. Failed (crashed, no result): FAIL. Both have a user attribute `reason`.
"""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mup_megatron.errors import InputError
from mup_megatron.search.selection import Candidate, Selection
from mup_megatron.search.space import Space
from mup_megatron.search.storage import FAILURES, Storage, is_there, open_storage
from mup_megatron.validation import Strict, brief, is_text

ModelT = TypeVar("ModelT", bound=BaseModel)

Sampler: TypeAlias = Literal["random", "tpe", "best"]
"""Where hyperparameters come from: the space alone, the space and earlier trials, or the best of another study."""
State: TypeAlias = Literal["complete", "diverged", "failed", "running", "waiting"]

MOST_TRIALS = 1_000_000
"""Of a study. Every look at it goes through all of them."""

SPEC = "sweep"
SIZE = "size"
SOURCE = "source"
RETRY_OF = "retry_of"
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
    """What a study searches and how. All but `name` and `storage` is recorded in it and cannot change."""

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

    def __post_init__(self) -> None:
        assert (self.selection is not None) == (self.sampler == "best")
        if not self.name:
            raise InputError("--study: empty. Give the study a name.")
        if self.sampler not in get_args(Sampler):
            raise InputError(f"--sampler {self.sampler!r}: unknown. Choose from {', '.join(get_args(Sampler))}.")
        if self.selection is not None and not self.selection.candidates:
            raise InputError("--best 0: must be at least 1.")

    def at(self, slot: int) -> Mapping[str, float]:
        """The hyperparameters of a slot, which TPE alone does not know beforehand."""
        assert self.sampler != "tpe"
        if self.selection is not None:
            return self.selection.candidates[slot].parameters
        return self.space.sample(self.seed, slot)

    def recorded(self) -> dict[str, Any]:
        """What the study keeps, as JSON gives it back."""
        content = {
            "version": 1,
            "seed": self.seed,
            "sampler": self.sampler,
            "space": self.space.to_json(),
            "context": dict(self.context),
            **({} if self.selection is None else {"selection": self.selection.to_json()}),
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
        """Whether the trial has answered its question: complete or diverged."""
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
        """The complete trial with the lowest loss; of equals the first. None if none is complete."""
        complete = [trial for trial in self.trials if trial.loss is not None]
        return min(complete, key=lambda trial: trial.loss, default=None)  # type: ignore[arg-type, return-value]

    def require_best(self) -> Trial:
        """The best trial; InputError if none is complete."""
        if self.best is None:
            raise InputError(f"study {self.spec.name!r}: no complete trial yet. Run the sweep on, or widen its space.")
        return self.best

    @property
    def unfinished(self) -> dict[str, int]:
        """How many of the trials that were asked for have no result, by what became of them. Empty: all have one."""
        result = {trial.slot for trial in self.trials if trial.finished}
        latest = {trial.slot: trial.state for trial in self.trials if trial.slot not in result}
        states = [latest.get(slot, "not begun") for slot in range(self.size) if slot not in result]
        return dict(sorted(Counter(states).items()))

    def select_best(self, count: int, *, accept_unfinished: bool = False) -> Selection:
        """The `count` complete trials with the lowest losses; of equals the first.

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
            Candidate(trial.number, trial.loss, trial.parameters) for trial in self.trials if trial.loss is not None
        ]
        if count > len(complete):
            raise InputError(
                f"--best {count}: study {self.spec.name!r} has only {len(complete)} complete trials. Give a smaller "
                "number."
            )
        best = sorted(complete, key=lambda candidate: (candidate.loss, candidate.trial))
        return Selection(self.spec.name, tuple(best[:count]))


def read_study(storage: str, name: str) -> StudyRecord:
    """A study that exists, and its trials.

    Raises:
        InputError: no such storage or study, or a study that no sweep has made.
    """
    with open_storage(storage, create=False) as opened, reading(opened, name):
        try:
            study = optuna.load_study(study_name=name, storage=opened.backend)
        except KeyError:
            others = optuna.get_all_study_names(storage=opened.backend)
            listed = f", only {brief(', '.join(repr(other) for other in sorted(others)))}" if others else ""
            raise InputError(f"{opened.label}: no study {name!r} in it{listed}. Check --study.") from None
        attributes = study.user_attrs
        if study.directions != [StudyDirection.MINIMIZE]:
            raise InputError(f"{opened.label}: study {name!r} is no minimisation. Choose another with --study.")
        if SPEC not in attributes:
            raise InputError(f"{opened.label}: study {name!r} was not made by a sweep. Choose another with --study.")
        spec = spec_of(attributes[SPEC], opened, name=name, storage_url=storage)
        found = study.get_trials(deepcopy=False)
        require_sound(found, spec, opened)
        trials = trials_of(found)
        # Studies of older versions do not say how many trials were asked for.
        return StudyRecord(spec, trials, size_of(attributes, opened, name, len({trial.slot for trial in trials})))


def find_study(storage: str, name: str) -> StudyRecord | None:
    """As `read_study`, but None if there is no such study yet."""
    if not is_there(storage):
        return None
    with open_storage(storage, create=False) as opened, reading(opened, name):
        names = optuna.get_all_study_names(storage=opened.backend)
    return read_study(storage, name) if name in names else None


def best_trial(storage: str, name: str) -> Trial:
    """The complete trial with the lowest loss.

    Raises:
        InputError: as `read_study`, or no trial is complete.
    """
    return read_study(storage, name).require_best()


def trials_of(frozen: Sequence[FrozenTrial]) -> tuple[Trial, ...]:
    """All trials of a study, given all that Optuna has, by number."""
    return tuple(_trial(trial, slot) for trial, slot in zip(frozen, slots_of(frozen), strict=True))


def slots_of(trials: Iterable[FrozenTrial]) -> list[int]:
    """The slot of each trial. Needs all trials of the study, by number: they are numbered in the order of creation."""
    slots, first_attempts = [], 0
    for trial in trials:
        if RETRY_OF in trial.user_attrs:
            slots.append(int(trial.user_attrs[RETRY_OF]))
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


# ---- what must hold of what was stored ---------------------------------------------------------------------------


class _Range(Strict):
    """A dimension of the space as it is recorded."""

    low: float
    high: float
    log: bool

    @model_validator(mode="after")
    def _possible(self) -> "_Range":
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("no range of numbers")
        return self


class _Selected(Strict):
    """The trials of another study as they are recorded."""

    study: str
    parameters: list[str]
    trials: Annotated[list[list[float]], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> "_Selected":
        if any(len(row) != 2 + len(self.parameters) or row[0] != int(row[0]) for row in self.trials):
            raise ValueError("a trial lacks a value")
        return self


class _Recorded(Strict):
    """The study's attribute SPEC."""

    version: Literal[1]
    seed: int
    sampler: Sampler
    space: dict[str, _Range]
    context: dict[str, Any]
    selection: _Selected | None = None

    @model_validator(mode="after")
    def _complete(self) -> "_Recorded":
        if (self.selection is not None) != (self.sampler == "best"):
            raise ValueError("sampler and selection do not go together")
        if self.selection is not None and set(self.selection.parameters) != set(self.space):
            raise ValueError("the selected trials have other hyperparameters than the space")
        return self


class _Owner(Strict):
    """A trial's attribute OWNER."""

    machine: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    started: float
    token: str
    beat: int


class _Attributes(Strict):
    """What a sweep records of a trial."""

    model_config = ConfigDict(extra="ignore")

    owner: _Owner | None = None
    attempts: Annotated[int, Field(ge=0)] = 0
    retry_of: Annotated[int, Field(ge=0)] | None = None
    reason: str | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)


@contextlib.contextmanager
def reading(storage: Storage, name: str) -> Iterator[None]:
    """For the time of Optuna's reading: a study that it cannot make sense of becomes an InputError that names it."""
    try:
        yield
    except (InputError, *FAILURES):
        raise
    except Exception as error:  # Optuna decodes columns as it finds them: whatever json, enum and sqlalchemy raise
        raise damaged(storage, name, f"{type(error).__name__}: {error}") from None


def damaged(storage: Storage, name: str, what: object) -> InputError:
    """The sentence for a study whose content cannot be."""
    return InputError(
        f"{storage.label}: study {brief(name, 40)!r} is damaged ({brief(what)}). Restore the database, or "
        "choose another study with --study."
    )


def spec_of(content: object, storage: Storage, *, name: str, storage_url: str) -> StudySpec:
    """What a study's attribute SPEC says.

    Raises:
        InputError: it is not what a sweep records.
    """
    _sound(_Recorded, content, SPEC, storage, name)
    assert isinstance(content, Mapping)
    return StudySpec(
        name,
        storage_url,
        content["seed"],
        content["sampler"],
        Space.from_json(content["space"]),
        content["context"],
        Selection.from_json(content["selection"]) if content.get("selection") is not None else None,
    )


def size_of(attributes: Mapping[str, Any], storage: Storage, name: str, default: int) -> int:
    """How many trials a study was asked for; `default` if it does not say so."""
    size = attributes.get(SIZE, default)
    if type(size) is not int or not 0 <= size <= MOST_TRIALS:
        raise damaged(storage, name, f"{SIZE} is {size!r}")
    return size


def require_sound(trials: Sequence[FrozenTrial], spec: StudySpec, storage: Storage) -> None:
    """Raises InputError unless trials are what a sweep with this spec stores."""
    for index, trial in enumerate(trials):
        where = f"trial {trial.number}"
        if trial.number != index:
            raise damaged(storage, spec.name, f"trial {index} is missing")
        attributes = {key: value for key, value in trial.user_attrs.items() if key != SOURCE}
        own = _sound(_Attributes, attributes, where, storage, spec.name)
        if own.retry_of is not None and own.retry_of >= len(trials):
            raise damaged(storage, spec.name, f"{where}: {RETRY_OF} is {own.retry_of}")
        if not all(isinstance(value, float) and math.isfinite(value) for value in trial.params.values()):
            raise damaged(storage, spec.name, f"{where}: a hyperparameter is no number")
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and set(trial.params) != set(spec.space.dimensions):
            raise damaged(storage, spec.name, f"{where}: its hyperparameters are not those of the space")
        if trial.state == TrialState.COMPLETE and not (
            isinstance(trial.value, float | int) and math.isfinite(trial.value)
        ):
            raise damaged(storage, spec.name, f"{where}: complete, without a loss")


def _sound(model: type[ModelT], content: object, where: str, storage: Storage, name: str) -> ModelT:
    """Content of a study as a `model`."""
    if not isinstance(content, Mapping) or not is_text(content):
        raise damaged(storage, name, f"{where} holds no keys and values that can be text")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise damaged(storage, name, f"{where}: {brief(key, 40)}: {first['msg']}") from None
