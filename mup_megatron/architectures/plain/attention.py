"""Attention in plain torch: to a stack's own tokens, and to those of another."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import linear, norm


@dataclass(frozen=True, slots=True)
class View:
    """The tokens and numbers that the layers of a stack see beside the stream."""

    causal: bool = True
    """Whether a token sees none of its own stack that comes later."""
    bias: Tensor | None = None
    """What is added to the logits between tokens of the stack, [head, query, key]."""
    context: Tensor | None = None
    """What another stack gives, [batch, position, channel]."""


CAUSAL = View()


class Attending(nn.Module, ABC):
    """A branch that looks at other tokens: it is called with a view, as others are not."""

    @abstractmethod
    def forward(self, x: Tensor, view: View) -> Tensor: ...


class SelfAttention(Attending):
    """Attention with grouped queries.

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

    def forward(self, x: Tensor, view: View) -> Tensor:
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
        return self.linear_proj(self.core_attention(q, k, v, view).transpose(1, 2).reshape(batch, length, -1))

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


class CrossAttention(Attending):
    """Attention to all tokens of another stack, as many heads of keys and values as of queries.

    The rows of `linear_kv` are grouped by head: its key, then its value.
    """

    def __init__(self, model: ModelFile, softmax_scale: float) -> None:
        super().__init__()
        self.heads, channels = model.num_attention_heads, model.num_attention_heads * model.head_size
        self.linear_q = linear(model.hidden_size, channels, bias=model.add_bias_linear)
        self.linear_kv = linear(model.hidden_size, 2 * channels, bias=model.add_bias_linear)
        self.core_attention = CoreAttention(softmax_scale)
        self.linear_proj = linear(channels, model.hidden_size, bias=model.add_bias_linear)

    def forward(self, x: Tensor, view: View) -> Tensor:
        assert view.context is not None
        k, v = self._by_head(self.linear_kv(view.context)).chunk(2, dim=-1)
        q = self._by_head(self.linear_q(x))
        attended = self.core_attention(q, k, v, View(causal=False))
        return self.linear_proj(attended.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CoreAttention(nn.Module):
    def __init__(self, softmax_scale: float) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.scale_mask_softmax = MaskedSoftmax()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, view: View = CAUSAL) -> Tensor:
        logits = self.softmax_scale * (q @ k.transpose(-1, -2))
        logits = logits if view.bias is None else logits + view.bias
        return self.scale_mask_softmax(logits, causal=view.causal) @ v


class MaskedSoftmax(nn.Module):
    """A module of its own, with Megatron's name, so that a hook on it sees the attention logits."""

    def forward(self, logits: Tensor, *, causal: bool) -> Tensor:
        if not causal:
            return logits.softmax(-1)
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        return logits.masked_fill(later, -math.inf).softmax(-1)
