"""Latent attention in plain torch."""

import math

import torch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.attention import CoreAttention
from mup_megatron.architectures.plain.common import linear, norm

_TRAINED_LENGTH, _FAST, _SLOW = 4096, 32.0, 1.0
"""Of YaRN: the length before it was extended, and the turns within it between which frequencies are mixed."""


class PlainLatentAttention(nn.Module):
    """Causal attention with queries, keys and values from latents; one turned key is shared by all heads."""

    def __init__(self, model: ModelFile, softmax_scale: float) -> None:
        super().__init__()
        self.heads, self.content, self.turned = model.num_attention_heads, model.qk_head_dim, model.qk_pos_emb_head_dim
        self.values, self.rank = model.v_head_dim, model.kv_lora_rank
        hidden, queries = model.hidden_size, self.heads * model.head_size
        if model.q_lora_rank is None:
            self.linear_q_proj = linear(hidden, queries, bias=False)
        else:
            self.linear_q_down_proj = linear(hidden, model.q_lora_rank, bias=False)
            self.q_layernorm = norm(model, model.q_lora_rank) if model.qk_layernorm else nn.Identity()
            self.linear_q_up_proj = linear(model.q_lora_rank, queries, bias=False)
        self.linear_kv_down_proj = linear(hidden, self.rank + self.turned, bias=False)
        self.kv_layernorm = norm(model, self.rank) if model.qk_layernorm else nn.Identity()
        self.linear_kv_up_proj = linear(self.rank, self.heads * (self.content + self.values), bias=False)
        self.core_attention = CoreAttention(softmax_scale)
        self.linear_proj = linear(self.heads * self.values, hidden, bias=model.add_bias_linear)
        self.rotary = _yarn(model) if model.rope_type != "rope" else _ordinary(model)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if hasattr(self, "linear_q_proj"):
            q = self.linear_q_proj(x)
        else:
            q = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(x)))
        q_content, q_turned = q.view(batch, length, self.heads, -1).split([self.content, self.turned], dim=-1)
        latent, k_turned = self.linear_kv_down_proj(x).split([self.rank, self.turned], dim=-1)
        kv = self.linear_kv_up_proj(self.kv_layernorm(latent)).view(batch, length, self.heads, -1)
        k_content, v = kv.split([self.content, self.values], dim=-1)
        q = torch.cat([q_content, self._rotate(q_turned)], dim=-1)
        turned = self._rotate(k_turned[:, :, None]).expand(-1, -1, self.heads, -1)
        k = torch.cat([k_content, turned], dim=-1)
        attended = self.core_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.linear_proj(attended.transpose(1, 2).reshape(batch, length, -1))

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [batch, position, head, channel]: channel 2i turns with 2i + 1, and goes to place i."""
        frequency, size = self.rotary
        rotated = 2 * len(frequency)
        x, rest = x[..., :rotated], x[..., rotated:]
        # Angles in single precision, as Megatron has them.
        angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequency)[:, None, :]
        cos, sin = (angle.cos() * size).to(x.dtype), (angle.sin() * size).to(x.dtype)
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _ordinary(model: ModelFile) -> tuple[Tensor, float]:
    """Returns the frequencies of rotary embeddings, and the factor of what is turned."""
    rotated = int(model.qk_pos_emb_head_dim * model.rotary_percent)
    return 1.0 / model.rotary_base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated), 1.0


def _yarn(model: ModelFile) -> tuple[Tensor, float]:
    """Returns the same with YaRN (arXiv 2309.00071): slow channels are interpolated, fast ones are not."""
    size, factor = model.qk_pos_emb_head_dim, model.rotary_scaling_factor
    powers = model.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    low, high = (
        size * math.log(_TRAINED_LENGTH / (turns * 2 * math.pi)) / (2 * math.log(model.rotary_base))
        for turns in (_FAST, _SLOW)
    )
    first, last = max(math.floor(low), 0), min(math.ceil(high), size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - first) / (last - first if last != first else 1e-3)
    interpolated = ramp.clamp(0, 1)
    frequency = 1.0 / (factor * powers) * interpolated + 1.0 / powers * (1 - interpolated)
    return frequency, _concentration(factor, model.mscale) / _concentration(factor, model.mscale_all_dim)


def _concentration(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
