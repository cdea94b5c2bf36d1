"""Builds Megatron-Core's `HybridModel`, and the stack of its local layers, which Megatron has none of.

`local_stack_spec` is for `--spec` too, as `--spec mup_megatron.megatron.builders.hybrid local_stack_spec`, where there
is no Transformer Engine. It is the stock stack with the local layers of a GPT.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mup_megatron.architectures.hybrid import HybridFile, require_release
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron.builders.common import arguments
from mup_megatron.megatron.versions import core_version, hybrid_classes

_classes = hybrid_classes()


def _local_layers(config: Any) -> Any:
    """Returns a local layer of each kind that the release has."""
    local = partial(get_gpt_layer_local_spec, normalization=config.normalization)
    own = local().submodules
    sparse = local(num_experts=config.num_moe_experts or 1, moe_grouped_gemm=config.moe_grouped_gemm).submodules
    latent = local(multi_latent_attention=True).submodules
    mixer = ModuleSpec(
        module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    )
    mamba = MambaLayerSubmodules(norm=own.input_layernorm, mixer=mixer, mamba_bda=own.self_attn_bda)
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=own.pre_mlp_layernorm, mlp=own.mlp, mlp_bda=own.mlp_bda)
    experts = TransformerLayerSubmodules(
        pre_mlp_layernorm=sparse.pre_mlp_layernorm, mlp=sparse.mlp, mlp_bda=sparse.mlp_bda
    )
    return _classes.submodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=_attention(own)),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        moe_layer=ModuleSpec(module=TransformerLayer, submodules=experts),
        **(
            {"mla_layer": ModuleSpec(module=TransformerLayer, submodules=_attention(latent))} if _classes.latent else {}
        ),
    )


def _attention(layer: Any) -> Any:
    """Returns the attention of a GPT's layer as a layer of its own."""
    return TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm, self_attention=layer.self_attention, self_attn_bda=layer.self_attn_bda
    )


class LocalStack(_classes.stack):  # type: ignore[misc, name-defined]
    """The hybrid stack of local layers: with torch's final norm where the stock one asks for Transformer Engine."""

    def __init__(self, config: Any, submodules: Any = None, **given: Any) -> None:
        super().__init__(config, _local_layers(config), post_layer_norm=False, **given)
        self.post_layer_norm = True
        if self.post_process:
            norm = get_gpt_layer_local_spec(normalization=config.normalization).submodules.input_layernorm
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class LocalMtpLayer(MultiTokenPredictionLayer):  # type: ignore[misc]
    """A layer of multi-token prediction of local ones, whose spec has to be there before their configuration is."""

    def __init__(self, config: Any, **given: Any) -> None:
        norm = get_gpt_layer_local_spec(normalization=config.normalization).submodules.input_layernorm
        own = MultiTokenPredictionLayerSubmodules(
            enorm=norm, hnorm=norm, eh_proj=ColumnParallelLinear, mtp_model_layer=None, layer_norm=norm
        )
        inner = {} if _classes.submodules_key is None else {_classes.submodules_key: _local_layers(config)}
        super().__init__(config, own, **{**given, **inner})


def _further() -> Any:
    """Returns what a stack's spec has for multi-token prediction; None where the release has none in a pattern."""
    if _classes.submodules_key is None:
        return None
    layers = MultiTokenPredictionBlockSubmodules(layer_specs=[ModuleSpec(module=LocalMtpLayer)])
    return _classes.submodules(mtp_block_spec=ModuleSpec(module=MultiTokenPredictionBlock, submodules=layers))


local_stack_spec = ModuleSpec(module=LocalStack, submodules=_further())


def build(model: ModelFile, config: Any, stage: int | None) -> torch.nn.Module:
    """Returns this rank's chunk; see `build_chunk`."""
    assert isinstance(model, HybridFile)
    require_release(model.hybrid_layer_pattern, core_version()[:2])
    # On one stage there is nothing that boundaries could part, and Megatron would take them for virtual stages.
    parted = config.pipeline_model_parallel_size > 1
    if parted and len(model.pattern.stages) > 1 and not _classes.builds_stages:
        raise InputError(
            f"hybrid_layer_pattern {model.hybrid_layer_pattern}: this Megatron-Core splits patterns evenly. "
            "Take '|' out of it, or install megatron-core>=0.17."
        )
    pattern = model.pattern if parted else replace(model.pattern, stages=(model.letters,))
    spec = local_stack_spec if model.transformer_impl == "local" else _classes.stock_spec()
    chunk: torch.nn.Module = _classes.model(
        **{_classes.spec_key: spec, _classes.pattern_key: str(pattern)},
        **({"vp_stage": stage} if _classes.builds_stages else {}),
        **arguments(model, config, stage),
    )
    return chunk
