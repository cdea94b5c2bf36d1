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
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import build_module

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import HEAD, WORD_EMBEDDINGS
from mup_megatron.collectives import raise_together
from mup_megatron.deepspeed.names import prepared
from mup_megatron.deepspeed.pipeline import count_once
from mup_megatron.errors import InputError
from mup_megatron.megatron import cpu, names
from mup_megatron.megatron.model import apply_plan
from mup_megatron.modules import groups
from mup_megatron.modules.groups import Form, Group
from mup_megatron.theory import Plan

Tensor = torch.Tensor

_TIED = "embedding"
"""The key of what DeepSpeed's pipeline ties."""


# ---- a GPTModel under the engine -----------------------------------------------------------------------------------


class ModelParallelUnit:
    """Megatron's `parallel_state` with what DeepSpeed asks of an `mpu` and Megatron-Core no longer has."""

    def get_model_parallel_rank(self) -> int:
        """This process's place among those that hold one model together."""
        rank: int = torch.distributed.get_rank(parallel_state.get_model_parallel_group())
        return rank

    def get_model_parallel_world_size(self) -> int:
        """How many processes hold one model together."""
        size: int = torch.distributed.get_world_size(parallel_state.get_model_parallel_group())
        return size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Who holds the same part of the model."""
        return list(torch.distributed.get_process_group_ranks(parallel_state.get_data_parallel_group()))

    def __getattr__(self, name: str) -> Any:
        """All else is Megatron's."""
        return getattr(parallel_state, name)


def mpu() -> ModelParallelUnit:
    """What `deepspeed.initialize` takes as `mpu` for a tensor-parallel GPTModel."""
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
    prepared(model, plan, named_parameters)


def param_groups(model: torch.nn.Module, plan: Plan, *, form: Form = Form.ABSOLUTE) -> list[Group]:
    """The groups of this rank's parameters, for `deepspeed.initialize(model_parameters=…)` or a client optimizer.

    Args:
        model: of `prepare`, or of `pipeline_module`: then every stage has every group, padded where it holds nothing
            of it, since ZeRO-1 has one collective for each group.
        plan: for the whole model.
        form: absolute values for DeepSpeed, ratios for the fork Megatron-DeepSpeed.
    """
    pad_on = model if isinstance(model, PipelineModule) else None
    return groups.param_groups(named_parameters(model, plan), plan, form=form, pad_on=pad_on)


def named_parameters(model: torch.nn.Module, plan: Plan) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(the plan's name, parameter) of what this rank holds; of a pipeline as well, and inside an engine."""
    inner = names.unwrapped(model)
    return names.named_parameters([_stages.get(inner, inner)], tied=plan.tied)


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
    """Whether each tensor-parallel rank has only its part of the gradient: of its tokens, or of its heads."""
    if config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        return True
    return bool(config.qk_layernorm) and (".q_layernorm." in name or ".k_layernorm." in name)


def _reduced(gradient: Tensor, *, op: Any) -> Tensor:
    total = gradient.clone()
    torch.distributed.all_reduce(total, op=op, group=parallel_state.get_tensor_model_parallel_group())
    return total


# ---- DeepSpeed's pipeline ------------------------------------------------------------------------------------------


def pipeline_layers(config: Any, model: ModelFile) -> list[LayerSpec]:
    """A GPTModel as the layers of DeepSpeed's pipeline: embedding, each transformer layer, final norm, readout.

    Take `pipeline_module`, which applies the plan too, unless layers of your own come between. The first layer takes
    tokens [batch, sequence], or a tuple of tokens and position ids; between layers goes one tensor, [sequence, batch,
    hidden]; the last gives logits [sequence, batch, vocabulary / TP].

    Args:
        config: Megatron's TransformerConfig of the whole model.
        model: what the plan was made for.
    """
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=model.transformer_impl == "transformer_engine",
        normalization=model.normalization,
    )
    assert spec.layer_specs is not None
    layers = [LayerSpec(_Layer, config, model, layer, index) for index, layer in enumerate(spec.layer_specs)]
    norm = LayerSpec(_FinalNorm, config, spec.layer_norm)
    if not model.tied:
        return [LayerSpec(_Embedding, config, model), *layers, norm, LayerSpec(_Readout, config, model)]
    # Each stage of the two builds what it needs of the weight, so the last has no position embedding.
    first = TiedLayerSpec(_TIED, _Embedding, config, model, tied_weight_attr=WORD_EMBEDDINGS)
    last = TiedLayerSpec(_TIED, _Readout, config, model, forward_fn=_tied_logits, tied_weight_attr=HEAD)
    return [first, *layers, norm, last]


def mean_loss(logits: Tensor, labels: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Megatron's cross entropy, as a `loss_fn` of the pipeline: the mean over labels, or over a mask beside them."""
    labels, mask = labels if isinstance(labels, tuple) else (labels, torch.ones_like(labels, dtype=torch.float32))
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous())
    losses = losses.transpose(0, 1).float()
    mean: Tensor = (losses * mask).sum() / mask.sum()
    return mean


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
    """A `deepspeed.pipe.PipelineModule` of Megatron-Core's layers that is what the plan says. Collective.

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
    stage = _Stage(config, pipeline.modules())
    _stages[pipeline] = stage
    apply_plan([stage], plan, initialize=initialize)
    _add_up_gradients(stage, config)
    count_once(pipeline)
    prepared(pipeline, plan, named_parameters)
    if config.sequence_parallel:
        _whole_between_stages(pipeline)
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


class _Embedding(torch.nn.Module):
    def __init__(self, config: Any, model: ModelFile) -> None:
        super().__init__()
        self.embedding = LanguageModelEmbedding(
            config=config,
            vocab_size=_vocabulary(model),
            max_sequence_length=model.positions,
            position_embedding_type=model.position_embedding_type,
        )
        if model.tied:  # for a readout on this stage: it has no weight of its own, but a multiplier
            self.output_layer = _output_layer(config, model, with_weight=False)

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if isinstance(inputs, tuple):
            tokens, positions = inputs
        else:
            tokens, positions = inputs, torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        hidden: Tensor = self.embedding(tokens, positions)
        return hidden


class _Layer(torch.nn.Module):
    def __init__(self, config: Any, model: ModelFile, spec: Any, index: int) -> None:
        super().__init__()
        self.config = config
        self.layer = build_module(spec, config=config, layer_number=index + 1)
        self.rotary = None
        if model.position_embedding_type == "rope":
            self.rotary = RotaryEmbedding(
                kv_channels=config.kv_channels,
                rotary_percent=model.rotary_percent,
                rotary_interleaved=config.rotary_interleaved,
                rotary_base=model.rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
            )

    def forward(self, hidden: Tensor) -> Tensor:
        sequence_parallel = self.config.sequence_parallel
        length = hidden.shape[0] * (self.config.tensor_model_parallel_size if sequence_parallel else 1)
        angles = None if self.rotary is None else self.rotary(length)
        # Under sequence parallelism each rank drops other values, since it has other tokens.
        with tensor_parallel.get_cuda_rng_tracker().fork() if sequence_parallel else nullcontext():
            output: Tensor = self.layer(hidden, attention_mask=None, rotary_pos_emb=angles)[0]
        return output


class _FinalNorm(torch.nn.Module):
    def __init__(self, config: Any, norm: Any) -> None:
        super().__init__()
        self.final_layernorm = build_module(
            norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.final_layernorm(hidden)
        return normed


class _Readout(torch.nn.Module):
    def __init__(self, config: Any, model: ModelFile) -> None:
        super().__init__()
        self.output_layer = _output_layer(config, model, with_weight=True)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.output_layer(hidden)[0]
        return logits


def _output_layer(config: Any, model: ModelFile, *, with_weight: bool) -> torch.nn.Module:
    layer: torch.nn.Module = tensor_parallel.ColumnParallelLinear(
        config.hidden_size,
        _vocabulary(model),
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=not with_weight,
    )
    return layer


def _vocabulary(model: ModelFile) -> int:
    return model.padded_vocab_size(parallel_state.get_tensor_model_parallel_world_size())


def _tied_logits(module: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The readout where its stage has a copy of the weight, and where it has the embedding itself."""
    weight = None if isinstance(module, _Readout) else module.get_parameter(WORD_EMBEDDINGS)
    output_layer: Any = module.get_submodule("output_layer")
    logits: Tensor = output_layer(hidden, weight=weight)[0]
    return logits


class _Stage(torch.nn.Module):
    """What a stage of the pipeline holds, under the names that it has in a stage of Megatron's pipeline."""

    def __init__(self, config: Any, parts: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.decoder = torch.nn.Module()
        layers = torch.nn.ModuleList()
        self.decoder.layers = layers
        for part in parts:
            match part:
                case _Embedding():
                    self.embedding = part.embedding
                    if hasattr(part, "output_layer"):
                        self.output_layer = part.output_layer
                case _Layer():
                    layers.append(part.layer)
                case _FinalNorm():
                    self.decoder.final_layernorm = part.final_layernorm
                case _Readout():
                    self.output_layer = part.output_layer


_stages: "weakref.WeakKeyDictionary[torch.nn.Module, _Stage]" = weakref.WeakKeyDictionary()


def _whole_between_stages(pipeline: PipelineModule) -> None:
    """Under sequence parallelism each rank has other tokens, and DeepSpeed takes activations for the same on all.

    By default (`pipe_partitioned`) it sends a part of each rank's and puts them together again as one.
    """
    if pipeline.stage_id > 0:
        pipeline.register_forward_pre_hook(
            lambda _, inputs: (tensor_parallel.scatter_to_sequence_parallel_region(inputs[0]),)
        )
    if pipeline.stage_id < pipeline.num_stages - 1:
        pipeline.register_forward_hook(
            lambda _, __, hidden: tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False
            )
        )
