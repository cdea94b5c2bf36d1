"""Mistakes about depth, under a rule of it: a wrong plan."""

import math
from collections.abc import Callable
from dataclasses import replace

from mup_megatron.check.entries import is_residual, is_vector
from mup_megatron.check.mutants.conditions import has_depth_rule, moves_rates_with_depth, scales_eps
from mup_megatron.check.mutants.mutant import Context, Mutant, PlanChange
from mup_megatron.theory import BRANCH, Deepening, Plan, PlanEntry

Change = Callable[[PlanEntry, Deepening], PlanEntry]


def _in_blocks(change: Change) -> PlanChange:
    """Changes the entries that depth has a factor in."""

    def changed(entry: PlanEntry, plan: Plan) -> PlanEntry:
        return entry if entry.depth_ratio == 1.0 else change(entry, plan.deepened[entry.stack])

    return lambda plan, _: replace(plan, entries=tuple(changed(entry, plan) for entry in plan.entries))


def _without_multipliers(plan: Plan, _context: Context) -> Plan:
    return replace(plan, places=tuple(place for place in plan.places if place.carries != BRANCH))


def _counted_twice(entry: PlanEntry, stack: Deepening) -> PlanEntry:
    if not is_residual(entry) or entry.init_std is None:
        return entry
    return replace(entry, init_std=entry.init_std / math.sqrt(stack.ratio))


def _rates(select: Callable[[PlanEntry], bool]) -> Change:
    def change(entry: PlanEntry, stack: Deepening) -> PlanEntry:
        return replace(entry, lr=entry.lr / stack.lr, min_lr=entry.min_lr / stack.lr) if select(entry) else entry

    return change


def _eps(entry: PlanEntry, stack: Deepening) -> PlanEntry:
    return entry if entry.eps is None else replace(entry, eps=entry.eps / stack.eps)


DEPTH = (
    Mutant(
        name="branch-multiplier-lost",
        what="Residual branches are not multiplied, and all else follows the rule of depth.",
        cause=("branch-multiplier",),
        plan=_without_multipliers,
        when=has_depth_rule,
    ),
    Mutant(
        name="depth-twice-in-init",
        what="What writes into the residual stream starts with the target's 1/√(2L), beside the branches' multiplier.",
        cause=("depth-init",),
        plan=_in_blocks(_counted_twice),
        when=has_depth_rule,
    ),
    Mutant(
        name="depth-rates-of-vectors",
        what="The learning rates of norms and biases in blocks do not follow depth.",
        cause=("depth-rates-of-vectors",),
        plan=_in_blocks(_rates(is_vector)),
        when=moves_rates_with_depth,
    ),
    Mutant(
        name="depth-rates",
        what="No learning rate in blocks follows depth.",
        cause=("depth-rates",),
        plan=_in_blocks(_rates(lambda _: True)),
        when=moves_rates_with_depth,
    ),
    Mutant(
        name="depth-eps",
        what="No eps in blocks follows depth.",
        cause=("depth-eps",),
        plan=_in_blocks(_eps),
        when=lambda context: has_depth_rule(context) and scales_eps(context),
    ),
)
