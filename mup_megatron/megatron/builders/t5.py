"""Builds Megatron-Core's `T5Model`, which has no pipeline stages."""

import copy
from typing import Any

import torch
from megatron.core.models.T5 import T5Model, t5_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import scaled_init_method_normal

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.t5 import T5File
from mup_megatron.megatron.builders.common import arguments


def build(model: ModelFile, config: Any, stage: int | None) -> torch.nn.Module:
    """Returns the model. `config`, which says the encoder's number of layers, becomes the decoder's own."""
    assert isinstance(model, T5File)
    encoder_config = copy.copy(config)
    if model.decoder_num_layers != model.encoder_num_layers:
        config.num_layers = model.decoder_num_layers
        config.output_layer_init_method = scaled_init_method_normal(config.init_method_std, config.num_layers)
    encoder, decoder = _local_specs(model) if model.transformer_impl == "local" else _stock_specs(model)
    own = {key: value for key, value in arguments(model, config, stage).items() if key != "rotary_base"}
    chunk: torch.nn.Module = T5Model(
        encoder_config=encoder_config,
        transformer_encoder_layer_spec=encoder,
        transformer_decoder_layer_spec=decoder,
        relative_attention_num_buckets=model.relative_attention_num_buckets,
        relative_attention_max_distance=model.relative_attention_max_distance,
        **own,
    )
    return chunk


def _stock_specs(model: T5File) -> tuple[Any, Any]:
    return (
        t5_spec.get_t5_encoder_with_transformer_engine_block_spec(model.encoder_num_layers),
        t5_spec.get_t5_decoder_with_transformer_engine_block_spec(model.decoder_num_layers),
    )


def _local_specs(model: T5File) -> tuple[Any, Any]:
    """Local layers with a local final norm, where the stock specs ask for Transformer Engine's and else have none."""
    layers = (
        (t5_spec.encoder_model_with_local_spec(), model.encoder_num_layers),
        (t5_spec.decoder_model_with_local_spec(), model.decoder_num_layers),
    )
    encoder, decoder = (
        TransformerBlockSubmodules([layer] * count, layer_norm=t5_spec.LNImpl) for layer, count in layers
    )
    return encoder, decoder
