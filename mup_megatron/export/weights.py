"""A trained model as an export takes it: its model file, its plan, and weights that are read one at a time.

Whoever reads a kind of checkpoint makes a `Source` of it; all else in this package knows no kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.theory import Plan, PlanEntry, Property


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint, before it is read."""

    shape: tuple[int, ...]
    """Global, whatever layout the run had."""
    dtype: torch.dtype


class Weights(Protocol):
    """The tensors of a checkpoint under the plan's names, whoever held which part of them.

    Beside the plan's there may be buffers, as the `mlp.router.expert_bias` of a layer. Nothing is loaded before it is
    asked for.
    """

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Everything that there is, by global name."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor, whole.

        Raises:
            InputError: it is damaged.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trained model: the shape, the plan it was trained with, and its weights."""

    model: ModelFile
    plan: Plan
    weights: Weights
    described: str
    """The checkpoint, for messages and for what is written."""
    folder: Path | None = None
    """Where it lies, if it does; nothing is written in there."""
    tanh_gelu: bool = False
    """Whether its GELU is the approximation with tanh, and not the exact one; of no account in other MLPs."""

    def require_whole(self) -> None:
        """Raises InputError unless every parameter of the plan is there in its shape, a vocabulary padded or not."""
        for entry in self.plan.entries:
            found = self.weights.stored.get(entry.name)
            if found is None and Property.OPTIONAL in entry.properties:
                continue
            if found is None:
                raise InputError(
                    f"{self.described}: has no {entry.name}, which the recipe's plan has. Give the recipe and the "
                    "checkpoint of one run."
                )
            if not _fits(found.shape, entry):
                raise InputError(
                    f"{self.described}: {entry.name} has the shape {list(found.shape)}, and the plan says "
                    f"{list(entry.shape)}. Give the recipe and the checkpoint of one run."
                )


def _fits(shape: tuple[int, ...], entry: PlanEntry) -> bool:
    if entry.padded_to is None or len(shape) != len(entry.shape):
        return shape == entry.shape
    return shape[1:] == entry.shape[1:] and shape[0] >= entry.shape[0] - entry.padded_to + 1
