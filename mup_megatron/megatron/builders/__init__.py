"""Makes a live model of Megatron-Core of each architecture: one module each, named by its `builder`.

A builder has `build(model, config, stage)`, which gives this rank's chunk. Importing one imports Megatron: the CPU
runtime has to come before.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of


def build_chunk(model: ModelFile, config: Any, stage: int | None) -> torch.nn.Module:
    """Returns this rank's chunk of a model, drawn as Megatron draws it.

    Args:
        model: as it can be built on this machine.
        config: the TransformerConfig.
        stage: Megatron's `vp_stage`, None without virtual pipeline stages.
    """
    chunk = importlib.import_module(architecture_of(model).builder).build(model, config, stage)
    assert isinstance(chunk, torch.nn.Module)
    return chunk


def transformer_config(model: ModelFile, fields: Mapping[str, Any]) -> Any:
    """Returns the configuration of the class that has these fields and those of the model's architecture."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    fields = {**fields, **architecture_of(model).config(model)}
    kind = TransformerConfig if fields.keys() <= TransformerConfig.__dataclass_fields__.keys() else MLATransformerConfig
    return kind(**fields)
