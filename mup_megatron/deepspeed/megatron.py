"""Megatron-Core under DeepSpeed: a GPTModel under the engine, and DeepSpeed's pipeline made of Megatron-Core's layers.

    from mup_megatron.deepspeed import megatron

    plan = recipe.plan(model_file)
    megatron.prepare(gpt, plan)                                  # a GPTModel, tensor-parallel or not
    engine, *_ = deepspeed.initialize(
        model=gpt, model_parameters=megatron.param_groups(gpt, plan), mpu=megatron.mpu(), config=...
    )

    module = megatron.pipeline_module(config, model_file, plan, num_stages=2)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=megatron.param_groups(module, plan), config=...
    )

With a "mup" entry in the configuration the groups need not be handed over, and the engine is guarded.

Both get initial weights, multipliers and attention scale from the adapter for Megatron, and have its names, so that
a run is the same as Megatron's own. No theory here, and no training loop. Importing it imports Megatron and DeepSpeed:
without a GPU the CPU runtime and DS_ACCELERATOR=cpu have to come before. Megatron's process groups have to be there,
with tensor parallelism alone: pipelines are DeepSpeed's.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state, tensor_parallel

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.collectives import raise_together
from mup_megatron.deepspeed.megatron_layers import Stage, gather_between_stages, mean_loss, pipeline_layers
from mup_megatron.deepspeed.names import prepared
from mup_megatron.deepspeed.pipeline import count_once
from mup_megatron.errors import InputError
from mup_megatron.megatron import cpu, names
from mup_megatron.megatron.model import apply_plan
from mup_megatron.modules import groups
from mup_megatron.modules.groups import Form, Group
from mup_megatron.theory import Plan

__all__ = [
    "ModelParallelUnit",
    "mean_loss",
    "mpu",
    "named_parameters",
    "param_groups",
    "pipeline_layers",
    "pipeline_module",
    "prepare",
]

Tensor = torch.Tensor

_stages: "weakref.WeakKeyDictionary[torch.nn.Module, Stage]" = weakref.WeakKeyDictionary()
"""Pipeline → what this rank's stage of it holds, by Megatron's names."""


# ---- a GPTModel under the engine -----------------------------------------------------------------------------------


class ModelParallelUnit:
    """Megatron's `parallel_state` with what DeepSpeed asks of an `mpu` and Megatron-Core no longer has."""

    def get_model_parallel_rank(self) -> int:
        """Returns this process's place among those that hold one model together."""
        rank: int = torch.distributed.get_rank(parallel_state.get_model_parallel_group())
        return rank

    def get_model_parallel_world_size(self) -> int:
        """Returns the number of processes that hold one model together."""
        size: int = torch.distributed.get_world_size(parallel_state.get_model_parallel_group())
        return size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Returns the ranks that hold the same part of the model."""
        return list(torch.distributed.get_process_group_ranks(parallel_state.get_data_parallel_group()))

    def __getattr__(self, name: str) -> Any:
        """Returns what Megatron has under this name."""
        return getattr(parallel_state, name)


def mpu() -> ModelParallelUnit:
    """Returns the `mpu` of `deepspeed.initialize` for a tensor-parallel GPTModel."""
    return ModelParallelUnit()


def prepare(model: torch.nn.Module, plan: Plan, *, initialize: bool = True) -> None:
    """Makes a GPTModel what the plan says, and ready for the engine. Collective: every rank has to call it.

    Call it on the model as Megatron built it, before `param_groups` and `deepspeed.initialize`. The engine's backward
    knows nothing of tensor parallelism: gradients that Megatron's own training adds up over its ranks after the
    backward (norms and biases under sequence parallelism, norms of queries and keys) are added up as they come.

    Args:
        model: a GPTModel that is not wrapped.
        plan: for the whole model.
        initialize: False where the weights are about to be loaded from a checkpoint.

    Raises:
        InputError: the model cannot be made what the plan says, or not trained by the engine; the same on every rank.
    """
    config: Any = model.config
    raise_together(_problems(config))
    apply_plan([model], plan, initialize=initialize)
    _add_up_gradients(model, config)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        model.register_forward_pre_hook(_require_mpu)
    prepared(model, plan, named_parameters, computes=_computed(config))


def param_groups(model: torch.nn.Module, plan: Plan, *, form: Form = Form.ABSOLUTE) -> list[Group]:
    """Returns this rank's groups, for `deepspeed.initialize(model_parameters=…)` or a client optimizer.

    Args:
        model: of `prepare`, or of `pipeline_module`: then every stage has every group, padded where it holds nothing
            of it, since ZeRO-1 has one collective for each group.
        plan: for the whole model.
        form: absolute values for DeepSpeed, ratios for the fork Megatron-DeepSpeed.
    """
    pad_on = model if isinstance(model, PipelineModule) else None
    return groups.param_groups(named_parameters(model, plan), plan, form=form, pad_on=pad_on)


def named_parameters(model: torch.nn.Module, plan: Plan) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields (the plan's name, parameter) of what this rank holds; of a pipeline as well, and inside an engine."""
    inner = names.unwrapped(model)
    return names.named_parameters([_stages.get(inner, inner)], tied=plan.tied)


def _computed(config: Any) -> dict[str, Any]:
    """Returns what weights do not show of a layer, by a model file's keys; a fused GELU is the approximation."""
    fused = (config.bias_activation_fusion and config.add_bias_linear) or config.use_te_activation_func
    return {
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "norm_epsilon": config.layernorm_epsilon,
        "tanh_gelu": bool(
            fused and config.activation_func is torch.nn.functional.gelu and not config.gated_linear_unit
        ),
    }


def _problems(config: Any) -> list[str]:
    problems = []
    if config.pipeline_model_parallel_size > 1:
        problems.append(
            "pipeline_model_parallel_size: DeepSpeed's engine does not run Megatron's pipeline. Set it to 1, and use "
            "pipeline_module() for a pipeline of DeepSpeed's."
        )
    if config.context_parallel_size > 1:
        problems.append(
            "context_parallel_size: DeepSpeed's engine would not add up gradients over these ranks. Set it to 1."
        )
    if config.num_moe_experts is not None:
        problems.append(
            "num_moe_experts: DeepSpeed's engine would add up gradients of experts over the wrong ranks. Train models "
            "with experts in Megatron's own training."
        )
    for key in ("multi_latent_attention", "mtp_num_layers"):
        if getattr(config, key, None):
            problems.append(f"{key}: such layers were not tried under DeepSpeed. Use Megatron's own training.")
    if config.gradient_accumulation_fusion:
        problems.append(
            "gradient_accumulation_fusion: it writes gradients where DeepSpeed's engine does not look for them. "
            "Turn it off (--no-gradient-accumulation-fusion)."
        )
    if cpu.is_enabled() and get_accelerator().device_name() != "cpu":
        problems.append(
            "DS_ACCELERATOR: Megatron runs on the CPU here, and DeepSpeed chose "
            f"{get_accelerator().device_name()}. Set DS_ACCELERATOR=cpu before DeepSpeed is imported."
        )
    return problems


def _require_mpu(model: torch.nn.Module, _inputs: tuple[Any, ...]) -> None:
    """Without one DeepSpeed trains in silence, from shards that it has made the same on all ranks."""
    if model.training and deepspeed_groups.mpu is None:
        raise InputError(
            "mpu: DeepSpeed got none, takes tensor-parallel ranks for data-parallel and made their shards the same. "
            "Give deepspeed.initialize mpu=mup_megatron.deepspeed.megatron.mpu()."
        )


def _add_up_gradients(model: torch.nn.Module, config: Any) -> None:
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return
    for name, parameter in model.named_parameters():
        if getattr(parameter, "average_gradients_across_tp_domain", False):
            parameter.register_hook(partial(_reduced, op=torch.distributed.ReduceOp.AVG))
        elif _is_partial(name, parameter, config):
            parameter.register_hook(partial(_reduced, op=torch.distributed.ReduceOp.SUM))


def _is_partial(name: str, parameter: torch.nn.Parameter, config: Any) -> bool:
    """Says if each tensor-parallel rank has only its part of the gradient: of its tokens, or of its heads."""
    if config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        return True
    return bool(config.qk_layernorm) and (".q_layernorm." in name or ".k_layernorm." in name)


def _reduced(gradient: Tensor, *, op: Any) -> Tensor:
    total = gradient.clone()
    torch.distributed.all_reduce(total, op=op, group=parallel_state.get_tensor_model_parallel_group())
    return total


# ---- DeepSpeed's pipeline ------------------------------------------------------------------------------------------


def pipeline_module(
    config: Any,
    model: ModelFile,
    plan: Plan,
    *,
    loss_fn: Callable[..., Any] = mean_loss,
    initialize: bool = True,
    seed: int = 1234,
    **arguments: Any,
) -> PipelineModule:
    """Builds a `deepspeed.pipe.PipelineModule` of Megatron-Core's layers that is what the plan says. Collective.

    Tensor parallelism beside it wants a topology whose axis `model` is Megatron's tensor-parallel group
    (`PipeModelDataParallelTopology`).

    Args:
        config: Megatron's TransformerConfig of the whole model.
        model: what the plan was made for.
        plan: for the whole model.
        loss_fn: takes logits and labels, both as the pipeline has them.
        initialize: False where the weights are about to be loaded from a checkpoint.
        seed: of the initial weights, which do not depend on the split. Random numbers go on from it.
        arguments: PipelineModule's own: `num_stages` or `topology`, `partition_method`,
            `activation_checkpoint_interval`, …

    Raises:
        InputError: the model cannot be made what the plan says; the same on every rank.
    """
    raise_together(_problems(config))
    with torch.no_grad():  # it broadcasts tied weights in the open, and torch warns of it at every backward
        pipeline = PipelineModule(
            pipeline_layers(config, model),
            loss_fn=loss_fn,
            seed_layers=True,
            seed_fn=_seed,
            base_seed=seed,
            **arguments,
        )
    raise_together(_empty_stages(pipeline))
    pipeline.seed_layers = False  # it would seed dropout anew for every layer and micro-batch
    _seed(seed + 100 * pipeline.stage_id)  # the stages' dropout differs, as in Megatron
    stage = Stage(config, pipeline.modules())
    _stages[pipeline] = stage
    apply_plan([stage], plan, initialize=initialize)
    _add_up_gradients(stage, config)
    count_once(pipeline)
    prepared(pipeline, plan, named_parameters, computes=_computed(config))
    if config.sequence_parallel:
        gather_between_stages(pipeline)
    return pipeline


def _empty_stages(pipeline: PipelineModule) -> list[str]:
    return [
        f"num_stages: of {pipeline.num_stages} stages, stage {stage} would hold no layer. Use fewer stages, or another "
        "partition_method ('uniform' splits evenly)."
        for stage, (begin, end) in enumerate(pairwise(pipeline.parts))
        if begin == end
    ]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
