"""Builds Megatron-Core's `GPTModel`."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.megatron.builders.common import arguments


def config(model: ModelFile) -> Mapping[str, Any]:
    """Returns the fields of the TransformerConfig beside those of every Transformer: none."""
    return {}


def build(model: ModelFile, config: Any, stage: int | None) -> torch.nn.Module:
    """Returns this rank's chunk; see `build_chunk`."""
    if model.num_experts is not None:
        own = model.transformer_impl == "transformer_engine"
        spec: Any = get_gpt_decoder_block_spec(config, own, model.normalization, vp_stage=stage)
    elif model.transformer_impl == "local":
        spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization=model.normalization)
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm)
    chunk: torch.nn.Module = GPTModel(transformer_layer_spec=spec, vp_stage=stage, **arguments(model, config, stage))
    return chunk
