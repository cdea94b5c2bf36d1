"""Makes a live model of Megatron-Core of each architecture: one module each, named by its `builder`.

A builder has `build(model, config, stage)`, which gives this rank's chunk, and `config(model)`, the fields of a
TransformerConfig that the architecture needs; `layers.py` has those of single kinds of layers. Importing one imports
Megatron: the CPU runtime has to come before.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.megatron.builders.layers import layer_fields


def build_chunk(model: ModelFile, config: Any, stage: int | None) -> torch.nn.Module:
    """Returns this rank's chunk of a model, drawn as Megatron draws it.

    Args:
        model: as it can be built on this machine.
        config: the TransformerConfig.
        stage: Megatron's `vp_stage`, None without virtual pipeline stages.
    """
    chunk = _builder(model).build(model, config, stage)
    assert isinstance(chunk, torch.nn.Module)
    return chunk


def config_fields(model: ModelFile) -> Mapping[str, Any]:
    """Returns the fields of the TransformerConfig that only models of its architecture, or with its layers, have."""
    return {**_builder(model).config(model), **layer_fields(model)}


def transformer_config(model: ModelFile, fields: Mapping[str, Any]) -> Any:
    """Returns the configuration of a model's class, with these fields and its own."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if model.multi_latent_attention else TransformerConfig
    return kind(**{**fields, **config_fields(model)})


def _builder(model: ModelFile) -> Any:
    return importlib.import_module(architecture_of(model).builder)
