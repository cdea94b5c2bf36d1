"""Self-attention with grouped queries."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mup_megatron.architectures.families.family import Family, Growth, attention_places, linear, norm
from mup_megatron.architectures.measured import BIAS, STREAM, Kind, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import Part, Place, Side, Tensor

if TYPE_CHECKING:
    from torch import nn


QKV = ("queries", "keys", "values")
"""The parts of the weight that makes all of them."""


class Attention(Family):
    """Self-attention with grouped queries; its queries, keys and values are one fused matrix."""

    name: ClassVar[str] = "attention"

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields norm, linear_qkv, the norms of queries and keys, and linear_proj."""
        name = f"{layer}.self_attention"
        hidden = Side(model.hidden_size, grows=True)
        queries, keys = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
        # Transformer Engine fuses each norm into the linear layer that follows it.
        fused = model.transformer_impl == "transformer_engine"
        yield from norm(model, f"{name}.linear_qkv.layer_norm_" if fused else f"{layer}.input_layernorm.", hidden)
        parts = tuple(map(Part, QKV, (queries, keys, keys)))
        # One fused matrix, so one fan_out: all of its rows.
        qkv = Side(queries + 2 * keys, grows=True)
        weight, *bias = linear(f"{name}.linear_qkv", hidden, qkv, bias=model.bias_on_qkv, parts=parts)
        yield from (replace(weight, stepped_by_parts=True, runs=model.query_groups), *bias)
        if model.qk_layernorm:
            head = growth.side(model, "head_size")
            yield from norm(model, f"{name}.q_layernorm.", head)
            yield from norm(model, f"{name}.k_layernorm.", head)
        attended = Side(queries, grows=True)
        yield from linear(f"{name}.linear_proj", attended, hidden, bias=model.add_bias_linear, residual=True)

    def remarks(self, base: ModelFile, target: ModelFile) -> Iterator[str]:
        """Yields what is known of other numbers of queries for each key and value."""
        before, now = (model.num_attention_heads // model.query_groups for model in (base, target))
        if before != now:
            yield (
                f"Query heads for each key/value group: {before} at the base, {now} here. Keys and values are read by "
                "other numbers of heads, so that their updates act otherwise, and linear_qkv has one learning rate, "
                "which cannot make up for it. Keep heads per group as they are (`proxy` does)."
            )

    def places(self, layer: str) -> Iterator[Place]:
        """Yields where the scale of attention logits is set, and the branch."""
        yield from attention_places(f"{layer}.self_attention")

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the projections and of the scores."""
        queries = model.num_attention_heads * model.head_size
        qkv = queries + 2 * model.query_groups * model.head_size
        return {
            "attention_projections": 6.0 * (model.hidden_size * qkv + queries * model.hidden_size),
            "attention_scores": 12.0 * model.seq_length * queries,
        }

    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        """Yields the norms, linear_qkv, the attention logits and linear_proj."""
        name, logits = f"{layer}.self_attention", "Attention logits"
        qkv, softmax = f"{name}.linear_qkv", f"{name}.core_attention.scale_mask_softmax"
        norms = [f"{name}.{each}_layernorm" for each in "qk" if model.qk_layernorm]
        yield inside(f"{layer}.input_layernorm", logits, STREAM)
        yield inside(qkv, logits, f"{layer}.input_layernorm")
        yield from (inside(each, logits, qkv) for each in norms)
        yield Measured(softmax, Kind.LOGITS, logits, (qkv, *norms, BIAS), leads=True)
        yield Measured(f"{name}.linear_proj", Kind.BRANCH, "Attention output", (qkv, softmax), leads=True)

    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns attention to whatever its stack lets it see."""
        from mup_megatron.architectures.plain.attention import SelfAttention

        return "input_layernorm", "self_attention", SelfAttention(model, softmax_scale)


ATTENTION = Attention()
"""The family of self-attention."""
