"""What a parameter is to μP: its two sides, which of them grow with width, and so its role.

Not how models are built: `models/` lists a model's parameters in these terms.
"""

import math
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """The role of a parameter, from which of its sides grow with width (TP5, App. B.1)."""

    INPUT = "input"
    """finite → infinite: embeddings; biases and norm gains too, whose fan_in is 1."""
    HIDDEN = "hidden"
    """infinite → infinite."""
    OUTPUT = "output"
    """infinite → finite: the LM head."""
    SCALAR = "scalar"
    """finite → finite: a readout's bias, a q/k-norm gain at a fixed head size."""


class Kind(StrEnum):
    """What a parameter does in the model: decides its stock initialisation and which tuned multiplier it carries."""

    EMBEDDING = "embedding"
    """A lookup table; carries the embedding multiplier α_in."""
    WEIGHT = "weight"
    """A matrix, drawn with σ."""
    RESIDUAL = "residual"
    """A matrix that writes into the residual stream, drawn with σ/√(2L) as Megatron does."""
    HEAD = "head"
    """The readout; carries the output multiplier α_out."""
    BIAS = "bias"
    """A vector that starts at a constant and has no weight decay, as in Megatron."""
    GAIN = "gain"
    """A norm's gain; else as a bias. It starts at 1, or at 0 where it is stored as the distance from 1."""

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias or gain."""
        return self in (Kind.BIAS, Kind.GAIN)


@dataclass(frozen=True, slots=True)
class Dimension:
    """One side of a weight: its global size and whether it grows with width."""

    size: int
    infinite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a model that is not split over ranks: global name, global shape.

    For y = W x, `fan_in` is the size of x and `fan_out` the size of y. A table of V embeddings of size h is a
    matrix that multiplies a one-hot vector: fan_in V, fan_out h.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    fan_in: Dimension
    fan_out: Dimension
    init_value: float | None = None
    """The constant that it starts at; None for what is drawn at random."""
    init_std: float | None = None
    """The std with which its library draws it at this shape; the base's already with the tuned scale. None for a
    constant, and for what is drawn as Megatron does, from the tuned σ."""
    name_at_base: str | None = None
    """What the base calls it, where that differs: the name that a recipe's patterns mean."""
    padded_to: int | None = None
    """The first dimension is a vocabulary, padded to a multiple of this times the tensor parallelism; here without."""

    def __post_init__(self) -> None:
        assert self.init_value is None or self.init_std is None, self.name
        assert not self.kind.is_vector or (self.init_value, self.init_std) != (None, None), self.name

    @property
    def role(self) -> Role:
        """The role that follows from the two sides."""
        match (self.fan_in.infinite, self.fan_out.infinite):
            case (False, True):
                return Role.INPUT
            case (True, True):
                return Role.HIDDEN
            case (True, False):
                return Role.OUTPUT
            case _:
                return Role.SCALAR


@dataclass(frozen=True, slots=True)
class Ratios:
    """How much wider the two sides of a parameter are at the target than at the base; 1 for a finite side."""

    r_in: float
    r_out: float


def ratios(base: Parameter, target: Parameter) -> Ratios:
    """r_in and r_out of one tensor. Per tensor, never one ratio for the model: heads, ffn and hidden may scale apart.

    Source: TP5, App. B.1 (width multipliers of each dimension); SC §3 for the per-tensor form.
    """
    return Ratios(_ratio(base.fan_in, target.fan_in), _ratio(base.fan_out, target.fan_out))


def _ratio(base: Dimension, target: Dimension) -> float:
    assert base.infinite == target.infinite
    return target.size / base.size if target.infinite else 1.0


def default_softmax_scale(head_size: int) -> float:
    """1/√d, what attention uses where nothing else is said."""
    # The same expression as Megatron's, so that an unchanged scale is bitwise unchanged.
    return 1.0 / math.sqrt(head_size)
