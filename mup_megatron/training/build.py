"""Model file + recipe + options → this rank's model, optimizer and schedule, all Megatron-Core's own. Does not train.

Importing it imports Megatron: the CPU runtime has to come before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import HAVE_APEX
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.errors import InputError
from mup_megatron.megatron import cpu, versions
from mup_megatron.megatron.builders import build_chunk, transformer_config
from mup_megatron.megatron.guard import require_as_planned
from mup_megatron.megatron.model import apply_plan, configure
from mup_megatron.megatron.names import named_parameters
from mup_megatron.megatron.optimizer import config_overrides
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan
from mup_megatron.training.experts import draw_by_name
from mup_megatron.training.objectives import NEXT_TOKEN, Objective, objective_of
from mup_megatron.training.options import TrainingOptions


@dataclass(frozen=True)
class Built:
    """This rank's part of a run, ready to train. `chunks` are wrapped in DDP, one for each virtual pipeline stage."""

    config: Any
    chunks: Sequence[Any]
    optimizer: Any
    scheduler: Any
    objective: Objective = NEXT_TOKEN


def available_model(model: ModelFile, options: TrainingOptions) -> ModelFile:
    """Returns the model as it can be built on this machine: on the CPU a Transformer Engine model becomes a local one.

    The two compute the same; the names of norms differ, so the plan has to be made for what is built.

    Raises:
        InputError: the model needs a package that is not installed.
    """
    if model.transformer_impl == "transformer_engine":
        if cpu.is_enabled():
            model = model.model_copy(update={"transformer_impl": "local"})
        elif not HAVE_TE:
            raise InputError(
                "transformer_impl: transformer_engine, and Transformer Engine is not installed. Install it "
                "(pip install 'transformer-engine[pytorch]'), or write `transformer_impl: local` into the model file."
            )
    problem = architecture_of(model).local_problem(model, on_cpu=cpu.is_enabled())
    if model.transformer_impl == "local" and problem is not None:
        raise InputError(problem)
    if model.transformer_impl == "local" and not HAVE_APEX:
        if model.apply_layernorm_1p:
            raise InputError(
                "apply_layernorm_1p: without Transformer Engine and Apex there is no such norm. "
                "Train on a GPU with one of them, or drop the key from model file and recipe."
            )
        if options.sequence_parallel and not cpu.is_enabled():
            raise InputError(
                "--sequence-parallel: with transformer_impl local it needs the norms of Apex, which is not installed. "
                "Install Apex, use transformer_engine, or drop the flag."
            )
    return model


def build(model: ModelFile, recipe: Recipe, plan: Plan, options: TrainingOptions, *, initialize: bool) -> Built:
    """Builds this rank's part of a run. Collective.

    Args:
        model: as `available_model` returns it.
        recipe: gives hyperparameters and schedule.
        plan: the recipe's for this model.
        options: layout and precision.
        initialize: False where the weights are about to be loaded.

    Raises:
        InputError: the plan cannot be applied to this model.
    """
    config = configuration(model, recipe, options)
    configure(config, plan)
    models = drawn(model, plan, config, options, initialize=initialize)
    apply_plan(models, plan, initialize=initialize)
    built = trainable(
        model, models, config, recipe, options, lambda chunks, settings: config_overrides(chunks, plan, settings)
    )
    require_as_planned(built.chunks, plan, built.optimizer, built.scheduler, weights=initialize)
    return built


def drawn(
    model: ModelFile, plan: Plan, config: Any, options: TrainingOptions, *, initialize: bool
) -> list[torch.nn.Module]:
    """Returns this rank's chunks with weights as Megatron draws them; of the plan, names and experts alone count."""
    models = [build_chunk(model, config, stage) for stage in _stages(model, options)]
    _set_experts_apart(models, plan)
    if initialize and config.use_cpu_initialization and any(entry.is_expert for entry in plan.entries):
        draw_by_name(models, plan, config, seed=options.seed)
    return models


def trainable(
    model: ModelFile,
    models: Sequence[torch.nn.Module],
    config: Any,
    recipe: Recipe,
    options: TrainingOptions,
    overrides: Callable[[Sequence[Any], Any], Any],
) -> Built:
    """Returns chunks with Megatron's optimizer and the recipe's schedule. Collective.

    Args:
        model: whose objective they learn.
        models: the rank's chunks, not wrapped.
        config: their TransformerConfig.
        recipe: gives hyperparameters and schedule.
        options: layout and precision.
        overrides: of wrapped chunks and an OptimizerConfig, the values of single groups.
    """
    chunks = _wrapped(models, config, options)
    optimizer_config = _optimizer_config(recipe, options)
    optimizer = get_megatron_optimizer(
        optimizer_config,
        chunks,
        config_overrides=overrides(chunks, optimizer_config),
        use_gloo_process_groups=False,
    )
    versions.let_sgd_resume(optimizer)
    config.grad_scale_func = optimizer.scale_loss
    return Built(config, chunks, optimizer, schedule(optimizer, recipe, options), objective_of(model))


def _set_experts_apart(models: Sequence[torch.nn.Module], plan: Plan) -> None:
    """Marks experts for buffers and an optimizer of their own, as Megatron does where ranks hold different ones.

    So on every layout: a checkpoint is then for any number of expert-parallel ranks, and gradients of experts are added
    up over those that hold them alike, which Megatron-Core 0.16 else does not do where they alone are not split.
    """
    for name, parameter in named_parameters(models, tied=plan.tied):
        if name in plan.by_name and plan[name].is_expert:
            parameter.allreduce = False  # type: ignore[attr-defined]


def configuration(model: ModelFile, recipe: Recipe, options: TrainingOptions, **more: Any) -> Any:
    """Returns the TransformerConfig of a run, before any plan; `more` are further fields of it."""
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    virtual_stages = options.virtual_stages(model)
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_size,
        "normalization": model.normalization,
        "layernorm_epsilon": model.norm_epsilon,
        "layernorm_zero_centered_gamma": model.apply_layernorm_1p,
        "qk_layernorm": model.qk_layernorm,
        "gated_linear_unit": model.swiglu,
        "activation_func": torch.nn.functional.silu if model.swiglu else torch.nn.functional.gelu,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        # The base's: the plan rescales what Megatron draws with it.
        "init_method_std": recipe.moved.init_method_std,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "bf16": options.bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": options.tensor_model_parallel_size,
        "pipeline_model_parallel_size": options.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_stages,
        "sequence_parallel": options.sequence_parallel,
        "expert_model_parallel_size": options.expert_model_parallel_size,
        "expert_tensor_parallel_size": options.expert_tensor_parallel_size or options.tensor_model_parallel_size,
        # Interleaved, sends and receives between two ranks that are each other's neighbours on both sides would be
        # ambiguous in one batch. Megatron-LM's arguments couple these likewise.
        "overlap_p2p_comm": virtual_stages is not None,
        "batch_p2p_comm": virtual_stages is None,
        # Its kernels are a separate build, and Megatron takes them for granted once this is on.
        "masked_softmax_fusion": False,
        "use_cpu_initialization": options.use_cpu_initialization,
        "finalize_model_grads_func": finalize_model_grads,
    }
    return transformer_config(model, {**fields, **cpu.transformer_config_overrides(), **more})


def _stages(model: ModelFile, options: TrainingOptions) -> Sequence[int | None]:
    """Megatron's `vp_stage` of each of this rank's chunks."""
    count = options.virtual_stages(model)
    return [None] if count is None else range(count)


def _wrapped(models: Sequence[torch.nn.Module], config: Any, options: TrainingOptions) -> list[Any]:
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=options.use_distributed_optimizer, grad_reduce_in_fp32=options.bf16
    )
    placed = [model.cuda() for model in models]
    if options.bf16:
        placed = [Float16Module(config, model) for model in placed]
    # As in Megatron-LM: only the first chunk's gradients are reduced early enough to profit from buckets.
    return [
        DistributedDataParallel(config, ddp, model, disable_bucketing=index > 0) for index, model in enumerate(placed)
    ]


def _optimizer_config(recipe: Recipe, options: TrainingOptions) -> Any:
    h = recipe.moved
    return OptimizerConfig(
        optimizer=recipe.parametrization.optimizer,
        lr=h.lr,
        min_lr=h.min_lr,
        weight_decay=h.weight_decay,
        **recipe.optimizer_values,
        **MEGATRON_OPTIMIZERS[recipe.parametrization.optimizer].fixed,
        clip_grad=h.clip_grad,
        bf16=options.bf16,
        params_dtype=torch.bfloat16 if options.bf16 else torch.float32,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )


def schedule(optimizer: Any, recipe: Recipe, options: TrainingOptions) -> Any:
    """Returns the recipe's schedule, counted in iterations. Fractions are not rounded: one shape at any length."""
    h, s = recipe.moved, recipe.schedule
    decay = s.lr_decay_fraction * options.train_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=h.lr,
        min_lr=h.min_lr,
        lr_warmup_steps=s.lr_warmup_fraction * options.train_iters,
        lr_decay_steps=decay,
        lr_decay_style=s.lr_decay_style,
        start_wd=h.weight_decay,
        end_wd=h.weight_decay,
        wd_incr_steps=options.train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=s.lr_wsd_decay_fraction * options.train_iters,
        lr_wsd_decay_style=s.lr_wsd_decay_style,
    )
