"""What no check can train: models that stay wide however narrow they are made, as with heads of a million channels."""

import math
from collections.abc import Mapping, Sequence

from mup_megatron.errors import InputError

LARGEST = 2**26
"""Numbers in the largest weight of the widest model. With heads of 512 channels it has 2**24."""


def require_trainable(shapes: Mapping[str, Sequence[int]], width: int) -> None:
    """Raises InputError if a weight of the widest model is larger than a check can train.

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
