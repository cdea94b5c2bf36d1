"""A Megatron-Core model trained by DeepSpeed's engine and pipeline beside `mup-megatron train`. Runs inside a rank.

The same model, plan, data and schedule on all three ways. Nothing is compared here.
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import planned, stock
from support.shapes import HYPERPARAMETERS, gpt, recipe_for
from support.stock import Layout
from support.training_runs import VOCABULARY, options

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import Depth, Recipe, save_recipe
from mup_megatron.theory import Plan
from mup_megatron.training import ranks
from mup_megatron.training.train import run_training

STEPS = 8
BATCH = 8
SEED = 1234
CLIP = 0.5

# Width ratio 2; the heads grow, not their number.
_BOTH: dict[str, Any] = {"num_layers": 4, "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 8}
_GATED: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
_WIDE: dict[str, Any] = {"num_attention_heads": 4, "kv_channels": 16}
SHAPES = {
    "tied": (gpt(**_BOTH), gpt(2, **_BOTH, **_WIDE)),
    # Deeper than its base, by a rule of depth.
    "untied": (gpt(**{**_BOTH, "num_layers": 2}, **_GATED), gpt(2, **_BOTH, **_GATED, **_WIDE)),
}


def tuned(shape: str) -> Recipe:
    """Every multiplier differs from 1; some tensors have their own."""
    # With eps of the gradients' size Adam sees their scale, and so what clips them; with a small one it sees gradients
    # that are small themselves, as those of the norms of queries are.
    eps = {"tied": 1e-3, "untied": 1e-8}[shape]
    changes = {"lr": 1e-3, "min_lr": 1e-4, "attention_multiplier": 8.0, "adam_eps": eps, "clip_grad": CLIP}
    recipe = recipe_for(SHAPES[shape][0], **{**HYPERPARAMETERS, **changes})
    own = [{"match": "*.linear_fc1.weight", "lr_mult": 2.0, "multiplier": 0.5}]
    if shape == "untied":
        own.append({"match": "*.q_layernorm.weight", "lr_mult": 20.0})
    own_of_tensors = planned.recipe(SHAPES[shape][0], per_parameter=own).per_parameter
    rules = recipe.parametrization.model_copy(update={"depth": Depth() if shape == "untied" else None})
    return recipe.model_copy(update={"per_parameter": own_of_tensors, "parametrization": rules})


def plan_of(shape: str) -> Plan:
    return tuned(shape).plan(SHAPES[shape][1])


def lr_share(step: int) -> float:
    """The recipe's schedule as a share of the peak: linear to the floor, without warm-up."""
    return 1.0 - 0.9 * min(step / STEPS, 1.0)


# ---- what can be broken by hand ------------------------------------------------------------------------------------


def _one_lr(_model: Any, groups: list[dict[str, Any]]) -> None:
    for group in groups:
        group["lr"] = max(other["lr"] for other in groups)


def _no_readout(model: Any, _groups: list[dict[str, Any]]) -> None:
    for name, module in model.named_modules():
        if name.endswith("output_layer"):
            module._forward_pre_hooks.clear()


def _default_attention(model: Any, _groups: list[dict[str, Any]]) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "softmax_scale", None), float):
            module.softmax_scale = 16**-0.5


def _no_gradient_sums(model: Any, _groups: list[dict[str, Any]]) -> None:
    for parameter in model.parameters():
        parameter._backward_hooks = None


def _norm_as_deepspeed_counts(model: Any, _groups: list[dict[str, Any]]) -> None:
    for parameter in model.parameters():
        parameter.model_parallel = False
        parameter.tensor_model_parallel = False


def _no_padding(_model: Any, groups: list[dict[str, Any]]) -> None:
    groups[:] = [group for group in groups if any(p.dim() > 1 or p.numel() > 1 for p in group["params"])]


Break = Callable[[Any, list[dict[str, Any]]], None]
BREAKS: dict[str, Break] = {
    "one learning rate": _one_lr,
    "no readout multiplier": _no_readout,
    "the default attention scale": _default_attention,
    "no sums over tensor-parallel ranks": _no_gradient_sums,
    "groups without padding": _no_padding,
    "the norm as DeepSpeed counts it": _norm_as_deepspeed_counts,
}
"""What is done to model and groups before the engine is built."""


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. `stages` None: a GPTModel under the engine, else DeepSpeed's pipeline."""

    shape: str = "tied"
    zero: int = 0
    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    stages: int | None = None
    split: tuple[int, ...] | None = None
    """Where the stages of a pipeline end, in layers; None: as DeepSpeed splits by itself."""
    partitioned: bool = True
    """Whether DeepSpeed's pipeline sends a part of each tensor-parallel rank's activations; its default."""
    mpu: bool = True
    bf16: bool = False
    entry: bool = False
    """The configuration has a "mup" entry, and no groups are handed over."""
    fused_gelu: bool = False
    """Megatron's kernel of bias and GELU, which computes it with tanh."""
    plug_in: bool = True
    weights_of_pipeline: bool = False
    """A GPTModel that starts from what the pipeline draws: there each layer has a seed of its own."""
    broken: str | None = None
    only_rank: int | None = None
    """The rank that is broken; None: all."""

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * (self.stages or 1)

    def __str__(self) -> str:
        """What differs from the plainest run."""
        plain = Case()
        changed = {key: value for key, value in vars(self).items() if value != getattr(plain, key)}
        return " ".join(f"{key}={value}" for key, value in changed.items()) or "plain"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one rank."""

    losses: list[float]
    grad_norms: list[float]
    live: list[dict[str, tuple[float, float | None, float]]]
    """Of every step: parameter → learning rate, eps and weight decay of its group."""
    groups: list[str]
    start: dict[str, torch.Tensor]
    """The weights before the first step: this rank's part."""


def trained_by_megatron(
    shape: str, data: Path, folder: Path, *, tp: int = 1, pp: int = 1
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of `mup-megatron train`."""
    chosen = options(
        folder,
        train_iters=STEPS,
        global_batch_size=BATCH,
        seed=SEED,
        eval_iters=0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
    )
    run_training(SHAPES[shape][1], tuned(shape), data, chosen)
    torch.distributed.barrier()
    with (folder / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row["loss"]) for row in rows], [float(row["grad_norm"]) for row in rows]


def results(cases: Sequence[Case], data: Path, cache: Path) -> list[Result]:
    return [_trained(case, data, cache) for case in cases]


def _trained(case: Case, data: Path, cache: Path) -> Result:
    os.environ["DS_ACCELERATOR"] = "cpu"
    with ranks.joined(tensor=case.tp, pipeline=1, virtual_stages=None, seed=SEED):
        return _run(case, data, cache)


def _run(case: Case, data: Path, cache: Path) -> Result:
    import deepspeed

    import mup_megatron.deepspeed
    from mup_megatron.deepspeed import megatron

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    recipe, plan, (_, target) = tuned(case.shape), plan_of(case.shape), SHAPES[case.shape]
    model = model_of(case, target, plan, recipe)
    start = {name: parameter.detach().clone() for name, parameter in megatron.named_parameters(model, plan)}
    groups = megatron.param_groups(model, plan) if case.plug_in else _one_group(model, recipe)
    if case.broken is not None and case.only_rank in (None, torch.distributed.get_rank()):
        BREAKS[case.broken](model, groups)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=None if case.entry else groups,
        mpu=None if case.stages or not case.mpu else megatron.mpu(),
        lr_scheduler=lambda basic: torch.optim.lr_scheduler.LambdaLR(basic, lr_share),
        config=engine_config(case, recipe) | (entry_of(recipe, cache) if case.entry else {}),
    )
    assert (mup_megatron.deepspeed.plan_of(engine) is not None) == case.entry
    dataset = _dataset(target, data, cache)
    losses, norms, live = [], [], []
    for step in range(STEPS):
        live.append(live_values(optimizer, megatron.named_parameters(engine, plan)))
        batches = _batches(case, dataset, step, engine.grid.data_parallel_id if case.stages else None)
        losses.append(_pipeline_step(engine, batches) if case.stages else _engine_step(engine, batches))
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    names = [str(group.get("name")) for group in optimizer.param_groups]
    return Result(losses=losses, grad_norms=norms, live=live, groups=names, start=start)


def model_of(case: Case, target: ModelFile, plan: Plan, recipe: Recipe) -> Any:
    from mup_megatron.deepspeed import megatron

    sizes = planned.sizes_of(target, case.tp)
    layout = Layout(tp=case.tp, dp=case.dp, sequence_parallel=case.sequence_parallel)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    config = stock.transformer_config(
        sizes,
        layout,
        init_method_std=recipe.hyperparameters.init_method_std,
        bf16=case.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bias_activation_fusion=case.fused_gelu,
    )
    if case.stages is None:
        (gpt_model,) = stock.build_chunks(sizes, layout, config)
        if case.plug_in:
            megatron.prepare(gpt_model, plan, initialize=not case.weights_of_pipeline)
        if case.weights_of_pipeline:
            drawn = dict(megatron.named_parameters(_pipeline(case, config, target, plan, stages=1), plan))
            with torch.no_grad():
                for name, parameter in megatron.named_parameters(gpt_model, plan):
                    parameter.copy_(drawn[name])
        return gpt_model
    return _pipeline(case, config, target, plan, stages=case.stages)


def _pipeline(case: Case, config: Any, target: ModelFile, plan: Plan, *, stages: int) -> Any:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    from mup_megatron.deepspeed import megatron

    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=case.tp, num_dp=case.dp)
    with pytest.MonkeyPatch.context() as patch:
        if case.split is not None:
            patch.setattr("deepspeed.runtime.utils.partition_uniform", lambda **_: [0, *case.split])
        return megatron.pipeline_module(config, target, plan, topology=topology, partition_method="uniform", seed=SEED)


def _one_group(model: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """What a script without the plug-in gives the engine."""
    h = recipe.hyperparameters
    return [{"params": list(model.parameters()), "lr": h.lr, "weight_decay": h.weight_decay, "eps": h.adam_eps}]


def engine_config(case: Case, recipe: Recipe) -> dict[str, Any]:
    h = recipe.hyperparameters
    micro_batch = BATCH // case.dp // 2
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "betas": [h.adam_beta1, h.adam_beta2]}},
        "zero_optimization": {"stage": case.zero},
        "gradient_clipping": h.clip_grad,
        "bf16": {"enabled": case.bf16},
        "pipeline": {"pipe_partitioned": case.partitioned, "grad_partitioned": case.partitioned},
        "steps_per_print": None,
    }


def entry_of(recipe: Recipe, folder: Path) -> dict[str, Any]:
    path = folder.parent / f"{recipe.fingerprint}.{torch.distributed.get_rank()}.recipe.yaml"
    save_recipe(recipe, path)
    return {"mup": {"recipe": str(path)}}


def _dataset(target: ModelFile, data: Path, cache: Path) -> Any:
    from mup_megatron.training.data.dataset import build_datasets

    return build_datasets(
        data,
        seq_length=target.seq_length,
        train_samples=STEPS * BATCH,
        valid_samples=0,
        seed=SEED,
        cache_dir=cache,
    )[0]


def _batches(case: Case, dataset: Any, step: int, rank_in_pipelines: int | None) -> list[dict[str, torch.Tensor]]:
    from megatron.core import parallel_state

    from mup_megatron.training.data.dataset import global_batch

    # Megatron knows nothing of the stages of DeepSpeed's pipeline: to it they are data-parallel.
    rank = parallel_state.get_data_parallel_rank() if rank_in_pipelines is None else rank_in_pipelines
    return global_batch(
        dataset,
        step,
        global_batch_size=BATCH,
        micro_batch_size=BATCH // case.dp // 2,
        data_parallel_rank=rank,
        data_parallel_size=case.dp,
    )


def _engine_step(engine: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    total = torch.zeros(())
    for batch in batches:
        losses = engine(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        loss = (losses.float() * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        engine.backward(loss)
        engine.step()
        total += loss.detach() / len(batches)
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def _pipeline_step(engine: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    def micro_batches() -> Iterator[Any]:
        for batch in batches:
            yield (batch["tokens"], batch["position_ids"]), (batch["labels"], batch["loss_mask"])

    return float(engine.train_batch(micro_batches()))


def live_values(
    optimizer: Any, named: Iterator[tuple[str, torch.nn.Parameter]]
) -> dict[str, tuple[float, float | None, float]]:
    """Parameter → learning rate, eps and weight decay of the group that holds it, through ZeRO's flat buffers."""
    low_precision = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "fp16_groups", None)
    of_group = low_precision or [group["params"] for group in optimizer.param_groups]
    values = {
        id(parameter): (group["lr"], group.get("eps"), group["weight_decay"])
        for parameters, group in zip(of_group, optimizer.param_groups, strict=True)
        for parameter in parameters
    }
    return {name: values[id(parameter)] for name, parameter in named}
