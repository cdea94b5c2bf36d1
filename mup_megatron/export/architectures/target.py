"""An architecture of transformers: which models it can be, its configuration, and where each of its tensors is from."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import READOUT_WEIGHT, WORD_EMBEDDINGS
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.export.folds import Fold, Rows
from mup_megatron.theory import Plan

__all__ = ["Carried", "Piece", "Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A tensor of the other model: rows of a trained one, all by default."""

    name: str
    shape: tuple[int, ...]
    source: str | None
    """The trained tensor; None for zeros, as a bias that the model does without."""
    rows: Rows | None = None
    transposed: bool = False
    """Whether it is stored as [in, out]."""
    shift: float = 0.0
    """What is added: 1 for a gain that is trained as its distance from 1."""
    single_precision: bool = False
    """Whether it is kept so, whatever the weights are stored in: what chooses experts."""


@dataclass(frozen=True, slots=True)
class Carried:
    """The multipliers of a plan that an architecture has itself."""

    names: frozenset[str] = frozenset()
    """As `Place.carries` has them."""
    keys: Mapping[str, float] = field(default_factory=dict)
    """What its configuration says of them."""


class Target(ABC):
    """An architecture of transformers."""

    name: ClassVar[str]
    """Its `model_type`."""
    model_class: ClassVar[str]
    requires: ClassVar[Mapping[str, Any]]
    """What a model file has to say for a model to be one: key → value."""
    prefix: ClassVar[str]
    """Of what stands before the head."""
    embedding: ClassVar[str]
    head: ClassVar[str] = "lm_head.weight"

    def problems(self, model: ModelFile) -> Iterator[str]:
        """Yields what a model has that this architecture has not, by key."""
        if architecture_of(model).name != "gpt":
            yield f"architecture {architecture_of(model).name}"
            return
        if model.custom_tensors:
            yield "custom_tensors"
        for key, wanted in self.requires.items():
            if (found := model.value_of(key)) != wanted:
                yield f"{key} {str(found).lower() if isinstance(found, bool) else found}"

    def softmax_scale(self, model: ModelFile) -> float:
        """Returns what its attention multiplies logits by, if its configuration says nothing else."""
        return 1.0 / math.sqrt(model.head_size)

    def carried(self, plan: Plan) -> Carried:
        """Returns the multipliers of a plan that its configuration has keys for."""
        return Carried()

    def own_folds(self, model: ModelFile) -> Sequence[Fold]:
        """Returns what its own constants ask of the weights, beside the multipliers."""
        return ()

    @abstractmethod
    def config(self, model: ModelFile) -> dict[str, Any]:
        """Returns its configuration, but for multipliers, special tokens and what every model says."""

    def tanh_gelu(self) -> dict[str, Any]:
        """Returns what its configuration says of a GELU that is approximated with tanh; nothing where it has none."""
        return {}

    @abstractmethod
    def layer(self, model: ModelFile, index: int) -> Iterator[Piece]:
        """Yields the tensors of a layer."""

    @abstractmethod
    def around(self, model: ModelFile) -> Iterator[Piece]:
        """Yields the tensors before and behind the layers, but for embedding and head."""

    def pieces(self, model: ModelFile) -> Iterator[Piece]:
        """Yields all tensors. A vocabulary is without its padding, and a tied head is no tensor of its own."""
        shape, rows = (model.vocab_size, model.hidden_size), (range(model.vocab_size),)
        yield Piece(name=f"{self.prefix}.{self.embedding}", shape=shape, source=WORD_EMBEDDINGS, rows=rows)
        for index in range(model.num_layers):
            yield from self.layer(model, index)
        yield from self.around(model)
        if not model.tied:
            yield Piece(name=self.head, shape=shape, source=READOUT_WEIGHT, rows=rows)
