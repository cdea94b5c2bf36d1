"""Mistakes in initial weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from mup_megatron.architectures.registry import depth_of
from mup_megatron.check.entries import (
    is_embedding,
    is_gain,
    is_hidden,
    is_linear_bias,
    is_readout,
    is_residual,
    is_vector,
)
from mup_megatron.check.mutants.conditions import (
    depth_differs,
    gains_start_at_1,
    has_depth_rule,
    has_fused_queries,
    has_linear_biases,
    has_one_branch,
    has_several_layers,
    is_tied,
    is_untied,
    sides_differ,
)
from mup_megatron.check.mutants.live import is_in_last_layer, live_parameters
from mup_megatron.check.mutants.mutant import Context, Factor, ModelChange, Mutant, Select
from mup_megatron.theory import Plan, family_of


def _weights(select: Select, factor: Factor) -> ModelChange:
    """Multiplies initial weights."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in live_parameters(chunks, plan):
            if select(entry):
                parameter.data.mul_(factor(entry, context.ratios[entry.name], context))

    return change


def _tied_table(factor: Factor) -> ModelChange:
    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        _weights(lambda entry: entry.name == plan.readout, factor)(chunks, plan, context)

    return change


def _one_tensor(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
    last = [entry for entry in plan.entries if is_in_last_layer(plan, entry) and not is_vector(entry)]
    # Experts are many modules, of which one is enough.
    of_branch = [entry for entry in last if entry.module in context.branches.values()] or last[-1:]
    _weights(lambda entry: entry in of_branch, lambda _e, _r, _c: 1.1)(chunks, plan, context)


def _drawn_biases(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
    for entry, parameter in live_parameters(chunks, plan):
        if is_linear_bias(entry):
            parameter.data.normal_(std=context.recipe.moved.init_method_std)


def _qkv_rows(heads: slice, factor: Callable[[Context], float]) -> ModelChange:
    """Multiplies some of the rows of the fused weight: of each group its queries, then its key, then its value."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in live_parameters(chunks, plan):
            if entry.name in context.fused:
                per_group = context.target.num_attention_heads // context.target.query_groups + 2
                rows = parameter.data.view(-1, per_group, context.target.head_size, parameter.shape[1])
                rows[:, heads].mul_(factor(context))

    return change


def _drawn_alike(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
    """Every layer starts as the first one that this rank holds."""
    first: dict[str, Any] = {}
    for entry, parameter in live_parameters(chunks, plan):
        if is_hidden(entry):
            parameter.data.copy_(first.setdefault(family_of(entry.name), parameter).data)


def _uniform(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
    for entry, parameter in live_parameters(chunks, plan):
        if is_hidden(entry) and entry.init_std:
            parameter.data.uniform_(-math.sqrt(3) * entry.init_std, math.sqrt(3) * entry.init_std)


def _off_centre(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
    for entry, parameter in live_parameters(chunks, plan):
        if is_residual(entry) and entry.init_std:
            parameter.data.mul_(math.sqrt(1 - 0.3**2)).add_(0.3 * entry.init_std)


def _counted_depth(context: Context) -> int:
    """Returns the residual branches in the 1/√(2L): under a rule of depth the base's."""
    return depth_of(context.base if has_depth_rule(context) else context.target)


INITIAL = (
    Mutant(
        name="init-unscaled",
        what="Hidden weights start with the base's std.",
        cause=("hidden-init",),
        model=_weights(is_hidden, lambda _e, r, _c: math.sqrt(r.r_in)),
    ),
    Mutant(
        name="init-linear",
        what="Hidden weights start with σ/r instead of σ/√r.",
        cause=("hidden-init",),
        model=_weights(is_hidden, lambda _e, r, _c: 1 / math.sqrt(r.r_in)),
    ),
    Mutant(
        name="init-by-shard",
        what="The std of row-parallel weights follows one tensor-parallel rank's share of fan_in, of two.",
        cause=("init-by-shard", "residual-init"),
        model=_weights(is_residual, lambda _e, _r, _c: math.sqrt(2)),
    ),
    Mutant(
        name="init-by-fan-out",
        what="The std of hidden weights follows fan_out instead of fan_in.",
        cause=("init-by-fan-out",),
        model=_weights(is_hidden, lambda _e, r, _c: math.sqrt(r.r_in / r.r_out)),
        when=sides_differ,
    ),
    Mutant(
        name="residual-init-depth",
        what="What writes into the residual stream starts with 1/√(2L) of the base's depth.",
        # The check sees √2 and cannot know where it comes from.
        cause=("residual-init", "init-by-shard"),
        model=_weights(is_residual, lambda _e, _r, c: math.sqrt(depth_of(c.target) / depth_of(c.base))),
        when=lambda context: depth_differs(context) and not has_depth_rule(context),
    ),
    Mutant(
        name="residual-init-as-gpt",
        what="What writes into the residual stream of a hybrid model has a GPT's 1/√(2L), L being all of its layers.",
        cause=("residual-init",),
        model=_weights(is_residual, lambda _e, _r, _c: 1 / math.sqrt(2)),
        when=has_one_branch,
    ),
    Mutant(
        name="residual-init-missing",
        what="What writes into the residual stream starts without 1/√(2L).",
        cause=("residual-init",),
        model=_weights(is_residual, lambda _e, _r, c: math.sqrt(_counted_depth(c))),
    ),
    Mutant(
        name="residual-init-twice",
        what="What writes into the residual stream starts with 1/√(2L) twice.",
        cause=("residual-init",),
        model=_weights(is_residual, lambda _e, _r, c: 1 / math.sqrt(_counted_depth(c))),
    ),
    Mutant(
        name="tied-init-linear",
        what="The tied table is drawn as a readout whose 1/r is in its weight: σ/r.",
        cause=("embedding-init",),
        model=_tied_table(lambda _e, _r, c: 1 / c.r),
        when=is_tied,
    ),
    Mutant(
        name="tied-init-root",
        what="The tied table is drawn as hidden weights are: σ/√r.",
        cause=("embedding-init",),
        model=_tied_table(lambda _e, _r, c: 1 / math.sqrt(c.r)),
        when=is_tied,
    ),
    Mutant(
        name="embedding-init",
        what="The embeddings are drawn as hidden weights are: σ/√r.",
        cause=("embedding-init",),
        model=_weights(is_embedding, lambda _e, _r, c: 1 / math.sqrt(c.r)),
        when=is_untied,
    ),
    Mutant(
        name="readout-init",
        what="The readout is drawn as hidden weights are: σ/√r.",
        cause=("readout-init",),
        model=_weights(is_readout, lambda _e, _r, c: 1 / math.sqrt(c.r)),
        when=is_untied,
    ),
    Mutant(
        name="readout-zeroed",
        what="The readout starts at 0, and the recipe does not say so.",
        cause=("zero-init",),
        model=_weights(is_readout, lambda _e, _r, _c: 0.0),
        when=is_untied,
    ),
    Mutant(
        name="queries-zeroed",
        what="Queries start at 0, and the recipe does not say so.",
        cause=("queries-zeroed",),
        model=_qkv_rows(slice(None, -2), lambda _: 0.0),
        when=has_fused_queries,
    ),
    Mutant(
        name="key-value-rows",
        what="The rows of keys and values are drawn as if their fan_in were larger: another 1/√r.",
        cause=("qkv-rows",),
        model=_qkv_rows(slice(-2, None), lambda c: 1 / math.sqrt(c.r)),
        when=has_fused_queries,
    ),
    Mutant(
        name="gains-scaled",
        what="Norm gains start at 1/√r instead of 1.",
        cause=("gain-init",),
        model=_weights(is_gain, lambda _e, _r, c: 1 / math.sqrt(c.r)),
        when=gains_start_at_1,
    ),
    Mutant(
        name="biases-drawn",
        what="Biases are drawn with σ instead of starting at 0.",
        cause=("bias-init",),
        model=_drawn_biases,
        when=has_linear_biases,
    ),
    Mutant(
        name="layers-drawn-alike",
        what="All layers start from the same draw.",
        cause=("draws-alike",),
        model=_drawn_alike,
        when=has_several_layers,
    ),
    Mutant(
        name="one-tensor-init",
        what="What is inside of the last branch starts with a std that is 10 % too large.",
        cause=("one-layer-init", "tensor-init"),
        model=_one_tensor,
    ),
    Mutant(
        name="draw-uniform",
        what="Hidden weights are drawn from a uniform distribution with the right std.",
        cause=("draw-shape",),
        model=_uniform,
    ),
    Mutant(
        name="draw-off-centre",
        what="What writes into the residual stream starts with a mean of 0.3 of its std.",
        cause=("draw-mean",),
        model=_off_centre,
    ),
)
