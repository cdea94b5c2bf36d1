"""Mistakes in what else an optimizer does: eps, betas, clipping, weight decay."""

from collections.abc import Sequence
from typing import Any

from mup_megatron.check.entries import (
    is_any,
    is_embedding,
    is_hidden,
    is_input_role,
    is_vector,
)
from mup_megatron.check.mutants.conditions import (
    has_clipping,
    has_second_beta,
    has_weight_decay,
    scales_eps,
    sides_differ,
    weight_decay_follows_rates,
)
from mup_megatron.check.mutants.live import changed_groups, live_parameters
from mup_megatron.check.mutants.mutant import Context, Factor, ModelChange, Mutant, OptimizerChange, Select
from mup_megatron.theory import Plan, PlanEntry
from mup_megatron.theory.widths import Scaling


def _eps(select: Select, factor: Factor) -> OptimizerChange:
    def change(group: dict[str, Any], entry: PlanEntry, r: Scaling, context: Context) -> None:
        if entry.eps is not None:
            group["eps"] = entry.eps * factor(entry, r, context)

    return changed_groups(select, change)


def _other_beta2(group: dict[str, Any], _entry: PlanEntry, _r: Scaling, context: Context) -> None:
    h = context.recipe.moved
    group["betas"] = (h.adam_beta1, 0.99 if h.adam_beta2 < 0.97 else 0.9)


def _clip(factor: float) -> OptimizerChange:
    def change(optimizer: Any, _chunks: Sequence[Any], _plan: Plan, _context: Context) -> None:
        from mup_megatron.megatron.optimizer import parts_of

        for part in {id(part.config): part for part in [optimizer, *parts_of(optimizer)]}.values():
            part.config.clip_grad *= factor

    return change


def _gradients_times(factor: float) -> ModelChange:
    def change(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for _, parameter in live_parameters(chunks, plan):
            parameter.register_hook(lambda gradient: factor * gradient)

    return change


def _decay(select: Select, wd_mult: Factor) -> OptimizerChange:
    def change(group: dict[str, Any], entry: PlanEntry, r: Scaling, context: Context) -> None:
        group["wd_mult"] = wd_mult(entry, r, context)

    return changed_groups(select, change)


OPTIMIZER = (
    Mutant(
        name="eps-unscaled",
        what="Adam's eps is the base's for all.",
        cause=("eps-not-scaled",),
        optimizer=_eps(is_any, lambda e, _r, c: c.recipe.moved.adam_eps / (e.eps or 1.0)),
        when=scales_eps,
    ),
    Mutant(
        name="eps-unscaled-for-inputs",
        what="Adam's eps is the base's for embeddings, gains and biases.",
        cause=("eps-not-scaled-for-inputs",),
        optimizer=_eps(is_input_role, lambda _e, r, _c: r.r_out),
        when=scales_eps,
    ),
    Mutant(
        name="eps-scaled-twice",
        what="Adam's eps is divided by the ratio of fan_out twice.",
        cause=("eps-scaled-twice",),
        optimizer=_eps(is_any, lambda e, _r, c: (e.eps or 1.0) / c.recipe.moved.adam_eps),
        when=scales_eps,
    ),
    Mutant(
        name="eps-by-fan-in",
        what="Adam's eps is divided by the ratio of fan_in instead of fan_out.",
        # Where key/value groups alone grow otherwise, these two are one and the same.
        cause=("eps-by-fan-in", "one-width-ratio"),
        optimizer=_eps(is_hidden, lambda _e, r, _c: r.r_out / r.r_in),
        when=lambda c: scales_eps(c) and sides_differ(c),
    ),
    Mutant(
        name="other-beta2",
        what="Adam's second beta is not the recipe's.",
        cause=("optimizer-differs",),
        optimizer=changed_groups(is_any, _other_beta2),
        when=has_second_beta,
    ),
    Mutant(
        name="clipping-lower",
        what="Gradients are clipped at a tenth of the recipe's clip_grad.",
        cause=("clipping",),
        optimizer=_clip(0.1),
        when=has_clipping,
    ),
    Mutant(
        name="clipping-dropped",
        what="Gradients are not clipped.",
        cause=("clipping",),
        optimizer=_clip(0.0),
        when=has_clipping,
    ),
    Mutant(
        name="gradients-summed",
        what="Gradients of four micro-batches are summed instead of averaged.",
        cause=("gradients-scaled",),
        model=_gradients_times(4.0),
        trains_alike=True,
    ),
    Mutant(
        name="weight-decay-uncompensated",
        what="The weight decay of hidden weights is the base's: not multiplied by r where the rate was divided by it.",
        cause=("weight-decay-not-compensated",),
        optimizer=_decay(is_hidden, lambda _e, _r, _c: 1.0),
        when=weight_decay_follows_rates,
    ),
    Mutant(
        name="weight-decay-on-vectors",
        what="Biases and gains have weight decay.",
        cause=("weight-decay-on-vectors",),
        optimizer=_decay(is_vector, lambda _e, _r, _c: 1.0),
        when=has_weight_decay,
    ),
    Mutant(
        name="embedding-weight-decay",
        what="The weight decay of the embeddings is multiplied by r.",
        cause=("embedding-weight-decay",),
        optimizer=_decay(is_embedding, lambda _e, _r, c: c.r),
        when=has_weight_decay,
    ),
    Mutant(
        name="weight-decay-off",
        what="There is no weight decay.",
        cause=("weight-decay-off",),
        optimizer=_decay(is_any, lambda _e, _r, _c: 0.0),
        when=has_weight_decay,
    ),
)
