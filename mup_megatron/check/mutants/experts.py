"""Mistakes about experts and what chooses them: a wrong plan."""

import math
from collections.abc import Callable
from dataclasses import replace

from mup_megatron.check.entries import is_of_experts, is_residual, is_router
from mup_megatron.check.mutants.mutant import Context, Mutant, PlanChange
from mup_megatron.theory import Plan, PlanEntry

Ratio = Callable[[PlanEntry, Context], float]


def _as_if_wider(ratio: Ratio) -> PlanChange:
    """What experts write into the stream, as if their fan_in were so many times as large relative to the base's."""

    def changed(entry: PlanEntry, context: Context) -> PlanEntry:
        if not (is_of_experts(entry) and is_residual(entry)):
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


def _width(entry: PlanEntry, context: Context) -> float:
    return context.r / context.ratios[entry.name].r_in


def _number(_: PlanEntry, context: Context) -> float:
    assert context.base.num_experts is not None
    assert context.target.num_experts is not None
    return context.target.num_experts / context.base.num_experts


def _hidden_router(_plan: Plan, context: Context) -> Plan:
    own = context.recipe.parametrization.model_copy(update={"router": "hidden"})
    return context.recipe.model_copy(update={"parametrization": own}).plan(context.target)


def _eps_of_all_tokens(plan: Plan, context: Context) -> Plan:
    def changed(entry: PlanEntry) -> PlanEntry:
        share = context.ratios[entry.name].share.ratio
        return entry if entry.eps is None else replace(entry, eps=entry.eps / share)

    return replace(plan, entries=tuple(changed(entry) for entry in plan.entries))


def _any(select: Callable[[PlanEntry], bool], when: Callable[[PlanEntry, Context], bool]) -> Callable[[Context], bool]:
    def found(context: Context) -> bool:
        return any(select(e) and when(e, context) for e in context.recipe.plan(context.target).entries)

    return found


EXPERTS = (
    Mutant(
        name="experts-by-width",
        what="fc2 of experts is scaled as if their ffn grew with the hidden size.",
        cause=("experts-by-width",),
        plan=_as_if_wider(_width),
        when=_any(is_of_experts, lambda e, c: is_residual(e) and _width(e, c) != 1.0),
    ),
    Mutant(
        name="experts-by-total",
        what="fc2 of experts is scaled by the ffn of all experts together.",
        cause=("experts-by-total",),
        plan=_as_if_wider(_number),
        when=_any(is_of_experts, lambda e, c: _number(e, c) != 1.0),
    ),
    Mutant(
        name="router-hidden",
        what="The router is taken for a hidden weight.",
        cause=("router-hidden",),
        plan=_hidden_router,
        when=_any(is_router, lambda _e, c: c.recipe.parametrization.router == "output" and c.r != 1.0),
    ),
    Mutant(
        name="experts-eps",
        what="The eps of experts does not follow their share of the tokens.",
        cause=("experts-eps",),
        plan=_eps_of_all_tokens,
        when=_any(is_of_experts, lambda e, c: e.eps is not None and c.ratios[e.name].share.ratio != 1.0),
    ),
)
