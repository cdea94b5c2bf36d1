"""Self-attention in plain torch."""

import math

import torch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import linear, norm


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
