"""Attention of a decoder's tokens to what an encoder gives."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from mup_megatron.architectures.families.family import Family, Growth, attention_places, linear, norm
from mup_megatron.architectures.measured import CONTEXT, STREAM, Kind, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import Part, Place, Side, Tensor

if TYPE_CHECKING:
    from torch import nn


class CrossAttention(Family):
    """Queries of one stack, keys and values of another, as many heads of each."""

    name: ClassVar[str] = "cross_attention"

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields norm, linear_q, linear_kv and linear_proj."""
        name = f"{layer}.cross_attention"
        hidden = Side(model.hidden_size, grows=True)
        heads = model.num_attention_heads * model.head_size
        # This norm is a module of its own in Transformer Engine's layers too.
        yield from norm(model, f"{layer}.pre_cross_attn_layernorm.", hidden)
        attended = Side(heads, grows=True)
        yield from linear(f"{name}.linear_q", hidden, attended, bias=model.add_bias_linear)
        parts = (Part("keys", heads), Part("values", heads))
        both = Side(2 * heads, grows=True)
        yield from linear(f"{name}.linear_kv", hidden, both, bias=model.add_bias_linear, parts=parts)
        yield from linear(f"{name}.linear_proj", attended, hidden, bias=model.add_bias_linear, residual=True)

    def places(self, layer: str) -> Iterator[Place]:
        """Yields where the scale of attention logits is set, and the branch."""
        yield from attention_places(f"{layer}.cross_attention")

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the projections and of the scores, for as many tokens of the other stack as of this one."""
        heads = model.num_attention_heads * model.head_size
        return {
            "attention_projections": 6.0 * model.hidden_size * 4 * heads,
            "attention_scores": 12.0 * model.seq_length * heads,
        }

    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        """Yields the norm, linear_kv, linear_q, the attention logits and linear_proj."""
        name, logits = f"{layer}.cross_attention", "Cross-attention logits"
        queries, both = f"{name}.linear_q", f"{name}.linear_kv"
        softmax = f"{name}.core_attention.scale_mask_softmax"
        before = f"{layer}.pre_cross_attn_layernorm"
        yield inside(before, logits, STREAM)
        yield inside(both, logits, CONTEXT)
        yield inside(queries, logits, before)
        yield Measured(softmax, Kind.LOGITS, logits, (both, queries), leads=True)
        yield Measured(f"{name}.linear_proj", Kind.BRANCH, "Cross-attention output", (both, softmax), leads=True)

    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns attention to what another stack gives."""
        from mup_megatron.architectures.plain.attention import CrossAttention as Plain

        return "pre_cross_attn_layernorm", "cross_attention", Plain(model, softmax_scale)


CROSS_ATTENTION = CrossAttention()
"""The family of attention to another stack."""
