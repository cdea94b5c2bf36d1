"""The data that the models of a check learn: made on the spot, the same for everybody who asks with the same seed."""

from collections.abc import Mapping

import torch
from torch import Tensor

PROBE = -1
"""The batch on which activations are compared. No step trains on it."""


def tokens(vocabulary: int, length: int, size: int, *, seed: int, step: int) -> Tensor:
    """Sequences [size, length + 1] that count up from a random start, mostly by one: there is something to learn at
    once, and something that never ends.
    """
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFFFFFF)
    start = torch.randint(vocabulary, (size, 1), generator=generator)
    strides = 1 + (torch.rand(size, length + 1, generator=generator) < 0.25).long()
    return (start + strides.cumsum(1)) % vocabulary


def samples(tokens: Tensor) -> Mapping[str, Tensor]:
    """Returns sequences, or one, as data sets give them: what is read, and what comes next at each place."""
    read = tokens[..., :-1]
    positions = torch.arange(read.shape[-1]).expand_as(read)
    return {
        "tokens": read,
        "labels": tokens[..., 1:],
        "loss_mask": torch.ones(read.shape),
        "position_ids": positions,
    }
