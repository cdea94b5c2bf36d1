"""The cost of training a model: parameters and FLOPs, itemised, from its model file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, shapes_of
from mup_megatron.theory import Tensor

__all__ = ["Flops", "active_parameter_count", "parameter_count", "training_flops"]


def parameter_count(model: ModelFile) -> int:
    """Returns the number of all parameters, embeddings and padding included."""
    return sum(math.prod(tensor.shape) for tensor in _tensors(model))


def active_parameter_count(model: ModelFile) -> int:
    """Returns the number of parameters that a token passes: of experts, of those that are chosen."""
    return round(sum(math.prod(tensor.shape) * tensor.share for tensor in _tensors(model)))


@lru_cache(maxsize=2)
def _tensors(model: ModelFile) -> Sequence[Tensor]:
    """Returns all tensors, of which a model with experts has tens of thousands."""
    shape, _ = shapes_of(model, model)
    return shape.tensors


@dataclass(frozen=True, slots=True)
class Flops:
    """Training FLOPs for one token: forward and backward, 6 for each weight that the token passes (2 + 4).

    Attention scores are counted without halving for the causal mask, as is usual (PaLM, arXiv 2204.02311, App. B).
    Norms, biases, softmax and recomputation are left out.
    """

    items: Mapping[str, float]
    """By what they are spent on: "attention_projections", "attention_scores", "mlp", "router", "experts", "readout"."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.items.values())


def training_flops(model: ModelFile) -> Flops:
    """Returns FLOPs per token of training `model` at its sequence length."""
    return Flops(architecture_of(model).flops(model))
