"""The sites where forward factors act: named places of a model, each with its factor and the reason for it.

An architecture says which places there are; the plan knows the factors. An adapter applies and verifies sites without
knowing why they are there.
"""

from dataclasses import dataclass
from enum import StrEnum


class Acts(StrEnum):
    """The part of a module that is multiplied."""

    INPUT = "input"
    """What it takes in: scales a weight and leaves its bias alone."""
    OUTPUT = "output"
    """What it gives: of a table, which has no input to scale, or of a residual branch."""
    BRANCH = "branch"
    """What its layer adds of it to the residual stream, where that is no module's output."""
    SCALE = "scale"
    """Nothing, but its own softmax scale is set to the factor."""


READOUT = "readout"
"""A place's `carries`: the multiplier of the model's output, whose weight may be a tied embedding's."""
SOFTMAX = "softmax"
"""A place's `carries`: the scale of attention logits."""
BRANCH = "residual branch"
"""A place's `carries`: the multiplier of what is added to the residual stream."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention."""

    size: int
    stock_scale: float | None = None
    """What it multiplies logits by if nothing is said; None for 1/√size."""


@dataclass(frozen=True, slots=True)
class Place:
    """A module of a model, by its global name, at which a factor acts."""

    module: str
    acts: Acts
    carries: str
    """The name of the parameter whose multiplier acts here; or READOUT, SOFTMAX or BRANCH."""
    heads: Heads | None = None
    """Of a SOFTMAX: its own, where the model has attentions of several kinds; None for the model's."""
    scale: float | None = None
    """In a plan, the factor of a place with heads of its own, and of a branch."""
    stack: str | None = None
    """Of a BRANCH: the stack whose depth it follows; None where it is in none."""
    stock: float | None = None
    """Of a BRANCH: what the model itself multiplies it by, relative to the base in a plan; None for 1."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place with its factor."""

    module: str
    acts: Acts
    factor: float
    stock: float
    """What the model uses here by itself; there is nothing to do where the factor is the same."""
    reason: str

    @property
    def changes(self) -> bool:
        """True where there is anything to do."""
        return self.factor != self.stock
