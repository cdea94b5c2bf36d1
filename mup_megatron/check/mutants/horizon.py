"""Mistakes in how values were moved from the tuning's batch and tokens to the target's."""

from collections.abc import Callable
from typing import Any

from mup_megatron.check.entries import is_any
from mup_megatron.check.mutants.live import changed_groups
from mup_megatron.check.mutants.mutant import Context, Mutant, OptimizerChange
from mup_megatron.recipe import Hyperparameters
from mup_megatron.theory import Factors, PlanEntry
from mup_megatron.theory.widths import Scaling


def _values(factors: Callable[[Context], Factors], betas: Callable[[Context], Hyperparameters]) -> OptimizerChange:
    """Multiplies what all groups have, and gives them these betas."""

    def change(group: dict[str, Any], entry: PlanEntry, _: Scaling, context: Context) -> None:
        f, h = factors(context), betas(context)
        group["max_lr"], group["min_lr"] = entry.lr * f.lr, entry.min_lr * f.lr
        group["wd_mult"] = group.get("wd_mult", 1.0) * f.weight_decay
        if entry.eps is not None:
            group["eps"] = entry.eps * f.eps
        if "betas" in group:
            group["betas"] = (h.adam_beta1, h.adam_beta2)

    return changed_groups(is_any, change)


def _again(context: Context) -> Hyperparameters:
    h, forgetting = context.recipe.moved, context.recipe.factors.forgetting
    # Where a beta would fall below 0, whoever made the mistake would have been told.
    keys = ("adam_beta1", "adam_beta2")
    again = {key: max(0.0, 1.0 - (1.0 - getattr(h, key)) * forgetting) for key in keys}
    return h.model_copy(update=again)


def _but_for_decay(context: Context) -> Factors:
    f = context.recipe.factors
    return Factors(lr=1 / f.lr, eps=1 / f.eps, forgetting=1 / f.forgetting)


HORIZON = (
    Mutant(
        name="horizon-twice",
        what="The values that the recipe's horizon has moved are moved by its rule once more.",
        cause=("horizon-twice",),
        optimizer=_values(lambda c: c.recipe.factors, _again),
        when=lambda c: c.recipe.factors != Factors(),
    ),
    Mutant(
        name="horizon-decay-only",
        what="Of what the recipe's horizon moves, the weight decay alone is moved.",
        cause=("horizon-decay-only",),
        optimizer=_values(_but_for_decay, lambda c: c.recipe.hyperparameters),
        when=lambda c: c.recipe.factors.weight_decay != 1.0 and _but_for_decay(c) != Factors(),
    ),
)
