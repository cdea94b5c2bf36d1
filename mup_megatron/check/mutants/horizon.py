"""Mistakes in how values were moved from the tuning's batch and tokens to the target's."""

from collections.abc import Callable
from typing import Any

from mup_megatron.check.entries import is_any
from mup_megatron.check.mutants.live import changed_groups
from mup_megatron.check.mutants.mutant import Context, Mutant, OptimizerChange
from mup_megatron.theory import Factors, PlanEntry
from mup_megatron.theory.widths import Scaling


def _values(factors: Callable[[Context], Factors]) -> OptimizerChange:
    """Multiplies what all groups have. Betas are the optimizer's own and stay: with others, "optimizer-differs"."""

    def change(group: dict[str, Any], entry: PlanEntry, _: Scaling, context: Context) -> None:
        f = factors(context)
        group["max_lr"], group["min_lr"] = entry.lr * f.lr, entry.min_lr * f.lr
        group["wd_mult"] = group.get("wd_mult", 1.0) * f.weight_decay
        if entry.eps is not None:
            group["eps"] = entry.eps * f.eps

    return changed_groups(is_any, change)


def _but_for_decay(context: Context) -> Factors:
    return Factors(lr=1 / context.recipe.factors.lr, eps=1 / context.recipe.factors.eps)


HORIZON = (
    Mutant(
        name="horizon-twice",
        what="Rates, eps and weight decay that the recipe's horizon has moved are moved by its rule once more.",
        cause=("horizon-twice",),
        optimizer=_values(lambda c: c.recipe.factors),
        when=lambda c: c.recipe.factors != Factors(),
    ),
    Mutant(
        name="horizon-decay-only",
        what="Of rates, eps and weight decay, which the recipe's horizon moves, the weight decay alone is moved.",
        cause=("horizon-decay-only",),
        optimizer=_values(_but_for_decay),
        when=lambda c: c.recipe.factors.weight_decay != 1.0 and _but_for_decay(c) != Factors(),
    ),
)
