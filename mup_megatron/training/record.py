"""The record of a run: the files of its output folder, and the logs that are told.

    metrics.csv, validation.csv          grow with the run
    run.json, recipe.yaml, plan.json     what run this is
    result.json                          what came of it; there once the run is over

Every rank has a `Record` and so the rows; only the first rank's writes and speaks.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.files import read_text, write_atomically
from mup_megatron.megatron import versions
from mup_megatron.megatron.schedule import peak_lr_per_role
from mup_megatron.readback import parse_json
from mup_megatron.recipe import Recipe
from mup_megatron.recipe import recipe as make_recipe
from mup_megatron.theory import Plan
from mup_megatron.training import identity as identities
from mup_megatron.training.identity import Identity
from mup_megatron.training.logs import Log
from mup_megatron.training.metrics import RowFile, TrainingRow, ValidationRow, from_csv, to_csv
from mup_megatron.training.options import TrainingOptions
from mup_megatron.yaml_io import parse_yaml

METRICS = "metrics.csv"
VALIDATION = "validation.csv"
RUN = "run.json"
RECIPE = "recipe.yaml"
PLAN = "plan.json"
RESULT = "result.json"
CHECKPOINTED = (METRICS, VALIDATION, RUN, RECIPE, PLAN)
"""What goes into every checkpoint."""


def require_usable(folder: Path, identity: Identity, *, resumed: bool) -> None:
    """Raises InputError if a folder holds what this run would destroy: another run, or a finished one."""
    if not (folder / METRICS).exists():
        return
    remedy = "Give another --output, or remove the folder."
    found = identities.from_text(read_text(folder / RUN, remedy=remedy), source=str(folder / RUN), remedy=remedy)
    identities.require_same(found, identity, source=f"--output {folder}", remedy=remedy)
    if not resumed and (folder / RESULT).exists():
        raise InputError(f"--output {folder}: this run is finished. {remedy}")


def require_same_run(
    texts: Mapping[str, str],
    identity: Identity,
    recipe: Recipe,
    plan: Plan,
    *,
    folder: Path,
    checkpoint: Path,
    remedy: str,
) -> None:
    """Raises InputError unless what a checkpoint says of its run is sound and of this one.

    Args:
        texts: the files of `CHECKPOINTED`.
        identity: this run's.
        recipe: this run's.
        plan: this run's.
        folder: where the files lie.
        checkpoint: the whole checkpoint, for messages.
        remedy: what to do about damaged ones, as a sentence.
    """
    source = str(folder / RUN)
    identities.require_same(
        identities.from_text(texts[RUN], source=source, remedy=remedy),
        identity,
        source=f"--load {checkpoint}",
        remedy="Go on with the command that the run began with, or begin a new one without --load.",
    )
    require_same_plan(texts, recipe, plan, folder=folder, remedy=remedy)


def require_same_plan(texts: Mapping[str, str], recipe: Recipe, plan: Plan, *, folder: Path, remedy: str) -> None:
    """Raises InputError unless recipe and plan of a checkpoint are these; its arguments are `require_same_run`'s."""
    source = str(folder / RECIPE)
    found = make_recipe(parse_yaml(texts[RECIPE], source=source), source=source)
    if found.fingerprint != recipe.fingerprint:
        raise InputError(f"{source}: of another recipe than {RUN} beside it says. {remedy}")
    source = str(folder / PLAN)
    if not _same_plan(parse_json(texts[PLAN], source=source, remedy=remedy), json.loads(json.dumps(plan.to_json()))):
        raise InputError(f"{source}: not the plan that follows from the recipe with this version. {remedy}")


_LAST_DIGITS = 1e-12
"""Relative difference of numbers that two machines' mathematical libraries may have made of the same recipe."""
_PER_PARAMETER = ("shape", "init_std", "multiplier", "lr", "eps", "weight_decay")
"""What every release has written of a parameter."""


def _same_plan(found: Any, wanted: Mapping[str, Any]) -> bool:
    """Returns whether a stored plan is the wanted one, as far as the release that wrote it says the same things.

    The recipe's fingerprint decides what run it is; this tells of damage.
    """
    if not (isinstance(found, Mapping) and isinstance(found.get("parameters"), list)):
        return False
    entries = {str(each.get("name")): each for each in found["parameters"] if isinstance(each, Mapping)}
    planned = {each["name"]: each for each in wanted["parameters"]}
    if entries.keys() != planned.keys() or len(found["parameters"]) != len(planned):
        return False
    if any(key not in entry for entry in entries.values() for key in _PER_PARAMETER):
        return False
    return _agree({**found, "parameters": entries}, {**wanted, "parameters": planned})


def _agree(found: Any, wanted: Any) -> bool:
    """Returns whether plain values are equal but for last digits, and for keys that one of them lacks."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return all(_agree(found[key], wanted[key]) for key in found.keys() & wanted.keys())
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_agree, found, wanted))
    if type(found) is float and type(wanted) is float:
        return math.isclose(found, wanted, rel_tol=_LAST_DIGITS)
    return bool(found == wanted)


def described(model: ModelFile, recipe: Recipe, plan: Plan, options: TrainingOptions, data: Path) -> dict[str, Any]:
    """Describes a run in plain values, for people and for Weights & Biases."""
    return {
        "fingerprint": recipe.fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "data": str(data),
        "options": {key: str(v) if isinstance(v, Path) else v for key, v in asdict(options).items()},
        "plan": {
            "softmax_scale": plan.softmax_scale,
            "embedding_multiplier": plan.embedding_multiplier,
            "output_multiplier": plan.output_multiplier,
            "lr_per_role": peak_lr_per_role(plan),
        },
        "versions": versions.installed(),
    }


class Record:
    """The rows of a run so far, with the files and logs that they go to on the first rank."""

    def __init__(self, rows: Sequence[TrainingRow] = (), validations: Sequence[ValidationRow] = ()) -> None:
        """A run that has measured this before."""
        self.rows = list(rows)
        self.validations = list(validations)
        self.problem: str | None = None
        """What went wrong while writing. The run has to stop on all ranks together."""
        self._folder: Path | None = None
        self._files: tuple[RowFile[TrainingRow], RowFile[ValidationRow]] | None = None
        self._logs: list[Log] = []

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], *, source: Path, iteration: int, remedy: str) -> "Record":
        """Reads the record that `texts` was made of.

        Args:
            texts: the files, by name.
            source: the folder that they are from.
            iteration: how many iterations they must tell of.
            remedy: what to do about damaged ones, as a sentence.

        Raises:
            InputError: it is not one.
        """
        rows = from_csv(TrainingRow, texts[METRICS], source=str(source / METRICS))
        validations = from_csv(ValidationRow, texts[VALIDATION], source=str(source / VALIDATION))
        if len(rows) != iteration or (rows and rows[-1].iteration != iteration):
            raise InputError(
                f"{source / METRICS}: has {len(rows)} rows, and the checkpoint is of iteration {iteration}. {remedy}"
            )
        if validations and not 1 <= validations[0].iteration <= validations[-1].iteration <= iteration:
            raise InputError(f"{source / VALIDATION}: speaks of iterations that are none of the run's. {remedy}")
        return cls(rows, validations)

    def texts(self) -> dict[str, str]:
        """Returns the rows as files."""
        return {METRICS: to_csv(TrainingRow, self.rows), VALIDATION: to_csv(ValidationRow, self.validations)}

    def open(self, folder: Path, texts: Mapping[str, str]) -> None:
        """Begins to write into a folder: first what run it is, then what it has measured so far.

        Raises:
            InputError: the folder cannot be written or the disk is full.
        """
        for name, text in texts.items():
            write_atomically(folder / name, text)
        self._folder = folder
        self._files = (
            RowFile(folder / METRICS, TrainingRow, self.rows),
            RowFile(folder / VALIDATION, ValidationRow, self.validations),
        )

    def add_log(self, log: Log) -> None:
        """Tells one more log from now on."""
        self._logs.append(log)

    def add(self, row: TrainingRow, lr_per_role: Mapping[str, float] | None) -> None:
        """Adds an iteration that is over. The logs are told if there is an `lr_per_role` to tell."""
        self.rows.append(row)
        if self._files is not None:
            self._guarded(self._files[0], row)
        if lr_per_role is not None:
            for log in self._logs:
                log.iteration(row, lr_per_role)

    def add_validation(self, row: ValidationRow) -> None:
        """Adds a validation that is over."""
        self.validations.append(row)
        if self._files is not None:
            self._guarded(self._files[1], row)
        for log in self._logs:
            log.validation(row)

    def say(self, text: str) -> None:
        """Tells the logs."""
        for log in self._logs:
            log.say(text)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes what came of the run. Raises InputError if the disk is full."""
        if self._folder is not None:
            write_atomically(self._folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")

    def close(self, *, failed: bool) -> None:
        """Closes files and logs: nothing follows."""
        for file in self._files or ():
            file.close()
        for log in self._logs:
            log.close(failed=failed)

    def _guarded(self, file: Any, row: TrainingRow | ValidationRow) -> None:
        try:
            file.append(row)
        except InputError as error:
            self.problem = str(error)
