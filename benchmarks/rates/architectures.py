"""The targets of `check_rates.py` and the recipes that they would be trained with."""

from dataclasses import dataclass
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file
from mup_megatron.check.family import gpt as family
from mup_megatron.check.family.stress import stressed
from mup_megatron.check.measure import levels
from mup_megatron.check.mutants import Context
from mup_megatron.recipe import Recipe, recipe

_GPT = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512, "seq_length": 64}
_UNTIED = {"untie_embeddings_and_output_weights": True}
_LLAMA = {
    **_GPT,
    **_UNTIED,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 192,
}
_VALUES = {
    "lr": 0.004,
    "min_lr": 0.0004,
    "init_method_std": 0.05,
    "embedding_multiplier": 2.0,
    "output_multiplier": 3.0,
    "attention_multiplier": 1.5,
    "weight_decay": 0.1,
}
_WIDE = {"hidden_size": 512, "num_attention_heads": 32}


@dataclass(frozen=True)
class Architecture:
    """A target and the recipe that it would be trained with."""

    target: ModelFile
    recipe: Recipe

    def context(self) -> Context:
        """At the widest model of a check."""
        width = family.widths_for(self.target, self.recipe, levels.WIDTHS)[-1]
        model = family.at_width(self.target, self.recipe, width)
        under_stress = stressed(self.recipe, steps=levels.EARLY.steps)
        return Context(base=self.recipe.megatron_base, target=model, recipe=under_stress, width=width)


def architecture(
    base: dict[str, Any],
    target: dict[str, Any],
    per_parameter: object = (),
    *,
    optimizer: str = "adam",
    depth: float | None = None,
    horizon: dict[str, Any] | None = None,
    **values: float | str,
) -> Architecture:
    """An architecture, by what its target has other than its base.

    Args:
        base: of the recipe.
        target: the keys of its model file that are other than the base's.
        per_parameter: factors of single tensors.
        optimizer: the recipe's.
        depth: α of its rule of depth.
        horizon: to which it is moved from 100 steps of 8 sequences.
        values: hyperparameters that are other than usual.
    """
    tuning = {"train_iters": 100, "global_batch_size": 8, "seq_length": base["seq_length"]}
    content = {
        "base": base,
        "hyperparameters": {**_VALUES, **values},
        "per_parameter": per_parameter,
        "parametrization": {"optimizer": optimizer, "depth": None if depth is None else {"alpha": depth}},
        **({} if horizon is None else {"training": tuning, "horizon": horizon}),
    }
    model = model_file({**base, **target}, source="benchmarks/rates")
    return Architecture(model, recipe(content, source="benchmarks/rates"))


TUNING: dict[str, Architecture] = {
    "tune-gpt": architecture({**_GPT, **_UNTIED}, _WIDE),
    "tune-llama": architecture({**_LLAMA, "num_query_groups": 4}, {**_WIDE, "num_query_groups": 32}, lr=0.008),
}
REPORT: dict[str, Architecture] = {
    "gpt": architecture({**_GPT, **_UNTIED, "hidden_size": 32, "num_attention_heads": 2}, _WIDE, output_multiplier=2.0),
    "gpt, tied, fixed ffn": architecture({**_GPT, "ffn_hidden_size": 192}, _WIDE, embedding_multiplier=4.0),
    "llama": architecture(_LLAMA, {**_WIDE, "ffn_hidden_size": 1536}, lr=0.006),
    "gpt, wider heads": architecture(
        {**_GPT, **_UNTIED, "hidden_size": 32, "num_attention_heads": 4}, {**_WIDE, "num_attention_heads": 16}
    ),
    "deep, q/k norm, overrides": architecture(
        {**_GPT, **_UNTIED, "qk_layernorm": True},
        {**_WIDE, "num_layers": 4},
        [{"match": "*.linear_fc2.weight", "lr_mult": 2.0}, {"match": "embedding.*", "lr_mult": 0.5}],
        attention_multiplier=2.0,
    ),
}

_LATENT = {
    **_LLAMA,
    "group_query_attention": False,
    "num_query_groups": 1,
    "multi_latent_attention": True,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "qk_layernorm": True,
}
_YARN = {"rotary_scaling_factor": 40.0, "mscale_all_dim": 1.0}
_EXPERTS = {**_LLAMA, "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 64}
_GROWING = {**_WIDE, "ffn_hidden_size": 1536}
_HYBRID = {key: value for key, value in _EXPERTS.items() if key != "num_layers"}
_MAMBA = {"mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 1}
FAMILIES: dict[str, Architecture] = {
    "experts of a fixed ffn": architecture({**_EXPERTS, "qk_layernorm": True}, _GROWING),
    "experts that grow, shared": architecture(
        {**_EXPERTS, "moe_shared_expert_intermediate_size": 64, "moe_shared_expert_gate": True},
        {**_GROWING, "moe_ffn_hidden_size": 512, "moe_shared_expert_intermediate_size": 512},
        lr=0.006,
    ),
    "more experts, smaller ones": architecture(
        {**_EXPERTS, "num_experts": 4, "moe_router_pre_softmax": True},
        {**_GROWING, "num_experts": 16, "moe_router_topk": 4, "moe_ffn_hidden_size": 192},
    ),
    "latents of fixed ranks": architecture({**_LATENT, **_YARN}, _GROWING),
    "latents that grow": architecture(
        {**_LATENT, "q_lora_rank": None, "qk_layernorm": False, "rope_type": "rope"},
        {**_GROWING, "kv_lora_rank": 256},
        lr=0.006,
    ),
    "latents, more and larger heads": architecture(
        {**_LATENT, **_YARN},
        {
            **_GROWING,
            "num_attention_heads": 8,
            "qk_head_dim": 64,
            "qk_pos_emb_head_dim": 32,
            "v_head_dim": 64,
            "q_lora_rank": 256,
            "kv_lora_rank": 256,
        },
    ),
    "latents and experts": architecture(
        {
            **_LATENT,
            **_YARN,
            "num_experts": 8,
            "moe_ffn_hidden_size": 64,
            "moe_layer_freq": [0, 1],
            "moe_shared_expert_intermediate_size": 64,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 2.5,
        },
        {**_GROWING, "num_layers": 3, "moe_layer_freq": [0, 1, 1]},
    ),
    "hybrid M*-E": architecture({**_HYBRID, **_MAMBA, "hybrid_layer_pattern": "M*-E"}, _GROWING),
    "hybrid *-*E": architecture(
        {**_HYBRID, "hybrid_layer_pattern": "*-*E", "moe_ffn_hidden_size": 32},
        {**_GROWING, "moe_ffn_hidden_size": 256},
        lr=0.006,
    ),
}
"""Of experts, latent attention and hybrid models."""

MATRICES: dict[str, Architecture] = {
    "Muon, spectral, tied, fixed ffn": architecture({**_GPT, "ffn_hidden_size": 192}, _WIDE, optimizer="muon"),
    "Muon, spectral, experts": architecture(
        _EXPERTS | {"num_query_groups": 4}, _GROWING | {"num_query_groups": 32}, optimizer="muon"
    ),
    "Muon, unit_rms_norm, positions": architecture(
        {**_GPT, **_UNTIED}, _WIDE, optimizer="muon", muon_scale_mode="unit_rms_norm"
    ),
    "Muon, unit_rms_norm, fixed groups": architecture(
        _LLAMA, {**_WIDE, "ffn_hidden_size": 1536}, optimizer="muon", muon_scale_mode="unit_rms_norm", lr=0.02
    ),
    "Muon, shape_scaling, fixed ffn": architecture(
        {**_GPT, **_UNTIED, "ffn_hidden_size": 192}, _WIDE, optimizer="muon", muon_scale_mode="shape_scaling"
    ),
    "Lion": architecture({**_GPT, **_UNTIED}, _WIDE, optimizer="lion", lr=0.001, min_lr=0.0001),
}
"""Of optimizers that step matrices and leave the rest to Adam."""

_RUN = 100 * 8 * 64
"""Tokens of the tuning."""
MOVED: dict[str, Architecture] = {
    "depth 1": architecture({**_GPT, **_UNTIED}, {**_WIDE, "num_layers": 8}, depth=1.0),
    "depth ½, tied, branches": architecture(_GPT, {**_WIDE, "num_layers": 6}, depth=0.5, residual_multiplier=0.7),
    "depth 1, llama": architecture(_LLAMA, {**_WIDE, "ffn_hidden_size": 1536, "num_layers": 12}, depth=1.0, lr=0.006),
    "steps": architecture({**_GPT, **_UNTIED}, _WIDE, horizon={"rule": "steps", "tokens": 16 * _RUN, "batch": 32}),
    "depth ½, batch-sde": architecture(
        _LLAMA,
        {**_WIDE, "ffn_hidden_size": 1536, "num_layers": 6},
        depth=0.5,
        horizon={"rule": "batch-sde", "tokens": _RUN, "batch": 16},
    ),
}
"""Of targets that are deeper than their base, or trained for longer or on other batches, by rules for that."""
