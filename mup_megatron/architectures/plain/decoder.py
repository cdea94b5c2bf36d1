"""A whole language model of one stack in plain torch, its initial weights and its loss."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.architectures.families import Family
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import norm
from mup_megatron.architectures.plain.mtp import PlainMtp, PlainMtpLayer, shifted
from mup_megatron.architectures.registry import decoder_of


class PlainDecoder(nn.Module):
    """Tokens [batch, sequence] → logits [batch, sequence, padded vocabulary].

    Gains start at 1 (or at their distance from it, 0), biases at 0; matrices hold torch's defaults until drawn.

    Args:
        model: the shape. Norms are separate modules whatever its `transformer_impl`.
        embedding_multiplier: on token + position embedding.
        output_multiplier: on the readout's input.
        softmax_scale: on q·k; what the model uses by itself by default.
        make_readout: builds another readout, from the token embedding's weight; for comparisons with other packages.
        dtype: of all parameters.
    """

    def __init__(
        self,
        model: ModelFile,
        *,
        embedding_multiplier: float = 1.0,
        output_multiplier: float = 1.0,
        softmax_scale: float | None = None,
        make_readout: Callable[[nn.Parameter], nn.Module] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.embedding_multiplier = embedding_multiplier
        self.output_multiplier = output_multiplier
        self.embedding = Embedding(model)
        stock = 1.0 / math.sqrt(model.head_size) if model.stock_softmax_scale is None else model.stock_softmax_scale
        scale = stock if softmax_scale is None else softmax_scale
        self.decoder = PlainStack(model, scale)
        self.mtp_weight = model.mtp_loss_scaling_factor
        if model.mtp_num_layers is not None:
            families = decoder_of(model).layers(model)[-1]
            self.mtp = PlainMtp(
                [PlainMtpLayer(model, Layer(model, families, scale)) for _ in range(model.mtp_num_layers)]
            )
        table = self.embedding.word_embeddings.get_parameter("weight")
        self.output_layer: nn.Module
        if make_readout is not None:
            self.output_layer = make_readout(table)
        elif model.tied:
            self.output_layer = TiedReadout(table, output_multiplier)
        else:
            self.output_layer = Readout(model.hidden_size, model.padded_vocab_size(), output_multiplier)
        self.to(dtype)
        if model.tied:
            assert self.output_layer.weight is self.embedding.word_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output_layer(self.decoder(self.embedding_multiplier * self.embedding(tokens)))

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of the next token, and what multi-token prediction adds to it in training."""
        stream = self.decoder(self.embedding_multiplier * self.embedding(tokens))
        loss = cross_entropy(self.output_layer(stream), labels)
        layers = self.mtp.layers if hasattr(self, "mtp") else ()
        for further, layer in enumerate(layers, start=1):
            stream = layer(stream, self.embedding_multiplier * self.embedding(shifted(tokens, further)))
            # The last labels have nothing behind them that could be predicted.
            known = cross_entropy(self.output_layer(stream)[:, :-further], labels[:, further:])
            loss = loss + self.mtp_weight / len(layers) * known
        return loss


class Embedding(nn.Module):
    def __init__(self, model: ModelFile) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(model.padded_vocab_size(), model.hidden_size)
        if model.position_embedding_type == "learned_absolute":
            self.position_embeddings = nn.Embedding(model.positions, model.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.word_embeddings(tokens)
        if not hasattr(self, "position_embeddings"):
            return words
        return words + self.position_embeddings(torch.arange(tokens.shape[1], device=tokens.device))


class PlainStack(nn.Module):
    def __init__(self, model: ModelFile, softmax_scale: float) -> None:
        super().__init__()
        own = decoder_of(model)
        self.layers = nn.ModuleList(Layer(model, families, softmax_scale) for families in own.layers(model))
        self.final = own.final_norm
        self.add_module(self.final, norm(model, model.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
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

    def forward(self, x: Tensor) -> Tensor:
        for norm_name, name in self.branches:
            branch = self.get_submodule(name)(self.get_submodule(norm_name)(x))
            x = x + self.multipliers.get(name, 1.0) * branch
        return x


class Readout(nn.Linear):
    def __init__(self, hidden: int, vocabulary: int, multiplier: float) -> None:
        super().__init__(hidden, vocabulary, bias=False)
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.multiplier * x)


class TiedReadout(nn.Module):
    def __init__(self, table: nn.Parameter, multiplier: float) -> None:
        super().__init__()
        self.weight = table
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.multiplier * x, self.weight)


def draw_weights(model: nn.Module, std: Mapping[str, float], seed: int) -> None:
    """Fills every matrix with a std with std·N(0, 1), the same numbers for the same names, shapes, stds and seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name in std:
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(std[name] * draw)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss in the logits' own precision. (Megatron's cross-entropy goes through single precision.)"""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
