"""The values that are tuned at a base, as a recipe says them, with schedule, overrides and the rules in use."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mup_megatron import theory
from mup_megatron.validation import Strict, added, quoted

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

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's two, as torch's optimizers take them."""
        return self.adam_beta1, self.adam_beta2


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
