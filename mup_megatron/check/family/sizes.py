"""The sizes of a check's small models, whatever they are of; and what no check can train."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from mup_megatron.check.entries import is_vector
from mup_megatron.errors import InputError
from mup_megatron.theory import Plan

SMALLEST = 32
"""Below this a width says more about itself than about the limit of many."""
HEAD_SIZE = 16
"""Size of heads that do not grow. Smaller where ranks or groups share them, or the narrowest model would have to be
wider."""
DEPTH = 4
"""Layers that are trained, of more. All of a target's are looked at once: see `verdict/depth.py`."""
VOCABULARY = 256
SEQUENCE = 32
LARGEST = 2**26
"""Numbers in the largest weight of the widest model. With heads of 512 channels it has 2**24."""
ELEMENTS = 4096
"""Of the smallest matrix of a layer, if that can be had: then an initial std that is off by 10 % shows."""


def require_trainable(shapes: Mapping[str, Sequence[int]], width: int) -> None:
    """Raises InputError if a weight of the widest model is larger than a check can train: models that stay wide however
    narrow they are made, as with heads of a million channels.

    Args:
        shapes: of the model's weights, by name.
        width: the model's.
    """
    for name, shape in shapes.items():
        if (count := math.prod(shape)) > LARGEST:
            raise InputError(
                f"{name} would have {count:.2g} numbers in the check's widest model, of width {width}, and "
                f"{LARGEST:.2g} can be trained here. Heads, and what does not grow with width, cannot be cut: give "
                "a target with smaller ones, or smaller --widths."
            )


def narrowest(widths: Iterable[int], plan: Callable[[int], Plan]) -> tuple[int, Plan]:
    """The narrowest of some widths at which every matrix has enough elements, with its plan; the widest if none has."""
    found = [(width, plan(width)) for width in sorted(widths)[:1]]
    for width in sorted(widths)[1:]:
        if _smallest(found[-1][1]) >= ELEMENTS:
            break
        found.append((width, plan(width)))
    return found[-1]


def _smallest(plan: Plan) -> int:
    drawn = [math.prod(e.shape) for e in plan.entries if e.init_std and len(e.shape) > 1 and not is_vector(e)]
    return min(drawn, default=ELEMENTS)
