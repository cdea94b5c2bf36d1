"""One model trained under four parametrizations, side by side in one process: the arms of `lr_width.py`.

    standard    Megatron-Core in standard parametrization
    native      Megatron-Core's own μP, as Megatron-LM sets it up under `--use-mup`
    microsoft   microsoft/mup on the same model in plain torch
    ours        this package

All are trained on the same batches by the same schedule and clipping, those of Megatron in the same loop. Each draws
its initial weights with its own rule, but from the same numbers: where two rules agree, so do the weights. `native`
gets what its user can do for it: a softmax scale that follows the base's head size and an attention multiplier, for
which it has no flag, and a readout multiplier that is divided by the width ratio by hand, because one that is given
takes the ratio's place.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lr_width_table import tenths
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mup_megatron.architectures.bert import BERT
from mup_megatron.architectures.gpt import GPT
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import READOUT_WEIGHT
from mup_megatron.architectures.plain.decoder import PlainDecoder
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.errors import InputError
from mup_megatron.megatron.names import named_parameters
from mup_megatron.recipe import Recipe
from mup_megatron.theory.rules import softmax_scale
from mup_megatron.training import ranks
from mup_megatron.training.build import Built, build, configuration, drawn, schedule, trainable
from mup_megatron.training.data.dataset import build_datasets, global_batch
from mup_megatron.training.loop import train_iteration
from mup_megatron.training.metrics import TrainingRow, divergence
from mup_megatron.training.options import TrainingOptions, batch_sizes, require_possible


@dataclass(frozen=True)
class Task:
    """A run, whatever the arm: a model, the recipe of its base, and the run's length, batch and seed."""

    model: ModelFile
    recipe: Recipe
    """That of `ours`."""
    steps: int
    batch: int
    seed: int

    @property
    def options(self) -> TrainingOptions:
        """Returns the run's options."""
        return TrainingOptions(train_iters=self.steps, global_batch_size=self.batch, eval_iters=0, seed=self.seed)

    @property
    def standard(self) -> Recipe:
        """Returns the same recipe in standard parametrization."""
        changes = {"rule": "standard", "depth": None}
        return self.recipe.model_copy(
            update={"parametrization": self.recipe.parametrization.model_copy(update=changes)}
        )


@dataclass(frozen=True)
class Trainee:
    """A model that is ready to train."""

    weights: Mapping[str, torch.Tensor]
    """By the plan's names."""
    step: Callable[[int], tuple[float, float]]
    """Does an iteration, counted from 0, and returns its loss and gradient norm."""


class Refusal(Exception):
    """An arm cannot be had for a model; says why."""


def train_arms(arms: tuple[str, ...], task: Task, data: Path) -> dict[str, dict[str, Any]]:
    """Trains a model under each of the arms. Plain values come back, as they are kept in a file.

    Returns:
        For each arm its `curve`, the mean loss of each tenth of the run, None if it diverged; `start`, which says what
        its initial weights were; `batches`, which says what it was trained on; `seconds` of the processor. Or why it
        is `refused`.
    """
    ranks.enable_cpu()
    require_possible(task.model, task.recipe, task.options, 1)
    with ranks.met():
        dataset, _ = build_datasets(
            data,
            seq_length=task.model.seq_length,
            train_samples=task.steps * task.batch,
            valid_samples=0,
            seed=task.seed,
        )
        return {arm: _trained(arm, task, dataset) for arm in arms}


def _trained(arm: str, task: Task, dataset: Any) -> dict[str, Any]:
    began = time.process_time()
    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=task.seed):
        try:
            trainee = ARMS[arm](task, dataset)
        except (Refusal, InputError) as refusal:
            return {"refused": str(refusal)}
        start = _digest(trainee.weights)
        rows: list[TrainingRow] = []
        ends = [time.process_time()]
        diverged = None
        while diverged is None and len(rows) < task.steps:
            loss, norm = trainee.step(len(rows))
            rows.append(TrainingRow(len(rows) + 1, loss, 0.0, norm))
            diverged = divergence(rows)
            ends.append(time.process_time())
    return {
        "curve": tenths([row.loss for row in rows]) if diverged is None else None,
        "start": start,
        "batches": _digest({f"{i}": _tokens(task, dataset, i)["tokens"] for i in (0, task.steps - 1)}),
        "seconds": round(ends[-1] - began, 2),
        "seconds_a_step": round(median(b - a for a, b in itertools.pairwise(ends)), 5),
    }


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _tokens(task: Task, dataset: Any, iteration: int) -> dict[str, torch.Tensor]:
    [batch] = global_batch(dataset, iteration, global_batch_size=task.batch, micro_batch_size=task.batch)
    return batch


# ---- on Megatron-Core ----------------------------------------------------------------------------------------------


def _of_megatron(built: Built, task: Task, dataset: Any) -> Trainee:
    sizes = batch_sizes(task.options, 1)

    def step(iteration: int) -> tuple[float, float]:
        result = train_iteration(built, dataset, iteration, sizes, problem=False)
        built.scheduler.step(increment=1)
        return result.loss, result.grad_norm

    return Trainee(dict(named_parameters(built.chunks, tied=task.model.tied)), step)


def _standard(task: Task, dataset: Any) -> Trainee:
    plan = task.standard.plan(task.model)
    return _of_megatron(build(task.model, task.standard, plan, task.options, initialize=True), task, dataset)


def _ours(task: Task, dataset: Any) -> Trainee:
    plan = task.recipe.plan(task.model)
    return _of_megatron(build(task.model, task.recipe, plan, task.options, initialize=True), task, dataset)


def _native(task: Task, dataset: Any) -> Trainee:
    try:
        from megatron.core.optimizer import get_mup_config_overrides, get_standard_config_overrides
    except ImportError:
        raise Refusal("megatron-core has a μP of its own from 0.17 on") from None
    base, h, model, options = task.recipe.megatron_base, task.recipe.moved, task.model, task.options
    if architecture_of(model) is BERT:
        raise Refusal("Megatron's BertModel does not multiply its logits")
    if model.multi_latent_attention and h.attention_multiplier != 1.0:
        raise Refusal("Megatron's latent attention takes no softmax scale")
    try:
        config = configuration(
            model,
            task.standard,
            options,
            use_mup=True,
            mup_base_hidden_size=base.hidden_size,
            softmax_scale=softmax_scale(
                base_head_size=base.head_size, head_size=model.head_size, alpha=h.attention_multiplier
            ),
            mup_embedding_mult=h.embedding_multiplier,
        )
    except (AssertionError, ValueError) as error:
        raise Refusal(str(error)) from None
    # Set in the end: one that is given takes the place of 1/m, unless it happens to be 1.
    config.mup_output_mult = h.output_multiplier / config.mup_width_mult
    models = drawn(model, task.standard.plan(model), config, options, initialize=True)
    if model.num_experts is not None and config.use_cpu_initialization:
        _as_native_draws_readouts(models, config)

    def overrides(_chunks: object, settings: Any) -> dict[Any, Any]:
        own = get_mup_config_overrides(settings, config.mup_width_mult, settings.optimizer)
        return {**get_standard_config_overrides(settings), **own}

    return _of_megatron(trainable(model, models, config, task.standard, options, overrides), task, dataset)


def _as_native_draws_readouts(models: list[torch.nn.Module], config: Any) -> None:
    """Gives a readout that was drawn by name, as all of a model with experts, the std that native μP draws it with."""
    stds = [method.keywords["std"] for method in (config.embedding_init_method, config.init_method)]
    with torch.no_grad():
        for model in models:
            model.get_parameter(READOUT_WEIGHT).mul_(stds[0] / stds[1])


# ---- in plain torch ------------------------------------------------------------------------------------------------


def _microsoft(task: Task, dataset: Any) -> Trainee:
    try:
        import mup
    except ImportError:
        raise Refusal("mup is not installed: pip install --no-deps mup") from None
    model, h = task.model, task.recipe.moved
    if task.recipe.parametrization.optimizer != "adam":
        raise Refusal(f"it has no rule for {task.recipe.parametrization.optimizer}")
    if architecture_of(model) is not GPT:
        raise Refusal("its model here is a GPT")
    if model.num_experts is not None:
        raise Refusal("a router's outputs do not grow, and it is no MuReadout")
    start = _standard(task, dataset).weights
    device = "cpu" if ranks.backend() == "gloo" else "cuda"
    plain = _plain(task, model).to(device)
    # Names are compared, so its base has the model's depth.
    shapes = _plain(task, task.recipe.megatron_base.model_copy(update={"num_layers": model.num_layers}))
    try:
        mup.set_base_shapes(plain, shapes)
    except AssertionError as error:
        raise Refusal(f"{error}") from None
    _draw(plain, {name: weight.detach().to(device) for name, weight in start.items()}, task.seed)
    matrices = [p for p in plain.parameters() if p.dim() > 1]
    vectors = [p for p in plain.parameters() if p.dim() <= 1]
    optimizer = mup.MuAdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=h.lr,
        betas=(h.adam_beta1, h.adam_beta2),
        eps=h.adam_eps,
        weight_decay=h.weight_decay,
    )
    scheduler = _scheduled(optimizer, task)

    def step(iteration: int) -> tuple[float, float]:
        batch = {key: value.to(device) for key, value in _tokens(task, dataset, iteration).items()}
        optimizer.zero_grad()
        loss = plain.loss(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), h.clip_grad or float("inf"))
        optimizer.step()
        scheduler.step(increment=1)
        return loss.item(), norm.item()

    return Trainee(dict(plain.named_parameters()), step)


def _plain(task: Task, model: ModelFile) -> PlainDecoder:
    import mup

    base, h = task.recipe.megatron_base, task.recipe.moved

    def readout(_table: torch.nn.Parameter) -> torch.nn.Module:
        size = (model.hidden_size, model.padded_vocab_size())
        return mup.MuReadout(*size, bias=False, output_mult=h.output_multiplier)  # type: ignore[no-any-return]

    return PlainDecoder(
        model,
        embedding_multiplier=h.embedding_multiplier,
        # As mup's README has it: 1/d, with the constant that makes it 1/√d at the base's head size.
        softmax_scale=h.attention_multiplier * base.head_size**0.5 / model.head_size,
        make_readout=readout,
        dtype=torch.float32,
    )


def _draw(plain: torch.nn.Module, start: Mapping[str, torch.Tensor], seed: int) -> None:
    """Gives each matrix the standard draw, scaled as mup's own `normal_` scales one."""
    import mup

    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            scale = 1.0
            if parameter.dim() > 1:
                torch.manual_seed(seed)
                mup.init.normal_(parameter)
                torch.manual_seed(seed)
                scale = float(parameter.norm() / torch.empty_like(parameter).normal_().norm())
            parameter.copy_(start[name] * scale)


def _scheduled(optimizer: torch.optim.Optimizer, task: Task) -> OptimizerParamScheduler:
    """Returns Megatron's scheduler for groups that mup has made."""
    h = task.recipe.moved
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = group["lr"], group["lr"] * h.min_lr / h.lr
        group["wd_mult"] = group["weight_decay"] / h.weight_decay if h.weight_decay else 0.0
    return schedule(optimizer, task.recipe, task.options)


ARMS: dict[str, Callable[[Task, Any], Trainee]] = {
    "standard": _standard,
    "native": _native,
    "microsoft": _microsoft,
    "ours": _ours,
}
