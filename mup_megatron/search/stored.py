"""A study in its storage: made or found, read, and held against what a sweep records. Running it is `sweep.py`."""

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mup_megatron.errors import InputError
from mup_megatron.search.ladder import MOST_TRIALS, Ladder
from mup_megatron.search.selection import Selection
from mup_megatron.search.space import LARGEST_BOUND, Space
from mup_megatron.search.storage import FAILURES, Storage, is_there, open_storage
from mup_megatron.search.study import (
    RETRY_OF,
    SIZE,
    SLOT,
    SOURCE,
    SPEC,
    Sampler,
    StudyRecord,
    StudySpec,
    Trial,
    trials_of,
)
from mup_megatron.validation import Strict, brief, is_text, listed

ModelT = TypeVar("ModelT", bound=BaseModel)

SHOWN_DIFFERENCES = 5

LARGEST_COST = 1e300
"""Of a ladder: so many times as much is a number too."""

SHOWN_ENTRIES = 10
"""A list that is longer is not written out where it differs."""


def read_study(storage: str, name: str) -> StudyRecord:
    """Reads a study that exists, and its trials.

    Raises:
        InputError: no such storage or study, or a study that no sweep has made.
    """
    with open_storage(storage, create=False) as opened, reading(opened, name):
        try:
            study = optuna.load_study(study_name=name, storage=opened.backend)
        except KeyError:
            others = optuna.get_all_study_names(storage=opened.backend)
            only = f", only {brief(', '.join(repr(other) for other in sorted(others)))}" if others else ""
            raise InputError(f"{opened.label}: no study {name!r} in it{only}. Check --study.") from None
        attributes = study.user_attrs
        if study.directions != [StudyDirection.MINIMIZE]:
            raise InputError(f"{opened.label}: study {name!r} is no minimisation. Choose another with --study.")
        if SPEC not in attributes:
            raise InputError(f"{opened.label}: study {name!r} was not made by a sweep. Choose another with --study.")
        spec = spec_of(attributes[SPEC], opened, name=name, storage_url=storage)
        found = opened.stored_trials(name)
        require_sound(found, spec, opened)
        trials = trials_of(found)
        # Studies of older versions do not say how many trials were asked for.
        return StudyRecord(spec, trials, size_of(attributes, opened, name, len({trial.slot for trial in trials})))


def find_study(storage: str, name: str) -> StudyRecord | None:
    """Reads a study as `read_study` does; returns None if there is no such study yet."""
    if not is_there(storage):
        return None
    with open_storage(storage, create=False) as opened, reading(opened, name):
        names = optuna.get_all_study_names(storage=opened.backend)
    return read_study(storage, name) if name in names else None


def best_trial(storage: str, name: str) -> Trial:
    """Returns the complete trial with the lowest loss.

    Raises:
        InputError: as `read_study`, or no trial is complete.
    """
    return read_study(storage, name).require_best()


def open_study(spec: StudySpec, storage: Storage, n_trials: int) -> tuple[optuna.Study, StudySpec]:
    """Makes or finds a study, the same as before in all that must not change; returns its spec as recorded too."""
    with storage.lock(), reading(storage, spec.name):
        study = optuna.create_study(
            study_name=spec.name, storage=storage.backend, direction="minimize", load_if_exists=True
        )
        if study.directions != [StudyDirection.MINIMIZE]:
            raise InputError(
                f"{storage.label}: study {spec.name!r} is no minimisation. Choose another name with --study."
            )
        # Trials before settings: on a database server another call may be making both, in the other order.
        trials = storage.stored_trials(spec.name)
        if SPEC not in study.user_attrs:
            if trials:
                raise InputError(
                    f"{storage.label}: study {spec.name!r} was not made by a sweep. Choose another name with --study."
                )
            study.set_user_attr(SPEC, spec.recorded())
            storage.settle()
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
        shown = listed(differences, SHOWN_DIFFERENCES, separator="; ")
        raise InputError(
            f"{storage.label}: study {spec.name!r} was made with other settings: {shown}. Give those of the study to "
            "go on with it, or another name with --study. Nothing was changed."
        )
    return study, spec


def _as_selected(spec: StudySpec, recorded: StudySpec) -> StudySpec:
    """Returns the spec with the recorded trials of the study, if it is one of as many trials of the same other study.

    That one may go on and have other best trials by now, also while two calls make this study at the same moment.
    """
    selection = recorded.selection
    if spec.selection is None or selection is None:
        return spec
    same = (selection.study, len(selection.candidates)) == (spec.selection.study, len(spec.selection.candidates))
    return replace(spec, selection=selection) if same else spec


def _differences(recorded: Any, wanted: Any, key: str = "") -> list[str]:
    """Lists what differs between two JSON values, one sentence for each difference."""
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
        if max(abs(self.low), abs(self.high)) > LARGEST_BOUND:
            raise ValueError("bounds beyond all measure")
        return self


class _Selected(Strict):
    """The trials of another study as they are recorded."""

    study: str
    parameters: list[str]
    trials: Annotated[list[list[float]], Field(min_length=1)]

    @model_validator(mode="after")
    def _complete(self) -> "_Selected":
        if any(len(row) != 2 + len(self.parameters) or row[0] != int(row[0]) for row in self.trials):
            raise ValueError("a trial lacks a value")
        return self


class _Rung(Strict):
    """A rung of the ladder as it is recorded."""

    settings: dict[str, Any]
    cost: Annotated[float, Field(gt=0)]
    trials: Annotated[int, Field(gt=0, le=MOST_TRIALS)]


class _Ladder(Strict):
    """The ladder as it is recorded."""

    budget: Annotated[float, Field(gt=0)]
    rungs: Annotated[list[_Rung], Field(min_length=1)]

    @model_validator(mode="after")
    def _possible(self) -> "_Ladder":
        if sum(rung.cost * rung.trials for rung in self.rungs) > LARGEST_COST:
            raise ValueError("costs beyond all measure")
        if any(above.trials > below.trials for below, above in itertools.pairwise(self.rungs)):
            raise ValueError("more trials on a rung than on the one below")
        return self


class _Recorded(Strict):
    """The study's attribute SPEC."""

    version: Literal[1]
    seed: int
    sampler: Sampler
    space: Annotated[dict[str, _Range], Field(min_length=1)]
    context: dict[str, Any]
    selection: _Selected | None = None
    ladder: _Ladder | None = None

    @model_validator(mode="after")
    def _complete(self) -> "_Recorded":
        if (self.selection is not None) != (self.sampler == "best"):
            raise ValueError("sampler and selection do not go together")
        if self.selection is not None and set(self.selection.parameters) != set(self.space):
            raise ValueError("the selected trials have other hyperparameters than the space")
        if self.selection is not None and self.ladder is not None:
            raise ValueError("both a selection and a ladder")
        return self


class _Owner(Strict):
    """A trial's attribute OWNER."""

    machine: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    started: float
    token: str
    beat: int


class _Attributes(Strict):
    """Names what a sweep records of a trial."""

    model_config = ConfigDict(extra="ignore")

    owner: _Owner | None = None
    attempts: Annotated[int, Field(ge=0)] = 0
    retry_of: Annotated[int, Field(ge=0)] | None = None
    slot: Annotated[int, Field(ge=0)] | None = None
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
    """Returns the error for a study whose content cannot be."""
    return InputError(
        f"{storage.label}: study {brief(name, 40)!r} is damaged ({brief(what)}). Restore the database, or "
        "choose another study with --study."
    )


def spec_of(content: object, storage: Storage, *, name: str, storage_url: str) -> StudySpec:
    """Reads what a study's attribute SPEC says.

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
        Ladder.from_json(content["ladder"]) if content.get("ladder") is not None else None,
    )


def size_of(attributes: Mapping[str, Any], storage: Storage, name: str, default: int) -> int:
    """Returns the number of trials that a study was asked for; `default` if it does not say so."""
    size = attributes.get(SIZE, default)
    if type(size) is not int or not 0 <= size <= MOST_TRIALS:
        raise damaged(storage, name, f"{SIZE} is {size!r}")
    return size


def require_sound(trials: Sequence[FrozenTrial], spec: StudySpec, storage: Storage) -> None:
    """Raises InputError unless trials are what a sweep with this spec stores."""
    finished = {
        trial.user_attrs.get(SLOT) for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    }
    for index, trial in enumerate(trials):
        where = f"trial {trial.number}"
        if trial.number != index:
            raise damaged(storage, spec.name, f"trial {index} is missing")
        attributes = {key: value for key, value in trial.user_attrs.items() if key != SOURCE}
        own = _sound(_Attributes, attributes, where, storage, spec.name)
        if own.retry_of is not None and own.retry_of >= len(trials):
            raise damaged(storage, spec.name, f"{where}: {RETRY_OF} is {own.retry_of}")
        _require_place(own.slot, finished, where, spec, storage)
        if not all(isinstance(value, float) and math.isfinite(value) for value in trial.params.values()):
            raise damaged(storage, spec.name, f"{where}: a hyperparameter is no number")
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and set(trial.params) != set(spec.space.ranges):
            raise damaged(storage, spec.name, f"{where}: its hyperparameters are not those of the space")
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and not all(
            bounds.holds(trial.params[name]) for name, bounds in spec.space.ranges.items()
        ):
            raise damaged(storage, spec.name, f"{where}: a hyperparameter is outside of the space")
        if trial.state == TrialState.COMPLETE and not (
            isinstance(trial.value, float | int) and math.isfinite(trial.value)
        ):
            raise damaged(storage, spec.name, f"{where}: complete, without a loss")


def _require_place(
    slot: int | None, finished: Collection[int | None], where: str, spec: StudySpec, storage: Storage
) -> None:
    """Raises InputError unless a trial says its slot just where the study has a ladder, one that it can have there."""
    if spec.ladder is None:
        if slot is not None:
            raise damaged(storage, spec.name, f"{where}: {SLOT} {slot}, without a ladder")
        return
    if slot is None or slot >= spec.ladder.slots:
        raise damaged(storage, spec.name, f"{where}: {SLOT} is {slot}")
    rung, candidate = spec.ladder.place(slot)
    if rung > 0 and candidate not in finished:
        raise damaged(storage, spec.name, f"{where}: on a further rung without a result on the lowest")


def _sound(model: type[ModelT], content: object, where: str, storage: Storage, name: str) -> ModelT:
    """Returns content of a study as a `model`."""
    if not isinstance(content, Mapping) or not is_text(content):
        raise damaged(storage, name, f"{where} holds no keys and values that can be text")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise damaged(storage, name, f"{where}: {brief(key, 40)}: {first['msg']}") from None
