"""The fields of a TransformerConfig that some kinds of layers have beside those of every Transformer."""

from collections.abc import Mapping
from typing import Any

from mup_megatron.architectures.keys import latent, mtp
from mup_megatron.architectures.model_file import ModelFile

__all__ = ["layer_fields"]


def layer_fields(model: ModelFile) -> Mapping[str, Any]:
    """Returns the fields of the layers that a model has; they are called as the model file's keys are."""
    fields: dict[str, Any] = {}
    if model.multi_latent_attention:
        fields |= {key: getattr(model, key) for key in latent.FLAGS}
        fields |= {"rope_type": model.rope_type or "yarn"}
        fields |= {"rotary_base": model.rotary_base, "rotary_percent": model.rotary_percent}
    if model.mtp_num_layers is not None:
        fields |= {key: getattr(model, key) for key in mtp.FLAGS}
    return fields
