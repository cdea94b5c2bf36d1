"""The recipe: what is transferred. Reads, checks, fingerprints and writes `*.recipe.yaml`, and makes plans from it.

Not the rules (`theory/`) and not the search for good values (`search/`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from mup_megatron import theory
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import AnyModelFile, shapes_of
from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.horizon import Horizon, Training
from mup_megatron.validation import Strict, added, plain, quoted, validated
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

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
LONGEST_SCHEDULE = 1e6
"""In runs: more is a mistake, and far more would not be counted exactly."""


class Hyperparameters(Strict):
    """The values that were tuned at the base. Defaults are Megatron-LM's; the learning rate has none."""

    lr: Positive
    min_lr: NotNegative = 0.0
    init_method_std: Positive = 0.02
    embedding_multiplier: Positive = 1.0
    """On token + position embedding, before dropout."""
    output_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    residual_multiplier: Positive = added("0.2", 1.0)
    """On every residual branch."""
    weight_decay: NotNegative = 0.01
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.999
    adam_eps: Positive = 1e-8
    sgd_momentum: Beta = 0.9
    muon_momentum: Beta = added("0.2", 0.9)
    muon_nesterov: bool = added("0.2", False)
    muon_scale_mode: Literal[*theory.SCALE_MODES] = added("0.2", theory.DEFAULT_SCALE_MODE)  # type: ignore[valid-type]
    """How the update's size follows a matrix's shape by itself; the rules are relative to it."""
    muon_extra_scale_factor: Positive = added("0.2", 1.0)
    muon_num_ns_steps: Annotated[int, Field(gt=0)] = added("0.2", 5)
    """Newton-Schulz iterations."""
    muon_coefficient_type: Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"] = added(
        "0.2", "quintic"
    )
    muon_tp_mode: Literal["duplicated", "distributed", "blockwise"] = added("0.2", "duplicated")
    """Unlike Megatron-LM's, which is blockwise: that is another optimizer at each tensor parallelism."""
    clip_grad: NotNegative = 1.0
    """Threshold of the global gradient norm; 0 turns clipping off."""

    @model_validator(mode="after")
    def _ordered(self) -> "Hyperparameters":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}. Lower it.")
        return self


class Schedule(Strict):
    """The learning rate over the run, in fractions of it, in Megatron-LM's terms.

    A fraction above 1 lies beyond the run: the beginning of a long schedule.
    """

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    lr_warmup_fraction: Annotated[float, Field(ge=0, le=LONGEST_SCHEDULE)] = 0.0
    lr_decay_fraction: Annotated[float, Field(gt=0, le=LONGEST_SCHEDULE)] = 1.0
    """Where the decay has reached the floor."""
    lr_wsd_decay_fraction: Annotated[float, Field(gt=0, le=LONGEST_SCHEDULE)] = 0.1
    """WSD only: length of the final decay."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"

    @model_validator(mode="after")
    def _ordered(self) -> "Schedule":
        if self.lr_warmup_fraction >= self.lr_decay_fraction:
            raise ValueError(
                f"lr_warmup_fraction {self.lr_warmup_fraction:g} does not end before lr_decay_fraction "
                f"{self.lr_decay_fraction:g}. Shorten the warm-up."
            )
        room = self.lr_decay_fraction - self.lr_warmup_fraction
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_fraction > room:
            raise ValueError(
                f"lr_wsd_decay_fraction {self.lr_wsd_decay_fraction:g} is longer than the {room:g} between warm-up and "
                "lr_decay_fraction. Shorten it."
            )
        if self.lr_decay_style == "inverse-square-root" and self.lr_warmup_fraction == 0:
            raise ValueError(
                "lr_decay_style inverse-square-root is measured from the end of the warm-up. Give lr_warmup_fraction."
            )
        return self


class PerParameter(Strict):
    """A tensor's own tuned factors, relative to the rule; the first entry that matches a name wins."""

    match: Annotated[str, Field(min_length=1)]
    """Shell pattern on the whole name, as `embedding.*` or `*.linear_fc2.weight`."""
    lr_mult: Positive = 1.0
    init_mult: NotNegative = 1.0
    """0 starts a weight at zero, as TP5 App. D.2 advises for the readout."""
    multiplier: Positive = 1.0


def _known_optimizer(name: str) -> str:
    if name not in theory.optimizers():
        *first, last = (f"'{each}'" for each in theory.optimizers())
        raise ValueError(f"should be {', '.join(first)} or {last}, found {quoted(name)}. Correct this value.")
    return name


class Depth(Strict):
    """The rule by which the layers of a deeper stack follow its depth."""

    rule: Literal["completep"] = "completep"
    alpha: Annotated[float, Field(ge=0.5, le=1)] = 1.0
    """Each branch is multiplied by (L/L_base)^-alpha: 1 as its authors found it best, ½ as before them."""


class Parametrization(Strict):
    """The rules that carry the hyperparameters from base to target."""

    rule: Literal["mup", "standard"] = "mup"
    optimizer: Annotated[str, AfterValidator(_known_optimizer)] = theory.ADAM.name
    weight_decay_exponent: Fraction = 1.0
    """λ·r_in^exponent for hidden weights: 1 keeps AdamW's averaging timescale, 0 leaves λ alone."""
    router: Literal["output", "hidden"] = added("0.2", "output")
    """The role of what chooses experts: an output's logits shrink with width at the start, as a readout's; hidden is
    what native μP takes it for."""
    depth: Depth | None = added("0.2", None)
    """None: depth changes nothing."""


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
    """The hyperparameters with those of `values` that a rule of the horizon moves, moved."""
    return h if factors == theory.Factors() else h.model_copy(update=factors.moved(values))


_DECAYING = ("linear", "cosine")


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
                tuned = self.provenance.get("tuned")
                if isinstance(tuned, Mapping):
                    self.horizon.require_not_moved(self.hyperparameters.model_dump(), tuned, self.factors)
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
        decays = self.schedule.lr_decay_style in _DECAYING and self.schedule.lr_decay_fraction <= 1.0
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
            return self._plan(base, target)
        except theory.PlanError as error:
            raise InputError(str(error)) from None

    def _plan(self, base_shape: theory.ModelShape, target_shape: theory.ModelShape) -> theory.Plan:
        h, depth = self.moved, self.parametrization.depth
        return theory.build_plan(
            base_shape,
            target_shape,
            theory.Tuned(
                lr=h.lr,
                min_lr=h.min_lr,
                init_method_std=h.init_method_std,
                embedding_multiplier=h.embedding_multiplier,
                output_multiplier=h.output_multiplier,
                attention_multiplier=h.attention_multiplier,
                weight_decay=h.weight_decay,
                adam_eps=h.adam_eps,
                residual_multiplier=h.residual_multiplier,
            ),
            rules_used=theory.Rules(
                rule=theory.Rule(self.parametrization.rule),
                optimizer=theory.optimizers()[self.parametrization.optimizer].given(h.model_dump()),
                weight_decay_exponent=self.parametrization.weight_decay_exponent,
                router=theory.Role(self.parametrization.router),
                depth=None if depth is None else theory.CompleteP(depth.alpha),
            ),
            overrides=[theory.Override(**own.model_dump()) for own in self.per_parameter],
            fingerprint=self.fingerprint,
        )

    def to_yaml(self) -> str:
        """The recipe as a file's text, with defaults written out so that it means the same for ever: see `plain`."""
        return f"# fingerprint: {self.fingerprint}\n" + dump_yaml(plain(self))


def recipe(content: object, *, source: str) -> Recipe:
    """A recipe from plain values; `source` names them in messages.

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
