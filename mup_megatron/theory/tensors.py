"""A tensor as μP sees it: two declared sides, which of them grow with width, properties, start and parts.

Not how models are built: `architectures/` states a model's tensors in these terms, `modules/` reads them from a module.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from mup_megatron.theory.errors import PlanError


class Role(StrEnum):
    """The role of a tensor, from which of its sides grow with width (TP5, App. B.1)."""

    INPUT = "input"
    """finite → infinite: embeddings; biases and norm gains too, whose fan_in is 1."""
    HIDDEN = "hidden"
    """infinite → infinite; also a bottleneck inside the model, one of whose sides keeps its size."""
    OUTPUT = "output"
    """infinite → finite: a language model's readout, a router."""
    SCALAR = "scalar"
    """finite → finite: a readout's bias, a q/k-norm gain at a fixed head size."""


class Property(StrEnum):
    """A property of a tensor besides its role. They combine: an expert's output is `EXPERT` and `RESIDUAL`."""

    EMBEDDING = "embedding"
    """A table whose rows are looked up; carries the embedding multiplier α_in."""
    READOUT = "readout"
    """Computes the model's output; carries the output multiplier α_out."""
    RESIDUAL = "residual"
    """Writes into the residual stream: drawn with a further 1/√(number of residual branches), as Megatron does."""
    EXPERT = "expert"
    """One of several that share the tokens."""
    ROUTER = "router"
    """Chooses experts: an output, unless a recipe takes it for hidden."""
    FOLDED = "folded"
    """Its role's multiplier stands in its weight and in what the optimizer does with it, not in the forward pass."""
    VECTOR = "vector"
    """A bias or gain: starts at a constant and has no weight decay, as in Megatron."""
    GAIN = "gain"
    """A vector that multiplies: it starts at 1, or at 0 where it is stored as the distance from 1."""
    OPTIONAL = "optional"
    """Some versions of its library have it, others do not."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a weight: its global size, and whether it grows with width."""

    size: int
    grows: bool = False
    leading: int | None = None
    """Of a fused side, the rows that say how much it grows, where others keep their number; None for all."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor starts at this value."""

    value: float


@dataclass(frozen=True, slots=True)
class Normal:
    """A tensor is drawn from N(0, σ²), σ the tuned `init_method_std`."""


@dataclass(frozen=True, slots=True)
class LibraryDraw:
    """A tensor is drawn by its library with this std at this shape; the base's already has the tuned scale."""

    std: float


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor keeps its library's own start, which is neither a constant nor N(0, σ²)."""


Start = Constant | Normal | LibraryDraw | Kept
"""The start of a tensor."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the rows of a fused tensor, as its queries, keys or values."""

    name: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of a model that is not split over ranks: global name, global shape.

    For y = W x, `fan_in` is the size of x and `fan_out` the size of y. They are declared, not read from the shape: a
    convolution's fan_in counts its kernel, a batch of experts has the sides of one. A table of V embeddings of size h
    is a matrix that multiplies a one-hot vector: fan_in V, fan_out h.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: Side
    fan_out: Side
    properties: frozenset[Property] = frozenset()
    declared_role: Role | None = None
    """Its role where the sides alone do not say it: a bottleneck inside the model is hidden at every rank."""
    stack: str = ""
    """The stack of layers that it is in, a key of `ModelShape.stacks`; empty outside of all."""
    deepens: bool = True
    """Whether it is in one of the layers that a deeper stack has more of: those behind it are as many at any depth."""
    start: Start = Normal()
    parts: tuple[Part, ...] = ()
    """Of a fused tensor, in any order: their rows add up to its fan_out."""
    name_at_base: str | None = None
    """Its name at the base, where that differs: the one that a recipe's patterns mean."""
    padded_to: int | None = None
    """The first dimension is a vocabulary, padded to a multiple of this times the tensor parallelism; here without."""
    share: float = 1.0
    """The part of the tokens that it sees: k/E of one of E experts where each token chooses k."""
    stock_multiplier: float = 1.0
    """What its model multiplies it by, if nothing is said; of a table, its rows."""
    stepped_as_matrix: bool | None = None
    """Whether an optimizer of matrices steps it; None where its shape and properties say so: see `matrices.py`."""
    stepped_by_parts: bool = False
    """Whether such an optimizer takes each of its parts for a matrix by itself."""
    runs: int = 1
    """How often its rows run through its parts: those of linear_qkv once for each group of keys and values."""

    def __post_init__(self) -> None:
        if math.prod(self.shape) % max(1, self.fan_in.size * self.fan_out.size):
            raise PlanError(
                f"{self.name}: a shape of {self.shape} is no whole number of matrices from {self.fan_in.size} to "
                f"{self.fan_out.size}. Correct the shape, or the sides that are declared."
            )
        if {Property.READOUT, Property.EMBEDDING} <= self.properties:
            raise PlanError(f"{self.name}: a readout and an embedding at once. A tied table is an embedding.")
        assert not self.parts or sum(part.rows for part in self.parts) == self.fan_out.size, self.name
        assert Property.VECTOR not in self.properties or not isinstance(self.start, Normal), self.name

    @property
    def role(self) -> Role:
        """The declared role, or the one that follows from the two sides."""
        if self.declared_role is not None:
            return self.declared_role
        match (self.fan_in.grows, self.fan_out.grows):
            case (False, True):
                return Role.INPUT
            case (True, True):
                return Role.HIDDEN
            case (True, False):
                return Role.OUTPUT
            case _:
                return Role.SCALAR
