"""Mistakes in learning rates and their schedule."""

import math
from collections.abc import Sequence
from typing import Any

from mup_megatron.check.entries import (
    is_any,
    is_bias,
    is_convolution,
    is_embedding,
    is_gain,
    is_hidden,
    is_readout,
)
from mup_megatron.check.mutants.conditions import (
    has_biases,
    has_convolutions,
    has_fused_queries,
    is_untied,
    sides_differ,
)
from mup_megatron.check.mutants.live import changed_groups, is_in_last_layer, single_groups
from mup_megatron.check.mutants.mutant import Context, Factor, Mutant, OptimizerChange, Select
from mup_megatron.theory import Plan, PlanEntry
from mup_megatron.theory.widths import Scaling


def _rates(select: Select, factor: Factor) -> OptimizerChange:
    """Multiplies learning rates, the floor's too."""

    def change(group: dict[str, Any], entry: PlanEntry, r: Scaling, context: Context) -> None:
        f = factor(entry, r, context)
        group["max_lr"], group["min_lr"] = entry.lr * f, entry.min_lr * f

    return changed_groups(select, change)


def _floor(group: dict[str, Any], entry: PlanEntry, _: Scaling, context: Context) -> None:
    group["max_lr"], group["min_lr"] = entry.lr, context.recipe.moved.min_lr


def _forgotten_layer(optimizer: Any, chunks: Sequence[Any], plan: Plan, context: Context) -> None:
    of_layer = _rates(lambda e: is_hidden(e) and is_in_last_layer(plan, e), lambda _e, r, _c: r.r_in)
    of_layer(optimizer, chunks, plan, context)


def _own_ratio(optimizer: Any, chunks: Sequence[Any], plan: Plan, context: Context) -> None:
    fused = _rates(lambda e: e.name in context.fused, lambda e, _r, c: c.target.hidden_size / e.shape[0])
    fused(optimizer, chunks, plan, context)


def _lost_tensor(optimizer: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
    from mup_megatron.megatron.optimizer import parts_of

    first = next(entry.name for entry in plan.entries if is_hidden(entry))
    lost = [g for e, g in single_groups(optimizer, chunks, plan) if e.name == first]
    for part in parts_of(optimizer):
        part.optimizer.param_groups[:] = [g for g in part.optimizer.param_groups if not any(g is x for x in lost)]


def _unscaled_start(scheduler: Any, _optimizer: Any, _plan: Plan, context: Context) -> None:
    scheduler.init_lr = 0.1 * context.recipe.moved.lr


def _collapsing(scheduler: Any, optimizer: Any, _plan: Plan, context: Context) -> None:
    """All groups get one learning rate after ten steps."""
    from mup_megatron.megatron.optimizer import parts_of

    step, taken = scheduler.step, [0]
    lr = context.recipe.moved.lr

    def stepped(increment: int) -> None:
        step(increment=increment)
        taken[0] += increment
        if taken[0] >= 10:
            for group in (group for part in parts_of(optimizer) for group in part.optimizer.param_groups):
                group["lr"] *= lr / group["max_lr"]

    scheduler.step = stepped


RATES = (
    Mutant(
        name="learning-rate-collapsed",
        what="All groups have one learning rate, the base's.",
        cause=("learning-rate-collapsed", "hidden-learning-rate"),
        optimizer=_rates(is_any, lambda e, _r, c: c.recipe.moved.lr / e.lr),
    ),
    Mutant(
        name="learning-rate-all-divided",
        what="All groups have the hidden weights' learning rate, η/r.",
        cause=("learning-rate-all-divided",),
        optimizer=_rates(lambda e: not is_hidden(e), lambda _e, _r, c: 1 / c.r),
    ),
    Mutant(
        name="embedding-learning-rate",
        what="The learning rate of the embeddings is divided by r.",
        cause=("embedding-learning-rate",),
        optimizer=_rates(is_embedding, lambda _e, _r, c: 1 / c.r),
    ),
    Mutant(
        name="readout-learning-rate",
        what="The learning rate of the readout is divided by r.",
        cause=("readout-learning-rate",),
        optimizer=_rates(is_readout, lambda _e, _r, c: 1 / c.r),
        when=is_untied,
    ),
    Mutant(
        name="gain-learning-rate",
        what="The learning rate of norm gains is divided by r.",
        cause=("gain-learning-rate",),
        optimizer=_rates(is_gain, lambda _e, _r, c: 1 / c.r),
    ),
    Mutant(
        name="bias-learning-rate",
        what="The learning rate of biases is divided by r.",
        cause=("bias-learning-rate",),
        optimizer=_rates(is_bias, lambda _e, _r, c: 1 / c.r),
        when=has_biases,
    ),
    Mutant(
        name="convolution-as-matrix",
        what="The learning rate of convolutions, which sum over their kernel alone, is divided by r.",
        cause=("convolution-learning-rate",),
        optimizer=_rates(is_convolution, lambda _e, _r, c: 1 / c.r),
        when=has_convolutions,
    ),
    Mutant(
        name="hidden-learning-rate-root",
        what="The learning rate of hidden weights is divided by √r instead of r.",
        cause=("hidden-learning-rate",),
        optimizer=_rates(is_hidden, lambda _e, r, _c: math.sqrt(r.r_in)),
    ),
    Mutant(
        name="hidden-learning-rate-squared",
        what="The learning rate of hidden weights is divided by r twice, by the plan and by a wrapper.",
        cause=("hidden-learning-rate", "matrix-rates-as-adams"),
        optimizer=_rates(is_hidden, lambda _e, r, _c: 1 / r.r_in),
    ),
    Mutant(
        name="learning-rate-by-fan-out",
        what="The learning rate of hidden weights is divided by the ratio of fan_out instead of fan_in.",
        cause=("learning-rate-by-fan-out",),
        optimizer=_rates(is_hidden, lambda _e, r, _c: r.r_in / r.r_out),
        when=sides_differ,
    ),
    Mutant(
        name="one-layer-forgotten",
        what="The learning rate of the last layer is not divided by r.",
        cause=("one-layer-learning-rate",),
        optimizer=_forgotten_layer,
        when=lambda c: c.target.num_layers > 1,
    ),
    Mutant(
        name="qkv-own-ratio",
        what="The learning rate of queries, keys and values in one matrix is divided by its rows over the hidden size.",
        cause=("tensor-learning-rate",),
        optimizer=_own_ratio,
        when=has_fused_queries,
    ),
    Mutant(
        name="tensor-not-trained",
        what="The optimizer lacks the first hidden weight.",
        cause=("not-trained",),
        optimizer=_lost_tensor,
    ),
    Mutant(
        name="warm-up-start",
        what="The warm-up starts at one learning rate for all groups instead of 0.",
        cause=("warm-up-start",),
        scheduler=_unscaled_start,
    ),
    Mutant(
        name="rates-collapse-later",
        what="After ten steps all groups have one learning rate, the base's.",
        cause=("learning-rate-collapsed", "learning-rate-schedule", "later-steps"),
        scheduler=_collapsing,
        trains_alike=True,
    ),
    Mutant(
        name="floor-unscaled",
        what="All groups decay to the base's min_lr.",
        cause=("learning-rate-floor",),
        optimizer=changed_groups(is_hidden, _floor),
    ),
)
