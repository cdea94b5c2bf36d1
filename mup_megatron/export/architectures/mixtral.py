"""Mixtral: a Llama whose every layer has experts; a token's are weighed by a softmax over those that are chosen."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.export.architectures import layers
from mup_megatron.export.architectures.llama import LlamaLike
from mup_megatron.export.architectures.target import Piece

ROUTING: Mapping[str, Any] = {
    "moe_router_group_topk": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_use_legacy_grouped_gemm": False,
}


class Mixtral(LlamaLike):
    """Mixtral."""

    name: ClassVar[str] = "mixtral"
    model_class: ClassVar[str] = "MixtralForCausalLM"
    requires: ClassVar[Mapping[str, Any]] = {
        **{key: value for key, value in LlamaLike.requires.items() if key != "num_experts"},
        **ROUTING,
        "add_bias_linear": False,
        "add_qkv_bias": False,
    }

    def problems(self, model: ModelFile) -> Iterator[str]:
        """Yields what it lacks."""
        yield from super().problems(model)
        if model.num_experts is None:
            yield "an MLP in place of experts"
        elif not all(map(model.has_experts, range(model.num_layers))):
            yield "layers without experts (moe_layer_freq)"
        yield from unlike_routing(model)

    def config(self, model: ModelFile) -> dict[str, Any]:
        """Returns Llama's keys that it has, and its experts'."""
        own = super().config(model)
        del own["attention_bias"], own["mlp_bias"]
        return {
            **own,
            "intermediate_size": model.expert_ffn_size,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "sliding_window": None,
            "router_jitter_noise": 0.0,
        }

    def mlp(self, model: ModelFile, layer: str, index: int) -> Iterator[Piece]:
        """Yields the router and the experts, under the names of published checkpoints."""
        assert model.num_experts is not None
        name, hidden = f"{layer}.block_sparse_moe", model.hidden_size
        yield layers.matrix(f"{name}.gate.weight", model.num_experts, hidden, f"{layers.mlp(index)}.router.weight")
        for which in range(model.num_experts):
            fc1, fc2 = (layers.expert(model, index, which, f"linear_{each}") for each in ("fc1", "fc2"))
            yield from layers.gated(
                f"{name}.experts.{which}", ("w1", "w3", "w2"), model.expert_ffn_size, hidden, fc1, fc2
            )


def unlike_routing(model: ModelFile) -> Iterator[str]:
    """Yields a way of choosing experts that no architecture of transformers has."""
    kinds = model.moe_router_load_balancing_type
    if model.num_experts is not None and "sinkhorn" in ((kinds,) if isinstance(kinds, str) else kinds):
        yield "moe_router_load_balancing_type sinkhorn"


MIXTRAL = Mixtral()
"""Mixtral."""
