"""Builds Megatron-Core's `GPTModel`."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.megatron.builders.common import arguments


def build(model: ModelFile, config: Any, stage: int | None) -> torch.nn.Module:
    """Returns this rank's chunk; see `build_chunk`."""
    fused = model.transformer_impl == "transformer_engine"
    spec: Any = get_gpt_decoder_block_spec(config, fused, model.normalization, vp_stage=stage)
    further = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=fused, vp_stage=stage)
    chunk: torch.nn.Module = GPTModel(
        transformer_layer_spec=spec, mtp_block_spec=further, vp_stage=stage, **arguments(model, config, stage)
    )
    return chunk
