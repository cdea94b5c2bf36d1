"""The state of a tensor in a forward pass: by which number it was multiplied since a weight or a product made it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Track:
    """The state of a tensor."""

    active: bool = False
    """It comes from a weight, and so is neither a mask nor a table of positions."""
    weight: bool = False
    """It is one, or a view of one."""
    factor: float | None = 1.0
    """By which it was multiplied since a weight or a product made it."""
    parts: frozenset[int] = frozenset()
    """The places, in the order of the pass, of the numbers in `factor`."""
    parameter: int | None = None
    """The storage of the parameter that it is a view of, or a choice among the matrices of."""
    lookup: int | None = None
    """The place, in the order of the pass, of the look-up that gave it and nothing else."""
    contracted: int | None = None
    """Of a product of two activations: the size of the side that it sums over."""

    def times(self, factor: float | None, part: int | None = None) -> "Track":
        """Returns the same multiplied by a number, None where that is not known; `part` is its place in the pass."""
        product = None if self.factor is None or factor is None else self.factor * factor
        return replace(self, factor=product, parts=self.parts if part is None else self.parts | {part})


PASSIVE = Track()
"""What no weight is in."""
MADE = Track(active=True)
"""What a weight or a product made, and nothing was done with since."""
NO_LONGER: Mapping[str, Any] = {"weight": False, "parameter": None, "lookup": None}
"""What a sum or a product of two tensors is not, whatever they were."""


def merged(tracks: Sequence[Track]) -> Track:
    """Returns what a sum or a concatenation is: as its parts, where they agree."""
    first = tracks[0]
    if all(track.factor == first.factor and track.contracted == first.contracted for track in tracks):
        return replace(first, parts=frozenset().union(*(track.parts for track in tracks)), **NO_LONGER)
    return MADE
