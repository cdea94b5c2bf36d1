"""Mistakes about what is narrow inside of a model: latents, and every side that keeps its size."""

import math
from dataclasses import replace

from mup_megatron.check.entries import is_hidden, is_residual
from mup_megatron.check.mutants.conditions import any_where
from mup_megatron.check.mutants.mutant import Context, Mutant
from mup_megatron.check.mutants.rules import as_if_wider, ratio_of_hidden_size
from mup_megatron.theory import Plan, PlanEntry


def _reads_inside(entry: PlanEntry) -> bool:
    return is_hidden(entry) and not is_residual(entry)


def _is_narrowing(entry: PlanEntry, context: Context) -> bool:
    own = context.ratios[entry.name]
    return is_hidden(entry) and own.r_out == 1.0 != own.r_in


def _drawn_as_outputs(plan: Plan, context: Context) -> Plan:
    def changed(entry: PlanEntry) -> PlanEntry:
        if not _is_narrowing(entry, context):
            return entry
        assert entry.init_std is not None
        return replace(entry, init_std=entry.init_std / math.sqrt(context.ratios[entry.name].r_in))

    return replace(plan, entries=tuple(map(changed, plan.entries)))


LATENT = (
    Mutant(
        name="latent-by-width",
        what="Projections up from a latent are scaled as if its rank grew with the hidden size.",
        cause=("latent-by-width",),
        plan=as_if_wider(_reads_inside, ratio_of_hidden_size),
        when=any_where(_reads_inside, lambda e, c: ratio_of_hidden_size(e, c) != 1.0),
    ),
    Mutant(
        name="bottleneck-as-output",
        what="What leads to a side of a fixed size inside of the model is drawn as an output is: σ/r_in.",
        cause=("bottleneck-init",),
        plan=_drawn_as_outputs,
        when=any_where(is_hidden, _is_narrowing),
    ),
)
