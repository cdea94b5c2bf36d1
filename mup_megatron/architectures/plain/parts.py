"""The parts of plain models: embeddings, stacks of layers of families, readouts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.architectures.families import Family
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.attention import CAUSAL, Attending, View
from mup_megatron.architectures.plain.common import norm
from mup_megatron.architectures.registry import architecture_of


class Embedding(nn.Module):
    """The sum of all tables.

    Args:
        model: its vocabulary and positions.
        types: of tokens, each with an embedding of its own; 0 for none.
    """

    def __init__(self, model: ModelFile, types: int = 0) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(model.padded_vocab_size(), model.hidden_size)
        if model.position_embedding_type == "learned_absolute":
            self.position_embeddings = nn.Embedding(model.positions, model.hidden_size)
        if types:
            self.tokentype_embeddings = nn.Embedding(types, model.hidden_size)

    def forward(self, tokens: Tensor, types: Tensor | None = None) -> Tensor:
        found: Tensor = self.word_embeddings(tokens)
        if hasattr(self, "position_embeddings"):
            found = found + self.position_embeddings(torch.arange(tokens.shape[1], device=tokens.device))
        return found if types is None else found + self.tokentype_embeddings(types)


class PlainStack(nn.Module):
    """The layers of one of a model's stacks, and its final norm."""

    def __init__(self, model: ModelFile, stack: str, softmax_scale: float) -> None:
        super().__init__()
        own = architecture_of(model)
        self.layers = nn.ModuleList(Layer(model, families, softmax_scale) for families in own.stacks(model)[stack])
        self.final = own.final_norm
        self.add_module(self.final, norm(model, model.hidden_size))

    def forward(self, x: Tensor, view: View = CAUSAL) -> Tensor:
        for layer in self.layers:
            x = layer(x, view)
        return self.get_submodule(self.final)(x)


class Layer(nn.Module):
    """Pre-LN: each family's branch reads a norm of the residual stream and adds to the stream."""

    def __init__(self, model: ModelFile, families: Sequence[Family], softmax_scale: float) -> None:
        super().__init__()
        self.branches = []
        self.multipliers: dict[str, float] = {}
        """Of branches, by name; 1 for those that are not here."""
        for family in families:
            norm_name, name, branch = family.plain(model, softmax_scale)
            self.add_module(norm_name, norm(model, model.hidden_size))
            self.add_module(name, branch)
            self.branches.append((norm_name, name))

    def forward(self, x: Tensor, view: View = CAUSAL) -> Tensor:
        for norm_name, name in self.branches:
            branch, normed = self.get_submodule(name), self.get_submodule(norm_name)(x)
            added = branch(normed, view) if isinstance(branch, Attending) else branch(normed)
            x = x + self.multipliers.get(name, 1.0) * added
        return x


class Readout(nn.Linear):
    """A readout with a weight of its own, and a multiplier on its input."""

    def __init__(self, hidden: int, outputs: int, multiplier: float, *, bias: bool = False) -> None:
        super().__init__(hidden, outputs, bias=bias)
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.multiplier * x)


class TiedReadout(nn.Module):
    """A readout with the weight of a table, and a multiplier on its input."""

    def __init__(self, table: nn.Parameter, multiplier: float, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = table
        self.bias = nn.Parameter(torch.zeros(len(table))) if bias else None
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.multiplier * x, self.weight, self.bias)


def readout(model: ModelFile, embedding: Embedding, multiplier: float, *, bias: bool = False) -> nn.Module:
    """Returns the readout of a model's logits, tied or not."""
    if model.tied:
        return TiedReadout(embedding.word_embeddings.get_parameter("weight"), multiplier, bias=bias)
    return Readout(model.hidden_size, model.padded_vocab_size(), multiplier, bias=bias)


def scale_of(model: ModelFile, softmax_scale: float | None) -> float:
    """Returns the scale of attention logits: what is said, or what the model uses by itself."""
    stock = 1.0 / math.sqrt(model.head_size) if model.stock_softmax_scale is None else model.stock_softmax_scale
    return stock if softmax_scale is None else softmax_scale
