"""Trained models of every architecture that an export knows, as plain torch, and what is exported of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.plan_runs import plain_from_plan
from support.shapes import gpt

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.decoder import PlainDecoder
from mup_megatron.export.weights import Source, Stored
from mup_megatron.recipe import Depth, Hyperparameters, Parametrization, PerParameter, Recipe
from mup_megatron.theory import Plan

_LLAMA: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 32}
_LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "moe_shared_expert_intermediate_size": 64,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}


@dataclass(frozen=True)
class Kind:
    """A kind of model: what its model file says, and what an architecture it becomes."""

    architecture: str
    keys: Mapping[str, Any]
    wider: Mapping[str, int] = field(default_factory=dict)
    """Sizes of its own that grow with width."""


KINDS: dict[str, Kind] = {
    "gpt2": Kind("gpt2", {}),
    "gpt2 untied, without biases": Kind(
        "gpt2", {"add_bias_linear": False, "untie_embeddings_and_output_weights": True, "apply_layernorm_1p": True}
    ),
    "llama": Kind("llama", {**_LLAMA, "group_query_attention": True, "num_query_groups": 2}, {"num_query_groups": 2}),
    "llama tied": Kind(
        "llama", {**_LLAMA, "untie_embeddings_and_output_weights": False, "apply_layernorm_1p": True}
    ),
    "llama with biases": Kind("llama", {**_LLAMA, "add_bias_linear": True, "kv_channels": 12}),
    "qwen3": Kind("qwen3", {**_LLAMA, "qk_layernorm": True, "add_qkv_bias": True}),
    "granite": Kind("granite", {**_LLAMA, "group_query_attention": True, "num_query_groups": 2}),
    "granite tied": Kind("granite", {**_LLAMA, "untie_embeddings_and_output_weights": False}),
    "mixtral": Kind("mixtral", {**_LLAMA, **_EXPERTS}, {"moe_ffn_hidden_size": 32}),
    "deepseek_v3": Kind(
        "deepseek_v3",
        {**_LLAMA, **_EXPERTS, **_LATENT, "moe_layer_freq": (0, 1), "norm_epsilon": 1e-2},
        {"moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 64},
    ),
    "deepseek_v3 with YaRN": Kind(
        "deepseek_v3",
        {
            **_LLAMA, **_EXPERTS, **_LATENT, "moe_layer_freq": (0, 1), "rotary_scaling_factor": 4.0,
            "mscale": 0.8, "mscale_all_dim": 0.6, "num_experts": 8, "moe_router_num_groups": 4,
            "moe_router_topk": 4, "moe_router_group_topk": 2,
        },
        {"moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 64},
    ),
}  # fmt: skip
RATIO = 4
OVERRIDES = (
    PerParameter(match="decoder.*.linear_fc1.weight", multiplier=1.25),
    PerParameter(match="decoder.*.linear_proj.weight", multiplier=0.75),
)


def models(kind: Kind) -> tuple[ModelFile, ModelFile]:
    """The base and the target, of four times its width and one layer more."""
    vocabulary = {"vocab_size": 45, "max_position_embeddings": 96}
    base = gpt(1, **vocabulary, **kind.keys)
    grown = {key: RATIO * size for key, size in kind.wider.items()}
    deeper: dict[str, Any] = {"num_layers": 3}
    if "moe_layer_freq" in kind.keys:
        deeper["moe_layer_freq"] = (0, 1, 1)
    return base, gpt(RATIO, **vocabulary, **{**kind.keys, **grown, **deeper})


def recipe_of(base: ModelFile) -> Recipe:
    """A recipe whose every multiplier is off 1, also those of single tensors, with a rule of depth."""
    return Recipe(
        base=base,
        hyperparameters=Hyperparameters(
            lr=0.003,
            init_method_std=0.08,
            embedding_multiplier=3.0,
            output_multiplier=1.7,
            attention_multiplier=1.6,
            residual_multiplier=0.8,
        ),
        per_parameter=OVERRIDES,
        parametrization=Parametrization(depth=Depth(alpha=1.0)),
    )


class Weights:
    """Tensors in memory, as an export reads them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.asked: list[str] = []

    @property
    def stored(self) -> Mapping[str, Stored]:
        return {name: Stored(tuple(each.shape), each.dtype) for name, each in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self._tensors[name]


@dataclass(frozen=True)
class Trained:
    """A trained model: the live one, with its multipliers, and its weights."""

    model: ModelFile
    plan: Plan
    live: PlainDecoder

    def source(self, dtype: torch.dtype = torch.float32) -> Source:
        tensors = {name: each.detach().to(dtype) for name, each in self.live.state_dict().items()}
        tensors.pop("output_layer.weight", None) if self.model.tied else None
        return Source(model=self.model, plan=self.plan, weights=Weights(tensors), described="runs/ck")


def trained(kind: Kind, dtype: torch.dtype = torch.float64) -> Trained:
    """A model whose every weight, gain and bias is drawn anew: a mistake with any of them shows."""
    base, model = models(kind)
    plan = recipe_of(base).plan(model)
    live = plain_from_plan(plan, model, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            std = plan[name].init_std
            parameter.copy_(parameter + 0.2 * noise if std is None else 2.0 * std * noise)
        for name, buffer in live.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return Trained(model, plan, live)


def drawn(model: ModelFile, plan: Plan) -> Source:
    """A trained model of which there are the weights alone, by the names of its plan."""
    generator = torch.Generator().manual_seed(3)
    held = {}
    for entry in plan.entries:
        noise = torch.randn(entry.shape, generator=generator)
        constant = entry.init_value or 0.0
        held[entry.name] = constant + 0.2 * noise if entry.init_std is None else 2.0 * entry.init_std * noise
    return Source(model=model, plan=plan, weights=Weights(held), described="runs/ck")


def tokens(model: ModelFile) -> torch.Tensor:
    """Two sequences, of the tokens that there are."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(model.vocab_size, (2, model.seq_length), generator=generator)


def loaded(folder: Path, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """The exported model as stock transformers loads it; every tensor has to be there, and no other."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=dtype, output_loading_info=True
    )
    assert {key: value for key, value in told.items() if value} == {}
    return model.eval()


def deviation(model: Trained, stock: Any) -> float:
    """The largest difference of logits."""
    given = tokens(model.model)
    with torch.no_grad():
        wanted = model.live(given)[..., : model.model.vocab_size]
        return float((stock(given).logits.double() - wanted).abs().max())
