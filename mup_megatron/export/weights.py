"""A trained model as an export takes it: its plan, weights that are read one at a time, and what becomes of them.

Whoever reads a kind of checkpoint makes a `TrainedModel` of it, as `Source` is of a model file's; all else in this
package knows no kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import is_of_mtp
from mup_megatron.errors import InputError
from mup_megatron.export.architectures.registry import choose, folds_for
from mup_megatron.export.architectures.target import Piece, Target
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Fold, Plan, PlanEntry, Property


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
class Outline:
    """The model of transformers that a trained one becomes, before a weight is read."""

    architecture: str
    vocab_size: int
    config: Mapping[str, Any]
    """Its configuration, but for the type of the weights. Special tokens that it says are those of its tokenizer."""
    carried: Mapping[str, float]
    """The multipliers that are in there, by its keys."""
    pieces: Sequence[Piece]
    folds: Sequence[Fold]
    """What is done to the trained tensors that the pieces are of."""
    left_out: Sequence[str] = ()
    """What is not part of the model any more, in words."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel(ABC):
    """A trained model: the plan it was trained with, and its weights."""

    plan: Plan
    weights: Weights
    described: str
    """The checkpoint, for messages and for what is written."""
    folder: Path | None = None
    """Where it lies, if it does; nothing is written in there."""

    @abstractmethod
    def require_whole(self) -> None:
        """Raises InputError unless every parameter of the plan is there in its shape."""

    @abstractmethod
    def outline(self, architecture: str | None) -> Outline:
        """Returns what it becomes.

        Args:
            architecture: of transformers; None for the one that leaves most weights as they are.

        Raises:
            InputError: it cannot become that one, or any.
        """


@dataclass(frozen=True, kw_only=True)
class Source(TrainedModel):
    """A trained model that a model file describes; weights have the names of Megatron's."""

    model: ModelFile
    tanh_gelu: bool = False
    """Whether its GELU is the approximation with tanh, and not the exact one; of no account in other MLPs."""

    def outline(self, architecture: str | None) -> Outline:
        """Returns the architecture that has all of it, and which rows of its tensors are what there."""
        model = self.model
        target = choose(model, self.plan, architecture)
        carried, of_plan = folds_for(target, model, self.plan)
        pieces = [*target.pieces(model)]
        used = {piece.source for piece in pieces}
        self._require_all_used(target, used)
        own = {
            "architectures": [target.model_class],
            "model_type": target.name,
            "vocab_size": model.vocab_size,
            "tie_word_embeddings": model.tied,
            "initializer_range": model.init_method_std,
            **target.config(model),
            **(target.tanh_gelu() if self.tanh_gelu else {}),
            **carried.keys,
            "use_cache": True,
        }
        return Outline(
            architecture=target.name,
            vocab_size=model.vocab_size,
            config=own,
            carried=carried.keys,
            pieces=pieces,
            folds=[each for each in of_plan if each.tensor in used],
            left_out=("layers of multi-token prediction",) if model.mtp_num_layers else (),
        )

    def _require_all_used(self, target: Target, used: Collection[str | None]) -> None:
        """Raises InputError if an architecture leaves out a parameter: the model would run, and answer otherwise."""
        lost = next((e.name for e in self.plan.entries if e.name not in used and not is_of_mtp(e.name)), None)
        if lost is not None:
            raise InputError(
                f"{self.described}: {target.name} has no place for {lost}, and without it is another model."
            )

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


def require_fingerprint(recipe: Recipe, found: str, *, recipe_source: str, trained: Path, remedy: str) -> None:
    """Raises InputError unless a checkpoint was trained with this recipe.

    Args:
        recipe: that is given.
        found: the fingerprint of the one that it was trained with.
        recipe_source: what the given one is called in messages.
        trained: the checkpoint.
        remedy: which one to give, as a sentence.
    """
    if found != recipe.fingerprint:
        raise InputError(
            f"{recipe_source}: its fingerprint is {recipe.fingerprint[:12]}…, and {trained} was trained with another "
            f"recipe, {found[:12]}…. {remedy}"
        )
