"""Mistakes of several rules at once: a wrong plan."""

import math
from collections.abc import Callable
from dataclasses import replace

from mup_megatron.check.entries import (
    is_hidden,
)
from mup_megatron.check.mutants.conditions import has_own_rates, has_several_ratios
from mup_megatron.check.mutants.mutant import Context, Mutant, PlanChange, Select
from mup_megatron.theory import Plan, PlanEntry

Ratio = Callable[[PlanEntry, Context], float]


def as_if_wider(select: Select, ratio: Ratio) -> PlanChange:
    """Returns a plan in which the fan_in of some weights is so many times as large relative to the base's."""

    def changed(entry: PlanEntry, context: Context) -> PlanEntry:
        if not select(entry):
            return entry
        r = ratio(entry, context)
        assert entry.init_std is not None
        return replace(
            entry,
            init_std=entry.init_std / math.sqrt(r),
            lr=entry.lr / r,
            min_lr=entry.min_lr / r,
            weight_decay=entry.weight_decay * r**context.recipe.parametrization.weight_decay_exponent,
        )

    return lambda plan, context: replace(plan, entries=tuple(changed(entry, context) for entry in plan.entries))


def ratio_of_hidden_size(entry: PlanEntry, context: Context) -> float:
    """Returns how much more the hidden size grows than a weight's own fan_in."""
    return context.r / context.ratios[entry.name].r_in


def _one_ratio(plan: Plan, context: Context) -> Plan:
    def changed(entry: PlanEntry) -> PlanEntry:
        if not is_hidden(entry):
            return entry
        own, r = context.ratios[entry.name], context.r
        exponent = context.recipe.parametrization.weight_decay_exponent
        assert entry.init_std is not None
        return replace(
            entry,
            init_std=entry.init_std * math.sqrt(own.r_in / r),
            lr=entry.lr * own.r_in / r,
            min_lr=entry.min_lr * own.r_in / r,
            eps=None if entry.eps is None else entry.eps * own.r_out / r,
            weight_decay=entry.weight_decay * (r / own.r_in) ** exponent,
        )

    return replace(plan, entries=tuple(changed(entry) for entry in plan.entries))


def _standard(_plan: Plan, context: Context) -> Plan:
    own = context.recipe.parametrization.model_copy(update={"rule": "standard"})
    wrong = context.recipe.model_copy(update={"parametrization": own})
    return wrong.plan(context.target)


def _without_overrides(_plan: Plan, context: Context) -> Plan:
    return context.recipe.model_copy(update={"per_parameter": ()}).plan(context.target)


RULES = (
    Mutant(
        name="standard-parametrization",
        what="The base's values are used at every width.",
        cause=("standard-parametrization",),
        plan=_standard,
    ),
    Mutant(
        name="one-width-ratio",
        what="The ratio of hidden sizes is used for every tensor, whatever its own sides.",
        # Where key/value groups alone grow otherwise, these two are one and the same.
        cause=("one-width-ratio", "eps-by-fan-in"),
        plan=_one_ratio,
        when=has_several_ratios,
    ),
    Mutant(
        name="overrides-dropped",
        what="The recipe's per_parameter is ignored.",
        cause=("overrides-dropped",),
        plan=_without_overrides,
        when=has_own_rates,
    ),
)
