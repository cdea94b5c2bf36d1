"""The keys that a base and a target have to share to be one model at two sizes."""

from collections.abc import Mapping

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError

SHARED = {
    "swiglu": "swiglu",
    "normalization": "normalization",
    "apply_layernorm_1p": "apply_layernorm_1p",
    "qk_layernorm": "qk_layernorm",
    "position_embedding_type": "position_embedding_type",
    "add_bias_linear": "add_bias_linear",
    "add_qkv_bias": "bias_on_qkv",
    "untie_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
}
"""What base and target must share: key → what it decides. μP compares sizes, not architectures."""
LAYOUT = ("transformer_impl", "moe_grouped_gemm", "moe_use_legacy_grouped_gemm")
"""What decides how parameters are called, and nothing else: a base may have another."""


def named_as(model: ModelFile, other: ModelFile) -> ModelFile:
    """Returns a model whose parameters are called as another's."""
    return model.model_copy(update={key: getattr(other, key) for key in LAYOUT})


def require_alike(base: ModelFile, target: ModelFile, keys: Mapping[str, str]) -> None:
    """Raises InputError for the first key of which base and target decide otherwise."""
    for key, decides in keys.items():
        at_base, at_target = getattr(base, decides), getattr(target, decides)
        if at_base != at_target:
            at_base, at_target = getattr(base, key), getattr(target, key)
            raise InputError(
                f"{key} is {at_base} in the recipe's base but {at_target} in the target. "
                "Hyperparameters transfer between widths of one architecture: tune a base that has the target's."
            )
