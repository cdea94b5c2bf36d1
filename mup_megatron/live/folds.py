"""The part of a tensor that a fold changes."""

import torch

from mup_megatron.theory import Fold


def parts(tensor: torch.Tensor, fold: Fold) -> list[torch.Tensor]:
    """Returns views of what a fold multiplies in a tensor."""
    if fold.rows is None:
        return [tensor]
    return [tensor.narrow(fold.side, rows.start, len(rows)) for rows in fold.rows]
