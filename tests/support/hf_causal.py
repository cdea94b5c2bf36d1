"""Small language models of today's kinds: experts, latent attention, multipliers of their own. Width is one number."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig

VOCABULARY = 64


def _common(width: int, **own: Any) -> dict[str, Any]:
    """Heads of 16; each layer's feed-forward part twice as wide as hidden."""
    heads = width // 16
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    } | own


def _latent(width: int, **own: Any) -> dict[str, Any]:
    """Latent attention of fixed ranks, the second layer with experts."""
    heads = {"num_key_value_heads": width // 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    ranks = {"q_lora_rank": 12, "kv_lora_rank": 20}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    return _common(width, **heads, **ranks, **experts, moe_intermediate_size=width, first_k_dense_replace=1) | own


MODELS: dict[str, Callable[..., PretrainedConfig]] = {
    "mixtral": lambda w, **k: _made("Mixtral", _common(w, num_local_experts=4, head_dim=16), k),
    "qwen3_moe": lambda w, **k: _made("Qwen3Moe", _common(w, **_sparse(w), head_dim=16), k),
    "qwen2_moe": lambda w, **k: _made(
        "Qwen2Moe", _common(w, **_sparse(w), shared_expert_intermediate_size=w, layer_types=None), k
    ),
    "olmoe": lambda w, **k: _made("Olmoe", _common(w, num_experts=4, num_experts_per_tok=2), k),
    "phimoe": lambda w, **k: _made("Phimoe", _common(w, num_local_experts=4, num_experts_per_tok=2), k),
    "granitemoe": lambda w, **k: _made("GraniteMoe", _common(w, num_local_experts=4, num_experts_per_tok=2), k),
    "minimax_m2": lambda w, **k: _made(
        "MiniMaxM2", _common(w, num_local_experts=4, num_experts_per_tok=2, head_dim=16), k
    ),
    "ernie4_5_moe": lambda w, **k: _made(
        "Ernie4_5_Moe",
        _common(w, moe_num_experts=4, moe_k=2, moe_intermediate_size=w, moe_num_shared_experts=1)
        | {"moe_layer_start_index": 1},
        k,
    ),
    # Experts whose weights are transposed and have biases; sinks.
    "gpt_oss": lambda w, **k: _made(
        "GptOss", _common(w, num_local_experts=4, num_experts_per_tok=2, head_dim=16, layer_types=None), k
    ),
    # Experts that all see every token, transposed, in code that no implementation stands in for.
    "llama4_text": lambda w, **k: _made(
        "Llama4", _common(w, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=2 * w, head_dim=16), k
    ),
    "deepseek_v2": lambda w, **k: _made("DeepseekV2", _latent(w, topk_method="greedy"), k),
    "deepseek_v3": lambda w, **k: _made("DeepseekV3", _latent(w), k),
    "deepseek_v32": lambda w, **k: _made(
        "DeepseekV32", _latent(w, index_n_heads=2, index_head_dim=16, index_topk=4), k
    ),
    "glm4_moe": lambda w, **k: _made(
        "Glm4Moe",
        _common(w, head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)
        | {"moe_intermediate_size": w, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        k,
    ),
    "gemma": lambda w, **k: _made("Gemma", _common(w, head_dim=16), k),
    "gemma2": lambda w, **k: _made("Gemma2", _common(w, head_dim=16, query_pre_attn_scalar=16), k),
    "granite": lambda w, **k: _made(
        "Granite",
        _common(w, embedding_multiplier=12.0, attention_multiplier=0.1, residual_multiplier=0.2, logits_scaling=8.0),
        k,
    ),
    "cohere": lambda w, **k: _made("Cohere", _common(w, logit_scale=0.1), k),
}
EXPERTS = tuple(name for name in MODELS if name not in ("gemma", "gemma2", "granite", "cohere"))
_CLASSES = {"Llama4": ("Llama4TextConfig", "Llama4ForCausalLM")}


def _sparse(width: int) -> dict[str, Any]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width}


def _made(kind: str, own: dict[str, Any], changes: dict[str, Any]) -> PretrainedConfig:
    config, model = _CLASSES.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    made: PretrainedConfig = getattr(transformers, config)(**own | changes, architectures=[model])
    return made


def causal(name: str, width: int, **changes: Any) -> PretrainedConfig:
    """The configuration of one of `MODELS` at one width."""
    return MODELS[name](width, **changes)
