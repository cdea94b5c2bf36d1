"""The fields of a TransformerConfig that say a model's experts."""

from typing import Any

from mup_megatron.architectures.keys.experts import FLAGS
from mup_megatron.architectures.model_file import ModelFile

_LAYOUT = ("moe_grouped_gemm", "moe_use_legacy_grouped_gemm")
"""What says of how many modules experts are: see `expert_fields`."""


def expert_fields(model: ModelFile) -> dict[str, Any]:
    """Returns the fields of a model with experts; none of one without."""
    if model.num_experts is None:
        return {}
    values = {key: getattr(model, key) for key in FLAGS if key not in ("num_experts", *_LAYOUT)}
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
