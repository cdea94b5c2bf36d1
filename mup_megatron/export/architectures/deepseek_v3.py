"""DeepSeek-V3: latent attention, first layers with MLPs, then experts weighed by sigmoids, with a shared expert."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.export.architectures import layers
from mup_megatron.export.architectures.llama import GATED, LlamaLike
from mup_megatron.export.architectures.mixtral import unlike_routing
from mup_megatron.export.architectures.target import Piece
from mup_megatron.export.folds import Fold

LATENT_EPSILON = 1e-6
"""Of the norms of latents in transformers, whatever `rms_norm_eps` says."""
_ORIGINAL_POSITIONS = 4096
"""Megatron's own default of what YaRN stretches, for which a model file has no key."""


class DeepseekV3(LlamaLike):
    """DeepSeek-V3."""

    name: ClassVar[str] = "deepseek_v3"
    model_class: ClassVar[str] = "DeepseekV3ForCausalLM"
    requires: ClassVar[Mapping[str, Any]] = {
        **{key: value for key, value in LlamaLike.requires.items() if key != "num_experts"},
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "moe_router_score_function": "sigmoid",
        "moe_shared_expert_gate": False,
        "moe_use_legacy_grouped_gemm": False,
    }

    def problems(self, model: ModelFile) -> Iterator[str]:
        """Yields what it lacks."""
        yield from super().problems(model)
        if not model.multi_latent_attention:
            return
        if model.q_lora_rank is None:
            yield "queries without q_lora_rank"
        if model.rope_type != "rope" and model.rotary_scaling_factor < 1.0:
            yield f"rotary_scaling_factor {model.rotary_scaling_factor:g}"
        if model.num_experts is None or model.moe_shared_expert_intermediate_size is None:
            yield "no experts, or none that is shared (moe_shared_expert_intermediate_size)"
            return
        if not all(map(model.has_experts, range(_first(model), model.num_layers))):
            yield "layers without experts behind one that has them (moe_layer_freq)"
        if model.moe_shared_expert_intermediate_size % model.expert_ffn_size:
            yield (
                f"moe_shared_expert_intermediate_size {model.moe_shared_expert_intermediate_size}, no multiple of an "
                f"expert's {model.expert_ffn_size}"
            )
        if model.moe_router_group_topk is not None and model.moe_router_topk // model.moe_router_group_topk != 2:
            # A group counts by as many of its experts, and there always by its best two.
            yield f"moe_router_topk {model.moe_router_topk} of moe_router_group_topk {model.moe_router_group_topk}"
        yield from unlike_routing(model)

    def softmax_scale(self, model: ModelFile) -> float:
        """Returns 1/√(head size), with YaRN's own factor where it uses YaRN."""
        stock = model.stock_softmax_scale
        return super().softmax_scale(model) if stock is None or not _stretches(model) else stock

    def own_folds(self, model: ModelFile) -> Sequence[Fold]:
        """Returns what gives its norms of latents another eps: x/√(mean x² + ε) of c·x is that of x with ε/c²."""
        factor = math.sqrt(LATENT_EPSILON / model.norm_epsilon)
        if factor == 1.0:
            return ()
        downs = [(each, f"{layers.attention(index)}.linear_{each}_down_proj.weight") for index, each in _latents(model)]
        latent = (range(model.kv_lora_rank),)
        return [Fold(name, factor, rows=latent if each == "kv" else None) for each, name in downs]

    def config(self, model: ModelFile) -> dict[str, Any]:
        """Returns its keys of latents, experts and YaRN beside Llama's that it has."""
        own = super().config(model)
        del own["mlp_bias"], own["head_dim"]
        assert model.moe_shared_expert_intermediate_size is not None
        grouped = model.moe_router_group_topk is not None
        factor = model.moe_router_topk_scaling_factor
        return {
            **own,
            "num_key_value_heads": model.num_attention_heads,
            "q_lora_rank": model.q_lora_rank,
            "kv_lora_rank": model.kv_lora_rank,
            "qk_nope_head_dim": model.qk_head_dim,
            "qk_rope_head_dim": model.qk_pos_emb_head_dim,
            "v_head_dim": model.v_head_dim,
            "rope_interleave": True,
            **({"rope_scaling": _yarn(model)} if _stretches(model) else {}),
            "first_k_dense_replace": _first(model),
            "moe_intermediate_size": model.expert_ffn_size,
            "n_routed_experts": model.num_experts,
            "n_shared_experts": model.moe_shared_expert_intermediate_size // model.expert_ffn_size,
            "num_experts_per_tok": model.moe_router_topk,
            "n_group": model.moe_router_num_groups if grouped else 1,
            "topk_group": model.moe_router_group_topk if grouped else 1,
            "norm_topk_prob": model.moe_router_topk > 1,
            "routed_scaling_factor": 1.0 if factor is None else factor,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
        }

    def attention(self, model: ModelFile, name: str, index: int) -> Iterator[Piece]:
        """Yields the projections to latents and back, and the norms of latents."""
        assert model.q_lora_rank is not None
        own, hidden, heads = layers.attention(index), model.hidden_size, model.num_attention_heads
        query, rank = model.q_lora_rank, model.kv_lora_rank
        for latent, down, up, size, wide, made in (
            ("q", "q_a_proj", "q_b_proj", query, query, heads * model.head_size),
            (
                "kv",
                "kv_a_proj_with_mqa",
                "kv_b_proj",
                rank,
                rank + model.qk_pos_emb_head_dim,
                heads * (model.qk_head_dim + model.v_head_dim),
            ),
        ):
            yield layers.matrix(f"{name}.{down}.weight", wide, hidden, f"{own}.linear_{latent}_down_proj.weight")
            prefix = layers.latent_norm(model, index, latent)
            yield from layers.norm(model, f"{name}.{latent}_a_layernorm", prefix, size)
            yield layers.matrix(f"{name}.{up}.weight", made, size, f"{own}.linear_{latent}_up_proj.weight")
        yield layers.matrix(f"{name}.o_proj.weight", hidden, heads * model.v_head_dim, f"{own}.linear_proj.weight")

    def mlp(self, model: ModelFile, layer: str, index: int) -> Iterator[Piece]:
        """Yields an MLP; or the router with its bias, the experts and the shared one."""
        if not model.has_experts(index):
            yield from super().mlp(model, layer, index)
            return
        assert model.num_experts is not None
        assert model.moe_shared_expert_intermediate_size is not None
        name, own, hidden = f"{layer}.mlp", layers.mlp(index), model.hidden_size
        yield layers.matrix(f"{name}.gate.weight", model.num_experts, hidden, f"{own}.router.weight")
        biased = model.moe_router_enable_expert_bias
        bias = f"{name}.gate.e_score_correction_bias"
        yield replace(
            layers.vector(bias, model.num_experts, f"{own}.router.expert_bias", trained=biased), single_precision=True
        )
        for which in range(model.num_experts):
            fc1, fc2 = (layers.expert(model, index, which, f"linear_{each}") for each in ("fc1", "fc2"))
            yield from layers.gated(f"{name}.experts.{which}", GATED, model.expert_ffn_size, hidden, fc1, fc2)
        shared = model.moe_shared_expert_intermediate_size
        fc1, fc2 = (f"{own}.shared_experts.linear_{each}.weight" for each in ("fc1", "fc2"))
        yield from layers.gated(f"{name}.shared_experts", GATED, shared, hidden, fc1, fc2)


def _first(model: ModelFile) -> int:
    """Returns the first layer with experts."""
    return next((layer for layer in range(model.num_layers) if model.has_experts(layer)), model.num_layers)


def _latents(model: ModelFile) -> Iterator[tuple[int, str]]:
    return ((index, each) for index in range(model.num_layers) for each in ("q", "kv"))


def _stretches(model: ModelFile) -> bool:
    """Returns whether its rotary embeddings are YaRN's, stretched."""
    return model.rope_type != "rope" and model.rotary_scaling_factor > 1.0


def _yarn(model: ModelFile) -> dict[str, Any]:
    """Returns YaRN as transformers reads it: its own factor of cosine and sine differs where a magnitude is 0.

    Elsewhere the factor is left out. vLLM takes one of 1 for a model whose softmax scale YaRN does not change.
    """
    factor, magnitudes = model.rotary_scaling_factor, (model.mscale, model.mscale_all_dim)
    concentration = (1.0 + 0.1 * each * math.log(factor) for each in magnitudes)
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _ORIGINAL_POSITIONS,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": model.mscale,
        "mscale_all_dim": model.mscale_all_dim,
        **({} if all(magnitudes) else {"attention_factor": next(concentration) / next(concentration)}),
    }


DEEPSEEK_V3 = DeepseekV3()
"""DeepSeek-V3."""
