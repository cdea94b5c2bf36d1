"""The models of `decoder.py` in plain PyTorch: they compute what Megatron-Core's compute with its local layers.

Written from the models' definition, as what a live one is compared with: no Megatron, no plan, no rule of μP. Their
parameters have Megatron's names and layouts, so one `state_dict` fits both. Multipliers and the softmax scale are plain
numbers. No dropout, no parallelism, batch first.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.architectures.families import Family
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of


class PlainDecoder(nn.Module):
    """Tokens [batch, sequence] → logits [batch, sequence, padded vocabulary].

    Gains start at 1 (or at their distance from it, 0), biases at 0; matrices hold torch's defaults until drawn.

    Args:
        model: the shape. Norms are separate modules whatever its `transformer_impl`.
        embedding_multiplier: on token + position embedding.
        output_multiplier: on the readout's input.
        softmax_scale: on q·k; 1/√(head size) by default.
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
        scale = 1.0 / math.sqrt(model.head_size) if softmax_scale is None else softmax_scale
        self.decoder = PlainStack(model, scale)
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
        own = architecture_of(model)
        self.layers = nn.ModuleList(Layer(model, families, softmax_scale) for families in own.layers(model))
        self.final = own.final_norm.split(".")[1]
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
        for family in families:
            norm_name, name, branch = family.plain(model, softmax_scale)
            self.add_module(norm_name, norm(model, model.hidden_size))
            self.add_module(name, branch)
            self.branches.append((norm_name, name))

    def forward(self, x: Tensor) -> Tensor:
        for norm_name, name in self.branches:
            x = x + self.get_submodule(name)(self.get_submodule(norm_name)(x))
        return x


class SelfAttention(nn.Module):
    """Causal attention with grouped queries.

    The rows of `linear_qkv` are grouped by key/value head: the queries of a group, then its key, then its value.
    """

    def __init__(self, model: ModelFile, softmax_scale: float) -> None:
        super().__init__()
        self.groups, self.head_size = model.query_groups, model.head_size
        self.per_group = model.num_attention_heads // self.groups
        rows = self.groups * (self.per_group + 2) * self.head_size
        self.linear_qkv = linear(model.hidden_size, rows, bias=model.add_bias_linear or model.add_qkv_bias)
        if model.qk_layernorm:
            self.q_layernorm = norm(model, self.head_size)
            self.k_layernorm = norm(model, self.head_size)
        self.core_attention = CoreAttention(softmax_scale)
        queries = model.num_attention_heads * self.head_size
        self.linear_proj = linear(queries, model.hidden_size, bias=model.add_bias_linear)
        rotates = model.position_embedding_type == "rope"
        self.rotated = int(self.head_size * model.rotary_percent) if rotates else 0
        self.rotary_base = model.rotary_base

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.linear_qkv(x).view(batch, length, self.groups, self.per_group + 2, self.head_size)
        q, k, v = qkv.split([self.per_group, 1, 1], dim=3)
        if hasattr(self, "q_layernorm"):
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k = self._rotate(q), self._rotate(k)
        # [batch, head, position, channel], a group's key and value repeated for each of its queries
        q, k, v = (
            t.expand(-1, -1, -1, self.per_group, -1).reshape(batch, length, -1, self.head_size).transpose(1, 2)
            for t in (q, k, v)
        )
        return self.linear_proj(self.core_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [batch, position, group, head, channel]: channel i turns with channel i + rotated/2."""
        if not self.rotated:
            return x
        # Angles in single precision, as Megatron has them: a double-precision comparison has to round alike.
        frequency = 1.0 / self.rotary_base ** (torch.arange(0, self.rotated, 2, dtype=torch.float32) / self.rotated)
        angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequency)[:, None, None, :]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second, rest = x.split([self.rotated // 2, self.rotated // 2, self.head_size - self.rotated], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class CoreAttention(nn.Module):
    def __init__(self, softmax_scale: float) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.scale_mask_softmax = CausalSoftmax()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.scale_mask_softmax(self.softmax_scale * (q @ k.transpose(-1, -2))) @ v


class CausalSoftmax(nn.Module):
    """A module of its own, with Megatron's name, so that a hook on it sees the attention logits."""

    def forward(self, logits: Tensor) -> Tensor:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        return logits.masked_fill(later, -math.inf).softmax(-1)


class PlainMlp(nn.Module):
    """Exact GELU (with the error function), or SwiGLU whose first half of fc1's rows is the gate."""

    def __init__(self, model: ModelFile) -> None:
        super().__init__()
        self.gated = model.swiglu
        rows = 2 * model.ffn_size if model.swiglu else model.ffn_size
        self.linear_fc1 = linear(model.hidden_size, rows, bias=model.add_bias_linear)
        self.linear_fc2 = linear(model.ffn_size, model.hidden_size, bias=model.add_bias_linear)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_fc1(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.linear_fc2(functional.silu(gate) * up)
        return self.linear_fc2(functional.gelu(x))


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


class ZeroCentered(nn.Module):
    """A norm whose gain is stored as its distance from 1."""

    def __init__(self, plain: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        assert plain.eps is not None
        self.size, self.eps = plain.normalized_shape, plain.eps
        self.weight = nn.Parameter(torch.zeros_like(plain.weight))
        self.bias = nn.Parameter(torch.zeros_like(plain.weight)) if isinstance(plain, nn.LayerNorm) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return functional.rms_norm(x, self.size, 1 + self.weight, self.eps)
        return functional.layer_norm(x, self.size, 1 + self.weight, self.bias, self.eps)


def norm(model: ModelFile, size: int) -> nn.Module:
    plain = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[model.normalization](size, eps=model.norm_epsilon)
    return ZeroCentered(plain) if model.apply_layernorm_1p else plain


def linear(fan_in: int, fan_out: int, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def draw_weights(model: nn.Module, std: Mapping[str, float], seed: int) -> None:
    """Fills every matrix with std·N(0, 1), the same numbers for the same names, shapes, stds and seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(std[name] * draw)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss in the logits' own precision. (Megatron's cross-entropy goes through single precision.)"""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
