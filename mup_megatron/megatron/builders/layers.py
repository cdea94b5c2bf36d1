"""The fields of a TransformerConfig that some kinds of layers have beside those of every Transformer."""

from collections.abc import Mapping
from typing import Any

from mup_megatron.architectures.keys import experts, latent, mtp
from mup_megatron.architectures.model_file import ModelFile

__all__ = ["layer_fields"]


def layer_fields(model: ModelFile) -> Mapping[str, Any]:
    """Returns the fields of the layers that a model has; most are called as the model file's keys are."""
    fields: dict[str, Any] = {}
    if model.multi_latent_attention:
        fields |= {key: getattr(model, key) for key in latent.FLAGS}
        fields |= {"rope_type": model.rope_type or "yarn"}
        fields |= {"rotary_base": model.rotary_base, "rotary_percent": model.rotary_percent}
    if model.mtp_num_layers is not None:
        fields |= {key: getattr(model, key) for key in mtp.FLAGS}
    if model.num_experts is not None:
        fields |= _expert_fields(model)
    return fields


_LAYOUT = ("moe_grouped_gemm", "moe_use_legacy_grouped_gemm")
"""What says of how many modules experts are: see `_expert_fields`."""


def _expert_fields(model: ModelFile) -> dict[str, Any]:
    """The fields that say how the experts of a model are called and chosen."""
    values = {key: getattr(model, key) for key in experts.FLAGS if key not in ("num_experts", *_LAYOUT)}
    said = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    legacy = {"moe_use_legacy_grouped_gemm": True} if model.has_legacy_experts else {}
    # Of local layers Megatron-Core 0.16 knows no other grouping, and later releases none.
    grouped = model.moe_grouped_gemm and (model.transformer_impl == "transformer_engine" or model.has_legacy_experts)
    return {
        **said,
        **legacy,
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "moe_grouped_gemm": grouped,
        # The one that every layout has.
        "moe_token_dispatcher_type": "alltoall",
    }
