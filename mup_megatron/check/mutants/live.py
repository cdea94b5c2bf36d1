"""The tensors of a live run, as mistakes choose them."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from mup_megatron.check.measure.names import layer_of
from mup_megatron.check.mutants.mutant import Context, OptimizerChange, Select
from mup_megatron.theory import Plan, PlanEntry
from mup_megatron.theory.widths import Scaling


def is_in_last_layer(plan: Plan, entry: PlanEntry) -> bool:
    """Returns whether it is in the last layer of a plan."""
    return layer_of(entry.name) == plan.num_layers - 1


def live_parameters(chunks: Sequence[Any], plan: Plan) -> Iterable[tuple[PlanEntry, Any]]:
    """Returns each parameter of this rank with its entry."""
    from mup_megatron.megatron.names import named_parameters

    return [(plan[name], parameter) for name, parameter in named_parameters(chunks, tied=plan.tied)]


def live_modules(chunks: Sequence[Any], names: Collection[str]) -> list[Any]:
    """Returns the modules of this rank that have these global names."""
    from mup_megatron.megatron.names import named_modules, unwrapped

    return [module for chunk in chunks for name, module in named_modules(unwrapped(chunk)) if name in names]


def changed_groups(
    select: Select, change: Callable[[dict[str, Any], PlanEntry, Scaling, Context], None]
) -> OptimizerChange:
    """Makes a mistake that changes the optimizer's groups of single parameters."""

    def changed(optimizer: Any, chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, group in single_groups(optimizer, chunks, plan):
            if select(entry):
                change(group, entry, context.ratios[entry.name], context)

    return changed


def single_groups(optimizer: Any, chunks: Sequence[Any], plan: Plan) -> list[tuple[PlanEntry, dict[str, Any]]]:
    """Splits groups that several parameters share, so that one can be changed alone."""
    from mup_megatron.megatron.optimizer import parameters_with_groups, parts_of

    for part in parts_of(optimizer):
        groups = part.optimizer.param_groups
        groups[:] = [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]
    found = parameters_with_groups(optimizer, chunks, tied=plan.tied)
    return [(plan[name], groups[0]) for name, _, groups in found if groups]
