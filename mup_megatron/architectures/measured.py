"""The modules of a model that a check looks at: what each is, what it is computed from, and where it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = ["STREAM", "Kind", "Measured", "inside"]

STREAM = "the residual stream"
"""Stands among what a family's module reads for whatever the stream is at its place, which the whole model knows."""


class Kind(StrEnum):
    """The part that a module has in a model."""

    TABLE = "embedding"
    STREAM = "residual stream"
    LOGITS = "attention logits"
    """What a softmax over positions takes in: looked at there, before it is masked."""
    BRANCH = "output of a branch"
    """What is added to the residual stream."""
    HIDDEN = "hidden"
    READOUT = "readout"


@dataclass(frozen=True, slots=True)
class Measured:
    """A module that is looked at: what it gives, or of logits what it takes in."""

    module: str
    """Its name in the whole model; of a norm, as where it is a module of its own."""
    kind: Kind
    panel: str
    """The title under which a picture shows it, as "Attention logits"; one is shown of those of a title."""
    reads: tuple[str, ...]
    """The measured modules that it is computed from, those that come first in the pass first; or `STREAM`."""
    leads: bool = False
    """Whether it is what its title means, and shown unless another of the title is off."""

    def after(self, stream: Sequence[str]) -> "Measured":
        """Returns the same where the residual stream is what these modules have given."""
        found = tuple(name for each in self.reads for name in (stream if each == STREAM else (each,)))
        return replace(self, reads=found)


def inside(module: str, panel: str, *reads: str) -> Measured:
    """Returns a module on the way to what a title means: a norm, a projection."""
    return Measured(module, Kind.HIDDEN, panel, reads)
