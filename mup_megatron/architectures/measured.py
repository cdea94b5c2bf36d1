"""The modules of a model that a check looks at: what each is, what it is computed from, and where it is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = ["BIAS", "CONTEXT", "STREAM", "Kind", "Measured", "inside"]

STREAM = "the residual stream"
"""Stands among what a family's module reads for whatever the stream is at its place, which the whole model knows."""
CONTEXT = "what another stack gives"
"""Stands in the same way for what another stack gives to this one's layers, as an encoder to cross-attention."""
BIAS = "what is added to attention logits"
"""Stands in the same way for what is added to attention logits, as relative positions; in most models nothing."""


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

    def among(self, modules: Mapping[str, Sequence[str]]) -> "Measured":
        """Returns the same at its place in a model, where these modules are STREAM, CONTEXT and BIAS."""
        found = tuple(name for each in self.reads for name in modules.get(each, (each,)))
        return replace(self, reads=found)


def inside(module: str, panel: str, *reads: str) -> Measured:
    """Returns a module on the way to what a title means: a norm, a projection."""
    return Measured(module, Kind.HIDDEN, panel, reads)
