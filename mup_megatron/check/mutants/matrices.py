"""Mistakes about optimizers that step matrices and leave the rest to another: their rates, and which steps what."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mup_megatron.check.entries import is_embedding, is_hidden, is_matrix, token_table
from mup_megatron.check.measure.optimizers import rules_of
from mup_megatron.check.mutants.live import single_groups
from mup_megatron.check.mutants.mutant import Context, Mutant, OptimizerChange, PlanChange, Select
from mup_megatron.theory import Plan, PlanEntry


def _at_base(select: Select) -> PlanChange:
    """Gives the base's rates and decay to those of the recipe's optimizer."""

    def changed(plan: Plan, _: Context) -> Plan:
        base: dict[str, Any] = {"lr": plan.lr, "min_lr": plan.min_lr, "weight_decay": plan.weight_decay}
        entries = [replace(e, **base) if _is_own(e, plan) and select(e) else e for e in plan.entries]
        return replace(plan, entries=tuple(entries))

    return changed


def _as_adams(plan: Plan, context: Context) -> Plan:
    def changed(entry: PlanEntry) -> PlanEntry:
        r = context.ratios[entry.name].r_in
        if not (_is_own(entry, plan) and is_hidden(entry)):
            return entry
        return replace(entry, lr=entry.lr / r, min_lr=entry.min_lr / r)

    return replace(plan, entries=tuple(changed(entry) for entry in plan.entries))


def _is_own(entry: PlanEntry, plan: Plan) -> bool:
    return entry.optimizer == plan.optimizer and is_matrix(entry)


def _is_plain(entry: PlanEntry) -> bool:
    return not is_embedding(entry)


def _changes(change: PlanChange) -> Any:
    """Makes a condition: whether the optimizer has a scale of its own, and a change of the plan changes anything."""

    def found(context: Context) -> bool:
        plan = context.recipe.plan(context.target)
        return plan.scale_mode is not None and change(plan, context) != plan

    return found


_KEPT = ("params", "max_lr", "min_lr", "wd_mult", "lr_mult")
"""What a group says that is no matter of whose it is."""


def _given_away(name: str, optimizer: Any, chunks: Sequence[Any], plan: Plan) -> None:
    """Lets another of the optimizers step a tensor, with the rates that it has."""
    from mup_megatron.megatron.optimizer import parts_of

    groups = single_groups(optimizer, chunks, plan)
    there = [group for entry, group in groups if entry.name == name]
    others = [group for entry, group in groups if entry.optimizer != plan[name].optimizer]
    if not (there and others):
        return
    [group], other = there, others[0]
    for part in parts_of(optimizer):
        of_part = part.optimizer.param_groups
        if any(each is other for each in of_part):
            of_part.append({**other, **{key: group[key] for key in _KEPT if key in group}})
        of_part[:] = [each for each in of_part if each is not group]


def _first_matrix(optimizer: Any, chunks: Sequence[Any], plan: Plan, _: Context) -> None:
    first = next(entry.name for entry in plan.entries if _is_own(entry, plan) and is_hidden(entry))
    _given_away(first, optimizer, chunks, plan)


def _token_table(optimizer: Any, chunks: Sequence[Any], plan: Plan, _: Context) -> None:
    name = token_table(plan)
    assert name is not None
    _given_away(name, optimizer, chunks, plan)


def _routing(name: str, what: str, change: OptimizerChange) -> Mutant:
    return Mutant(
        name=name,
        what=what,
        cause=("stepped-by-another",),
        optimizer=change,
        when=lambda context: bool(rules_of(context.recipe).others),
    )


MATRICES = (
    Mutant(
        name="matrix-rates-unscaled",
        what="Matrices have the base's learning rate and weight decay, whatever their updates' scale makes of width.",
        cause=("matrix-rates-unscaled",),
        plan=_at_base(_is_plain),
        when=_changes(_at_base(_is_plain)),
    ),
    Mutant(
        name="table-rates-unscaled",
        what="Tables of positions, stepped as matrices, have the base's learning rate and weight decay.",
        cause=("table-rates-unscaled",),
        plan=_at_base(is_embedding),
        when=_changes(_at_base(is_embedding)),
    ),
    Mutant(
        name="matrix-rates-as-adams",
        what="The learning rate of matrices is divided by r besides, as Adam's would be.",
        cause=("matrix-rates-as-adams",),
        plan=_as_adams,
        when=_changes(_as_adams),
    ),
    _routing("matrix-to-another", "The optimizer of the rest steps the first matrix.", _first_matrix),
    _routing("table-as-matrix", "The optimizer of matrices steps the table of tokens.", _token_table),
)
