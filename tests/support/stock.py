"""A tiny stock Megatron-Core GPTModel, trained as Megatron trains it, with nothing of the package but the CPU runtime.

The reference that adapter tests compare against: explicit sizes, any TP × PP × virtual pipeline × DP layout, and
initial weights that are the same numbers on every layout. All but the dataclasses runs inside a rank (`run_ranks`).
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mup_megatron.megatron import cpu

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shape of the model. Defaults: two layers, everything small, TP 2 and PP 2 divide it."""

    num_layers: int = 2
    hidden_size: int = 32
    ffn_hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int = 4
    kv_channels: int = 8
    vocab_size: int = 64
    seq_length: int = 16
    normalization: str = "LayerNorm"
    gated_linear_unit: bool = False
    qk_layernorm: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    position_embedding_type: str = "learned_absolute"
    tied: bool = True
    init_method_std: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the ranks share the work. `vpp` is the number of model chunks per pipeline rank, None for plain pipelines."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    dp: int = 1
    ep: int = 1
    """Experts are divided among so many of the ranks that share tensors and data."""
    etp: int | None = None
    """The tensor parallelism of experts, by default that of the rest."""
    sequence_parallel: bool = False
    distributed_optimizer: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the optimizer and the schedule are told. `batch` is global, split evenly over DP ranks and microbatches."""

    optimizer: str = "adam"
    lr: float = 1e-3
    min_lr: float = 1e-4
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    more: Mapping[str, Any] = field(default_factory=dict)
    """Of the optimizer's configuration."""
    warmup_steps: int = 2
    decay_steps: int = 20
    batch: int = 8
    micro_batch: int = 4


@dataclass
class Run:
    """A model ready to train on this rank. `chunks` are wrapped in Megatron's DDP, one per virtual pipeline stage."""

    sizes: Sizes
    layout: Layout
    training: Training
    config: Any
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    done: int = 0
    grad_norms: list[float] = field(default_factory=list)


def init_parallel(layout: Layout, seed: int = 1234) -> None:
    """Megatron's process groups and random numbers, after destroying those of an earlier layout in this process."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    experts = {"expert_model_parallel_size": layout.ep, "expert_tensor_parallel_size": layout.etp}
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, layout.vpp, **experts, create_gloo_process_groups=False
    )
    assert parallel_state.get_data_parallel_world_size() == layout.dp
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def transformer_config(sizes: Sizes, layout: Layout, **changes: Any) -> Any:
    """Megatron's TransformerConfig for these sizes: fp32, no dropout, CPU-safe. `changes` override any field."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    fields = {
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden_size,
        "ffn_hidden_size": sizes.ffn_hidden_size,
        "num_attention_heads": sizes.num_attention_heads,
        "num_query_groups": sizes.num_query_groups,
        "kv_channels": sizes.kv_channels,
        "normalization": sizes.normalization,
        "gated_linear_unit": sizes.gated_linear_unit,
        "activation_func": torch.nn.functional.silu if sizes.gated_linear_unit else torch.nn.functional.gelu,
        "qk_layernorm": sizes.qk_layernorm,
        "add_bias_linear": sizes.add_bias_linear,
        "add_qkv_bias": sizes.add_qkv_bias,
        "init_method_std": sizes.init_method_std,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "sequence_parallel": layout.sequence_parallel,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp or layout.tp,
        "pipeline_dtype": torch.float32,
        # Of two ranks each is the other's predecessor and successor: interleaved, one batch of sends and receives
        # between them is ambiguous, and activations arrive as gradients. Megatron-LM's arguments couple these likewise.
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
        "finalize_model_grads_func": finalize_model_grads,
    }
    kind = MLATransformerConfig if changes.get("multi_latent_attention") else TransformerConfig
    return kind(**{**fields, **cpu.transformer_config_overrides(), **changes})


def build_chunks(sizes: Sizes, layout: Layout, config: Any, layer_spec: Any = None) -> list[Any]:
    """This rank's GPTModel chunks, not yet wrapped: one per virtual pipeline stage. `layer_spec`: local by default."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    chunks = []
    for index in range(layout.vpp or 1):
        stage = index if layout.vpp else None
        pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        model = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec
            or get_gpt_layer_local_spec(qk_layernorm=sizes.qk_layernorm, normalization=sizes.normalization),
            vocab_size=sizes.vocab_size,
            max_sequence_length=sizes.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=sizes.tied,
            position_embedding_type=sizes.position_embedding_type,
            vp_stage=stage,
        )
        chunks.append(model)
    return chunks


_DRAWN = re.compile(r"\.mixer\.(conv1d|A_log|dt_bias)\b")
_RANGES = {"conv1d": (-0.5, 0.5), "A_log": (0.0, 2.7), "dt_bias": (-6.0, -2.0)}
"""What Megatron draws of a Mamba layer by itself, whatever the std → about what range it draws from."""


def saved(chunk: Any) -> Any:
    """What a chunk would save. 0.16 takes it for granted that it is told the ranks which share its data."""
    from megatron.core import parallel_state

    return chunk.sharded_state_dict(
        metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    )


@torch.no_grad()
def draw_weights(chunks: Sequence[Any], std: float, seed: int = 7) -> None:
    """Overwrite every matrix with numbers that depend on its global name and shape alone, not on the layout.

    Each global tensor (all layers of one kind together) is drawn whole and this rank copies its part. Gains and biases
    keep the 1 and 0 they were built with, but for those of Mamba layers that Megatron draws. Call it before DDP and the
    optimizer take their copies.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for chunk in chunks:
        for entry in nested_values(saved(chunk)):
            parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
            for part in parts:
                if not isinstance(part, ShardedTensor) or (part.data.dim() < 2 and not _DRAWN.search(part.key)):
                    continue
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {part.key}".encode()))
                whole = std * torch.randn(part.global_shape, generator=generator)
                if own := _DRAWN.search(part.key):
                    low, high = _RANGES[own[1]]
                    whole = low + (high - low) * torch.rand(part.global_shape, generator=generator)
                begin = part.global_offset
                size = (1,) * part.prepend_axis_num + tuple(part.local_shape)
                mine = whole[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))]
                part.data.copy_(mine.reshape(part.data.shape))


def prepare(
    sizes: Sizes,
    layout: Layout,
    training: Training,
    *,
    config_changes: dict[str, Any] | None = None,
    before_ddp: Callable[[list[Any]], None] | None = None,
    config_overrides: Callable[[list[Any], Any], Any] | None = None,
) -> Run:
    """Process groups, model with `draw_weights`, DDP, Megatron's optimizer and its schedule.

    `before_ddp(chunks)` may change the built model; `config_overrides(chunks, optimizer_config)` gives the argument of
    that name to `get_megatron_optimizer`, whose own default it is otherwise. (Both are where a plug-in acts.)
    """
    init_parallel(layout)
    config = transformer_config(sizes, layout, **(config_changes or {}))
    chunks = build_chunks(sizes, layout, config)
    draw_weights(chunks, sizes.init_method_std)
    if before_ddp is not None:
        before_ddp(chunks)
    return finish(sizes, layout, training, config, chunks, config_overrides)


def finish(
    sizes: Sizes,
    layout: Layout,
    training: Training,
    config: Any,
    chunks: list[Any],
    config_overrides: Callable[[list[Any], Any], Any] | None = None,
) -> Run:
    """Wrap built chunks in Megatron's DDP, and make optimizer and schedule for them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer)
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    optimizer_config = OptimizerConfig(
        optimizer=training.optimizer,
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        **training.more,
        use_distributed_optimizer=layout.distributed_optimizer,
    )
    overrides = config_overrides(wrapped, optimizer_config) if config_overrides is not None else None
    optimizer = get_megatron_optimizer(
        optimizer_config, wrapped, config_overrides=overrides, use_gloo_process_groups=False
    )
    config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=training.warmup_steps,
        lr_decay_steps=training.decay_steps,
        lr_decay_style="linear",
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.decay_steps,
        wd_incr_style="constant",
    )
    return Run(sizes, layout, training, config, wrapped, optimizer, scheduler)


def batch(sizes: Sizes, training: Training, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, int64 [batch, seq_length] each, of global step `step`: noise over a learnable count-up."""
    generator = torch.Generator().manual_seed(step)
    shape = (training.batch, sizes.seq_length + 1)
    start = torch.randint(sizes.vocab_size, (training.batch, 1), generator=generator)
    noise = torch.randint(3, shape, generator=generator)
    tokens = (start + torch.arange(sizes.seq_length + 1) + noise) % sizes.vocab_size
    return tokens[:, :-1], tokens[:, 1:]


def _microbatches(run: Run, step: int) -> list[tuple[Tensor, Tensor]]:
    """This data-parallel rank's share of the step's batch."""
    from megatron.core import parallel_state

    tokens, labels = batch(run.sizes, run.training, step)
    mine = slice(parallel_state.get_data_parallel_rank(), None, run.layout.dp)
    size = run.training.micro_batch
    return list(zip(tokens[mine].split(size), labels[mine].split(size), strict=True))


def _forward_step(microbatches: Iterator[tuple[Tensor, Tensor]], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    tokens, labels = next(microbatches)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    output = model(tokens, positions, None, labels=labels)

    def mean(losses: Tensor) -> tuple[Tensor, Tensor]:
        loss = losses.float().mean()
        return loss, loss.detach().clone()

    return output, mean


def train(run: Run, steps: int) -> list[float]:
    """Train `steps` more steps; return each step's global mean loss, the same float on every rank."""
    return [_train_step(run) for _ in range(steps)]


def _train_step(run: Run) -> float:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    microbatches = _microbatches(run, run.done)
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(microbatches) for _ in run.chunks],
        model=run.chunks,
        num_microbatches=len(microbatches),
        seq_length=run.sizes.seq_length,
        micro_batch_size=run.training.micro_batch,
        forward_only=False,
    )
    updated, grad_norm, _ = run.optimizer.step()
    assert updated
    run.scheduler.step(increment=1)
    run.done += 1
    run.grad_norms.append(float(grad_norm))
    return _global_mean(losses)


def _global_mean(losses: list[Tensor]) -> float:
    """The last pipeline stage knows its losses: average them over the data-parallel ranks and tell the other stages."""
    from megatron.core import parallel_state

    mean = torch.stack(losses).mean() if losses else torch.zeros(())
    torch.distributed.all_reduce(mean, group=parallel_state.get_data_parallel_group())
    mean /= parallel_state.get_data_parallel_world_size()
    torch.distributed.broadcast(
        mean,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    assert math.isfinite(mean.item())
    return mean.item()


def _state(run: Run, *, is_loading: bool) -> dict[str, Any]:
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state: dict[str, Any] = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(run.chunks)
    }
    state["optimizer"] = run.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    state["scheduler"] = run.scheduler.state_dict()
    state["done"] = run.done
    return state


def save(run: Run, folder: Path) -> None:
    """Write model, optimizer, schedule and step as a torch_dist checkpoint into an existing empty folder."""
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(_state(run, is_loading=False), str(folder))


def load(run: Run, folder: Path) -> None:
    """Continue `run`, prepared with the same sizes and layout, from what `save` wrote."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(_state(run, is_loading=True), str(folder))
    for index, chunk in enumerate(run.chunks):
        chunk.module.load_state_dict(state[f"model{index}"])
    with torch.no_grad():  # in fp32 the distributed optimizer copies into views of the parameters themselves
        run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.done = state["done"]
