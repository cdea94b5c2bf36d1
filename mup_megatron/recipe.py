"""The recipe: what is transferred. Reads, checks, fingerprints and writes `*.recipe.yaml`.

What it says of a run is in `hyperparameters.py`, and the plan that this makes in `planning.py`. Not the search for good
values (`search/`).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from mup_megatron import theory
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import AnyModelFile, shapes_of
from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.horizon import Horizon, Training
from mup_megatron.hyperparameters import (
    Depth,
    Hyperparameters,
    NotNegative,
    Parametrization,
    PerParameter,
    Positive,
    Schedule,
)
from mup_megatron.planning import planned
from mup_megatron.validation import Strict, added, plain, validated
from mup_megatron.yaml_io import dump_yaml, read_yaml

__all__ = [
    "Depth",
    "Horizon",
    "HuggingFaceBase",
    "Hyperparameters",
    "ModuleBase",
    "Parametrization",
    "PerParameter",
    "Recipe",
    "Schedule",
    "Training",
    "load_recipe",
    "recipe",
    "save_recipe",
]


class HuggingFaceBase(Strict):
    """A base as a Hugging Face configuration: `model_type` and that library's own keys, those left out at its
    defaults.
    """

    model_config = ConfigDict(extra="allow")

    model_type: Annotated[str, Field(min_length=1)]
    architectures: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The model's class; that of the target, if it is not said."""


class ModuleParameter(Strict):
    """One parameter of a base that is any torch module."""

    shape: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
    grows: Annotated[tuple[bool, ...], Field(strict=False)]
    """For each dimension, whether it grows with width."""
    init_std: NotNegative | None = None
    init_value: float | None = None
    """The constant at which it starts. With neither of the two it keeps its library's own start."""

    @model_validator(mode="after")
    def _whole(self) -> "ModuleParameter":
        if len(self.shape) != len(self.grows):
            raise ValueError(f"shape has {len(self.shape)} dimensions and grows {len(self.grows)}. Give one for each.")
        if self.init_std is not None and self.init_value is not None:
            raise ValueError("give either init_std or init_value.")
        return self


class ModuleBase(Strict):
    """A base as any torch module: what it takes to compare a wider one with it."""

    parameters: Annotated[dict[str, ModuleParameter], Field(min_length=1)]
    head_size: Annotated[int, Field(gt=0)] | None = None
    """Of attention, where the module has attentions whose scale can be read."""
    softmax_scale: Positive | None = None


def _kind_of_base(content: object) -> str:
    if isinstance(content, HuggingFaceBase) or (isinstance(content, Mapping) and "model_type" in content):
        return "(huggingface)"
    if isinstance(content, ModuleBase) or (isinstance(content, Mapping) and "parameters" in content):
        return "(module)"
    return "(megatron)"


def _changed(h: Hyperparameters, factors: theory.Factors, values: Mapping[str, float]) -> Hyperparameters:
    """Returns the hyperparameters with those of `values` that a rule of the horizon moves, moved."""
    return h if factors == theory.Factors() else h.model_copy(update=factors.moved(values))


_DECAYING = ("linear", "cosine")
_DECAYED = 0.5
"""The floor of a schedule that decays, relative to its peak, at most."""


class Recipe(Strict):
    """The values that are transferred from a base to any target."""

    version: Literal[1] = 1
    base: Annotated[
        Annotated[AnyModelFile, Tag("(megatron)")]
        | Annotated[HuggingFaceBase, Tag("(huggingface)")]
        | Annotated[ModuleBase, Tag("(module)")],
        Discriminator(_kind_of_base),
    ]
    """Told apart by `model_type` and `parameters`, of which a model file of Megatron's has neither."""
    hyperparameters: Hyperparameters
    schedule: Schedule = Schedule()
    per_parameter: Annotated[tuple[PerParameter, ...], Field(strict=False)] = ()
    parametrization: Parametrization = Parametrization()
    horizon: Horizon | None = added("0.2", None)
    """The target's run, if the values are to be moved to it; None: they are taken as they were tuned."""
    training: Training = Training()
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    """Where the values come from: study, trial, data, tokens, versions."""

    @model_validator(mode="after")
    def _movable(self) -> "Recipe":
        if self.horizon is not None:
            try:
                _ = self.moved
                self.horizon.require_as_tuned(self.hyperparameters.model_dump(), self.training, self.provenance)
            except theory.PlanError as error:
                raise ValueError(f"horizon: {error}") from None
        return self

    @property
    def factors(self) -> theory.Factors:
        """By what `horizon` multiplies the base's values; 1 without."""
        return self._factors()

    def _factors(self, *, back: bool = False) -> theory.Factors:
        if self.horizon is None:
            return theory.Factors()
        optimizers = [theory.optimizers()[name] for name in self.optimizers]
        h, schedule = self.hyperparameters, self.schedule
        falls = h.min_lr <= _DECAYED * h.lr or math.isclose(h.min_lr, _DECAYED * h.lr)
        decays = schedule.lr_decay_style in _DECAYING and schedule.lr_decay_fraction <= 1.0 and falls
        return self.horizon.factors(self.training, optimizers, decays=decays, back=back)

    @property
    def moved(self) -> Hyperparameters:
        """The hyperparameters as the target's run has them: `hyperparameters`, moved to its `horizon`.

        Whoever carries out a recipe reads these.
        """
        if self.horizon is None:
            return self.hyperparameters
        return _changed(self.hyperparameters, self.factors, self.hyperparameters.model_dump())

    @property
    def moves(self) -> dict[str, tuple[float, float]]:
        """Those of the hyperparameters that the horizon moves: as tuned, and as moved."""
        before, after = self.hyperparameters.model_dump(), self.moved.model_dump()
        return {key: (before[key], after[key]) for key in before if before[key] != after[key]}

    @property
    def told_horizon(self) -> str | None:
        """In one line, what the horizon moves; None without."""
        return None if self.horizon is None else self.horizon.described(self.training, self.moves)

    def with_moved(self, values: Mapping[str, float]) -> "Recipe":
        """Returns the recipe whose target's run has these values: `moved` of it, but for rounding."""
        own = _changed(self.hyperparameters.model_copy(update=dict(values)), self._factors(back=True), values)
        return self.model_copy(update={"hyperparameters": own})

    def settled(self) -> "Recipe":
        """Returns the recipe of the same run that has the moved values for its own, and no horizon."""
        return self.model_copy(update={"hyperparameters": self.moved, "horizon": None})

    def run_problems(
        self, *, batch: int | None = None, tokens: int | None = None, seq_length: int | None = None
    ) -> Sequence[str]:
        """Returns where a run is not the one that `horizon` is for, each in a sentence; nothing without a horizon.

        Args:
            batch: sequences of an iteration; None where that is not known, likewise the others.
            tokens: of the whole run.
            seq_length: tokens of a sequence.
        """
        if self.horizon is None:
            return ()
        return tuple(self.horizon.run_problems(self.training, batch=batch, tokens=tokens, seq_length=seq_length))

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The names of its optimizer and of those that it leaves some tensors to."""
        own = theory.optimizers()[self.parametrization.optimizer]
        return own.name, *(each.name for each in own.others)

    @property
    def optimizer_values(self) -> dict[str, Any]:
        """The hyperparameters that these read and that not every optimizer does, by key."""
        rules = [theory.optimizers()[name] for name in self.optimizers]
        return {key: getattr(self.moved, key) for each in rules for key in each.hyperparameters}

    @property
    def not_of_the_run(self) -> tuple[str, ...]:
        """The keys on which no run depends. That of the tuning does, where values are moved from it."""
        return ("training", "provenance") if self.horizon is None else ("provenance",)

    @property
    def multiplies_branches(self) -> bool:
        """True where residual branches get a multiplier: a tuned one, or by their stack's depth."""
        return self.parametrization.depth is not None or self.hyperparameters.residual_multiplier != 1.0

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that changes the run of a target; the same in every release."""
        content = plain(self, exclude=self.not_of_the_run)
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def plan(self, target: ModelFile) -> theory.Plan:
        """Returns what every parameter of a Megatron-Core `target` gets.

        Raises:
            InputError: target and base differ in more than size, or an override matches nothing.
        """
        return self.plan_for_shapes(*shapes_of(self.megatron_base, target))

    @property
    def megatron_base(self) -> ModelFile:
        """The base of a recipe for Megatron-Core.

        Raises:
            InputError: the base is a model of another library.
        """
        if not isinstance(self.base, ModelFile):
            kind = "Hugging Face configuration" if isinstance(self.base, HuggingFaceBase) else "torch module"
            raise InputError(
                f"the recipe's base is a {kind}, and the target is one of Megatron-Core. Tune a base that is a model "
                f"file."
            )
        return self.base

    def plan_for_shapes(self, base: theory.ModelShape, target: theory.ModelShape) -> theory.Plan:
        """Returns what every parameter of `target` gets, from shapes in the rules' own terms.

        Raises:
            InputError: the shapes do not fit each other, or an override matches nothing.
        """
        try:
            return planned(
                base,
                target,
                self.moved,
                self.parametrization,
                self.per_parameter,
                optimizer_values=self.optimizer_values,
                fingerprint=self.fingerprint,
            )
        except theory.PlanError as error:
            raise InputError(str(error)) from None

    def to_yaml(self) -> str:
        """The recipe as a file's text, with defaults written out so that it means the same for ever: see `plain`."""
        return f"# fingerprint: {self.fingerprint}\n" + dump_yaml(plain(self))


def recipe(content: object, *, source: str) -> Recipe:
    """Returns a recipe from plain values; `source` names them in messages.

    Raises:
        InputError: unknown key, wrong type, another version; names file, key and remedy.
    """
    return validated(Recipe, content, source=source)


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        InputError: as `recipe`, and for a file that cannot be read.
    """
    return recipe(read_yaml(path), source=str(path))


def save_recipe(content: Recipe, path: Path) -> None:
    """Writes a recipe file, whole or not at all."""
    write_atomically(path, content.to_yaml())
