"""Mistakes about experts and what chooses them: a wrong plan."""

from dataclasses import replace

from mup_megatron.check.entries import is_of_experts, is_residual, is_router
from mup_megatron.check.mutants.conditions import any_where
from mup_megatron.check.mutants.mutant import Context, Mutant
from mup_megatron.check.mutants.rules import as_if_wider, ratio_of_hidden_size
from mup_megatron.theory import Plan, PlanEntry


def _writes_from_experts(entry: PlanEntry) -> bool:
    return is_of_experts(entry) and is_residual(entry)


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


EXPERTS = (
    Mutant(
        name="experts-by-width",
        what="fc2 of experts is scaled as if their ffn grew with the hidden size.",
        cause=("experts-by-width",),
        plan=as_if_wider(_writes_from_experts, ratio_of_hidden_size),
        when=any_where(_writes_from_experts, lambda e, c: ratio_of_hidden_size(e, c) != 1.0),
    ),
    Mutant(
        name="experts-by-total",
        what="fc2 of experts is scaled by the ffn of all experts together.",
        cause=("experts-by-total",),
        plan=as_if_wider(_writes_from_experts, _number),
        when=any_where(_writes_from_experts, lambda e, c: _number(e, c) != 1.0),
    ),
    Mutant(
        name="router-hidden",
        what="The router is taken for a hidden weight.",
        cause=("router-hidden",),
        plan=_hidden_router,
        when=any_where(is_router, lambda _e, c: c.recipe.parametrization.router == "output" and c.r != 1.0),
    ),
    Mutant(
        name="experts-eps",
        what="The eps of experts does not follow their share of the tokens.",
        cause=("experts-eps",),
        plan=_eps_of_all_tokens,
        when=any_where(is_of_experts, lambda e, c: e.eps is not None and c.ratios[e.name].share.ratio != 1.0),
    ),
)
