"""Builds Megatron-Core's `BertModel`."""

from typing import Any

import torch
from megatron.core.models.bert import bert_layer_specs as specs
from megatron.core.models.bert.bert_model import BertModel

from mup_megatron.architectures.bert import BertFile
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.megatron.builders.common import arguments


def build(model: ModelFile, config: Any, stage: int | None) -> torch.nn.Module:
    """Returns this rank's chunk; see `build_chunk`."""
    assert isinstance(model, BertFile)
    local = model.transformer_impl == "local"
    spec = specs.bert_layer_local_spec if local else specs.get_bert_layer_with_transformer_engine_spec()
    own = {key: value for key, value in arguments(model, config, stage).items() if not key.startswith("rotary_")}
    chunk: torch.nn.Module = BertModel(
        num_tokentypes=2 if model.bert_binary_head else 0,
        transformer_layer_spec=spec,
        add_binary_head=model.bert_binary_head,
        vp_stage=stage,
        **own,
    )
    return chunk
