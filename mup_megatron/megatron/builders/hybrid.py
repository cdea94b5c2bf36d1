"""Builds Megatron-Core's `HybridModel`, and the stack of its local layers, which Megatron has none of.

`local_stack_spec` is for `--spec` too, as `--spec mup_megatron.megatron.builders.hybrid local_stack_spec`, where there
is no Transformer Engine. It is the stock stack with the local layers of a GPT.
"""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mup_megatron.architectures.hybrid import HybridFile
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron.builders.common import arguments
from mup_megatron.megatron.versions import hybrid_classes

_classes = hybrid_classes()


class LocalStack(_classes.stack):  # type: ignore[misc, name-defined]
    """The hybrid stack of local layers: with torch's final norm where the stock one asks for Transformer Engine."""

    def __init__(self, config: Any, **given: Any) -> None:
        own = get_gpt_layer_local_spec(normalization=config.normalization).submodules
        sparse = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts or 1,
            moe_grouped_gemm=config.moe_grouped_gemm,
            normalization=config.normalization,
        ).submodules
        attention = TransformerLayerSubmodules(
            input_layernorm=own.input_layernorm, self_attention=own.self_attention, self_attn_bda=own.self_attn_bda
        )
        mlp = TransformerLayerSubmodules(pre_mlp_layernorm=own.pre_mlp_layernorm, mlp=own.mlp, mlp_bda=own.mlp_bda)
        mixer = ModuleSpec(
            module=MambaMixer,
            submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
        )
        mamba = MambaLayerSubmodules(norm=own.input_layernorm, mixer=mixer, mamba_bda=own.self_attn_bda)
        experts = TransformerLayerSubmodules(
            pre_mlp_layernorm=sparse.pre_mlp_layernorm, mlp=sparse.mlp, mlp_bda=sparse.mlp_bda
        )
        layers = _classes.submodules(
            mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            moe_layer=ModuleSpec(module=TransformerLayer, submodules=experts),
        )
        super().__init__(config, layers, post_layer_norm=False, **given)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = own.input_layernorm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


local_stack_spec = ModuleSpec(module=LocalStack)


def build(model: ModelFile, config: Any, stage: int | None) -> torch.nn.Module:
    """Returns this rank's chunk; see `build_chunk`."""
    assert isinstance(model, HybridFile)
    # On one stage there is nothing that boundaries could part, and Megatron would take them for virtual stages.
    parted = config.pipeline_model_parallel_size > 1
    if parted and len(model.segments) > 1 and not _classes.builds_stages:
        raise InputError(
            f"hybrid_layer_pattern {model.hybrid_layer_pattern}: this Megatron-Core splits patterns evenly. "
            "Take '|' out of it, or install megatron-core>=0.17."
        )
    pattern = model.hybrid_layer_pattern if parted else model.letters
    spec = local_stack_spec if model.transformer_impl == "local" else _classes.stock_spec()
    chunk: torch.nn.Module = _classes.model(
        **{_classes.spec_key: spec, _classes.pattern_key: pattern},
        **({"vp_stage": stage} if _classes.builds_stages else {}),
        **arguments(model, config, stage),
    )
    return chunk
