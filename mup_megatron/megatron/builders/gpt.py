"""Builds Megatron-Core's `GPTModel`."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.megatron.builders.common import arguments


def build(model: ModelFile, config: Any, stage: int | None) -> torch.nn.Module:
    """Returns this rank's chunk; see `build_chunk`."""
    layers = {"qk_layernorm": model.qk_layernorm, "multi_latent_attention": model.multi_latent_attention}
    fused = model.transformer_impl == "transformer_engine"
    if model.num_experts is not None:
        spec: Any = get_gpt_decoder_block_spec(config, fused, model.normalization, vp_stage=stage)
    elif not fused:
        spec = get_gpt_layer_local_spec(**layers, normalization=model.normalization)
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(**layers)
    more: dict[str, Any] = {}
    if model.mtp_num_layers is not None:
        more["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=fused, vp_stage=stage)
    chunk: torch.nn.Module = GPTModel(
        transformer_layer_spec=spec, vp_stage=stage, **more, **arguments(model, config, stage)
    )
    return chunk
