"""Latent attention (MLA), with or without compressed queries."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mup_megatron.architectures.families.family import Family, Growth, Size, alike, attention_places, linear, norm
from mup_megatron.architectures.keys import latent
from mup_megatron.architectures.measured import STREAM, Kind, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import Part, Place, Property, Role, Side, Tensor

if TYPE_CHECKING:
    from torch import nn


class LatentAttention(Family):
    """Attention whose queries, keys and values are projected down to latents and up again.

    A latent is a bottleneck inside the model: what leads to it and away from it is hidden at every rank, also at one
    that keeps its size.
    """

    name: ClassVar[str] = "latent attention"
    sizes: ClassVar[tuple[Size, ...]] = (
        Size(key="q_lora_rank", small=32, kept=True),
        Size(key="kv_lora_rank", small=32, kept=True),
    )
    native_problem: ClassVar[str | None] = (
        "--multi-latent-attention beside --use-mup: Megatron's own μP leaves the scale of this attention alone, and a "
        "recipe cannot say that. Tune a base with a recipe."
    )
    shared: ClassVar[Mapping[str, str]] = alike("rotary_scaling_factor", "mscale_all_dim")
    """They are a factor of its softmax scale."""

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields norm, the projections of queries, those of keys and values with their norms, and linear_proj."""
        name = f"{layer}.self_attention"
        hidden = Side(model.hidden_size, grows=True)
        yield from norm(model, f"{layer}.input_layernorm.", hidden)
        heads = model.num_attention_heads
        content, turned = heads * model.qk_head_dim, heads * model.qk_pos_emb_head_dim
        parts = (Part("queries", content), Part("turned queries", turned))
        queries = Side(content + turned, grows=True)
        if model.q_lora_rank is None:
            yield from linear(f"{name}.linear_q_proj", hidden, queries, bias=False, parts=parts)
            if model.qk_layernorm and model.transformer_impl == "transformer_engine":
                # From 0.19 on, Megatron fuses a second norm of the stream into the projection of such queries.
                for tensor in norm(model, f"{name}.linear_q_proj.layer_norm_", hidden):
                    yield replace(tensor, properties=tensor.properties | {Property.OPTIONAL})
        else:
            rank = growth.side(model, "q_lora_rank")
            yield from linear(f"{name}.linear_q_down_proj", hidden, rank, bias=False, role=Role.HIDDEN)
            yield from _latent_norm(model, name, "q", rank)
            yield from linear(f"{name}.linear_q_up_proj", rank, queries, bias=False, parts=parts, role=Role.HIDDEN)
        rank, key = (growth.side(model, which) for which in ("kv_lora_rank", "qk_pos_emb_head_dim"))
        # The turned part of the keys is one for all heads, and goes past the latent.
        down = Side(rank.size + key.size, grows=rank.grows or key.grows)
        parts = (Part("latent", rank.size), Part("turned keys", key.size))
        yield from linear(f"{name}.linear_kv_down_proj", hidden, down, bias=False, parts=parts, role=Role.HIDDEN)
        yield from _latent_norm(model, name, "kv", rank)
        values = heads * model.v_head_dim
        parts = (Part("keys", content), Part("values", values))
        up = Side(content + values, grows=True)
        yield from linear(f"{name}.linear_kv_up_proj", rank, up, bias=False, parts=parts, role=Role.HIDDEN)
        attended = Side(values, grows=True)
        yield from linear(f"{name}.linear_proj", attended, hidden, bias=model.add_bias_linear, residual=True)

    def places(self, layer: str) -> Iterator[Place]:
        """Yields where the scale of attention logits is set, and the branch."""
        yield from attention_places(f"{layer}.self_attention")

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the projections and of the scores."""
        heads, hidden = model.num_attention_heads, model.hidden_size
        queries, values = heads * model.head_size, heads * model.v_head_dim
        rank = model.q_lora_rank
        of_queries = hidden * queries if rank is None else rank * (hidden + queries)
        of_keys = hidden * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
        of_keys += model.kv_lora_rank * (heads * model.qk_head_dim + values)
        return {
            "attention_projections": 6.0 * (of_queries + of_keys + values * hidden),
            "attention_scores": 6.0 * model.seq_length * (queries + values),
        }

    def config(self, model: ModelFile) -> Mapping[str, Any]:
        """Returns its keys, which Megatron has under the same names, and what its own rotary embeddings read."""
        fields = {key: getattr(model, key) for key in (*latent.FLAGS, "rotary_base", "rotary_percent")}
        return {**fields, "rope_type": model.rope_type or "yarn"}

    def local_problem(self, model: ModelFile, *, on_cpu: bool) -> str | None:
        """Returns that Megatron has no local norm for such queries, and no local attention with sizes of heads."""
        if model.qk_layernorm and model.q_lora_rank is None:
            return (
                "qk_layernorm without q_lora_rank: megatron-core 0.19 builds such queries of Transformer Engine alone. "
                "Use transformer_impl transformer_engine; on CPUs give a q_lora_rank, or qk_layernorm: false."
            )
        if on_cpu:
            return None
        return (
            "multi_latent_attention: Megatron's local attention takes no head sizes of its own, so it cannot be "
            "latent. Use transformer_impl transformer_engine."
        )

    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        """Yields norm, projections, the norms of latents, attention logits and output."""
        name, logits = f"{layer}.self_attention", "Attention logits"
        start = f"{layer}.input_layernorm"
        yield inside(start, logits, STREAM)
        ends = []
        for kind in ("q", "kv"):
            if kind == "q" and model.q_lora_rank is None:
                chain = [f"{name}.linear_q_proj"]
            else:
                norms = [f"{name}.{kind}_layernorm"] if model.qk_layernorm else []
                chain = [f"{name}.linear_{kind}_down_proj", *norms, f"{name}.linear_{kind}_up_proj"]
            for module, read in zip(chain, (start, *chain), strict=False):
                yield inside(module, logits, read)
            ends.append(chain[-1])
        softmax = f"{name}.core_attention.scale_mask_softmax"
        # The turned part of the keys goes past their latent.
        yield Measured(softmax, Kind.LOGITS, logits, (*ends, f"{name}.linear_kv_down_proj"), leads=True)
        yield Measured(f"{name}.linear_proj", Kind.BRANCH, "Attention output", (ends[1], softmax), leads=True)

    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns causal latent attention."""
        from mup_megatron.architectures.plain.latent import PlainLatentAttention

        return "input_layernorm", "self_attention", PlainLatentAttention(model, softmax_scale)


def _latent_norm(model: ModelFile, attention: str, latent: str, rank: Side) -> Iterator[Tensor]:
    """Yields the norm of a latent; Transformer Engine fuses it into the projection that follows."""
    if not model.qk_layernorm:
        return
    fused = model.transformer_impl == "transformer_engine"
    prefix = f"linear_{latent}_up_proj.layer_norm_" if fused else f"{latent}_layernorm."
    yield from norm(model, f"{attention}.{prefix}", rank)


LATENT_ATTENTION = LatentAttention()
"""The family of latent attention."""
