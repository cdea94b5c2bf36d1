"""The live optimizer and scheduler against the plan: what every parameter's group holds now, and why if it is wrong.

Reads, changes nothing. Judges values, not how they came about.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mup_megatron.collectives import gathered
from mup_megatron.live.compare import close, group_problems, value_problems
from mup_megatron.live.problems import Problem, number
from mup_megatron.megatron.optimizer import LiveGroupValues, is_sharded, parameters_with_groups, parts_of
from mup_megatron.theory import Plan, PlanEntry


def optimizer_problems(
    chunks: Sequence[torch.nn.Module], plan: Plan, optimizer: Any, scheduler: Any = None
) -> list[Problem]:
    """Returns where what the optimizer does with this rank's parameters is not the plan.

    Collective over the data-parallel groups, because the distributed optimizer gives each rank another share of the
    parameters.

    Args:
        chunks: as the optimizer was built for.
        plan: for the whole model; it has every parameter of `chunks`.
        optimizer: Megatron's, chained or not.
        scheduler: what sets learning rate and weight decay during training. Without one, these two are not looked
            at: until a scheduler's first step every group has torch's defaults.
    """
    held = parameters_with_groups(optimizer, chunks, tied=plan.tied)
    found = _trained_problems(held, optimizer, plan)
    owned = [_Held(plan[name], LiveGroupValues.of(groups[0]), groups[0]) for name, _, groups in held if groups]
    found += _kind_problems(owned, plan)
    found += _limit_problems(owned, plan, optimizer, scheduler)
    found += _momentum_problems(owned)
    if scheduler is not None:
        found += _rate_problems(owned, plan, scheduler)
    found += _decay_problems(owned, plan, scheduler)
    return found


@dataclass(frozen=True, slots=True)
class _Held:
    """A parameter that this rank's optimizer updates."""

    entry: PlanEntry
    live: LiveGroupValues
    group: dict[str, Any]


# ---- in exactly one group ------------------------------------------------------------------------------------------


def _trained_problems(
    held: list[tuple[str, torch.nn.Parameter, list[dict[str, Any]]]], optimizer: Any, plan: Plan
) -> list[Problem]:
    found = []
    mine = {name for name, _, groups in held if groups}
    anywhere = mine
    if any(is_sharded(part) for part in parts_of(optimizer)):
        groups = [parallel_state.get_data_parallel_group(with_context_parallel=True)]
        if any(entry.is_expert for entry in plan.entries):  # which other ranks have alike
            groups.append(parallel_state.get_expert_data_parallel_group())
        together = [set().union(*gathered(mine, group)) for group in groups]
        anywhere = {name for index, names in enumerate(together) for name in names if plan[name].is_expert == index}
    for name, parameter, groups in held:
        if not parameter.requires_grad:
            cause = "It is frozen (requires_grad is False). Unfreeze it: the recipe was tuned training everything."
            found.append(Problem(name, "training", "on", "off", cause))
        elif groups or name not in anywhere:  # else another rank has it
            found += group_problems({name: len(groups)}, _AFTER)
    return found


_AFTER = "Build the optimizer after the last change to the model, and do not take parameters out of its groups."


# ---- what a group holds --------------------------------------------------------------------------------------------

_REBUILD = (
    "Build the optimizer with the plan's config_overrides; after loading another run's checkpoint, start the optimizer "
    "anew (--no-load-optim)."
)


def _kind_problems(owned: list[_Held], plan: Plan) -> list[Problem]:
    """Yields where another of the plan's optimizers has a parameter than the one whose rules gave it its values."""
    cause = f"Its values have wrong effects there. {_REBUILD}"
    return [
        Problem(item.entry.name, "optimizer", item.entry.optimizer, live, cause)
        for item in owned
        if (live := item.live.optimizer or plan.optimizer) != item.entry.optimizer
    ]


@dataclass(frozen=True, slots=True)
class _Circumstances:
    """Knows this rank's groups as a whole, and tells why one of them is wrong."""

    decoupled: set[float]
    overridden: bool
    flat: bool
    """Whether all groups have one peak, and should not."""
    owners: dict[float, str]
    """Peak → a parameter that should have it."""


def _limit_problems(owned: list[_Held], plan: Plan, optimizer: Any, scheduler: Any) -> list[Problem]:
    """Peak, floor and eps."""
    known = _Circumstances(
        decoupled={part.config.decoupled_lr for part in parts_of(optimizer)} - {None},
        overridden=getattr(scheduler, "override_opt_param_scheduler", False),
        flat=_flat([(item.live.max_lr, item.entry.lr) for item in owned]),
        owners={entry.lr: entry.name for entry in reversed(plan.entries)},
    )
    return [problem for item in owned for problem in _limit_problems_of(item, plan, known)]


def _limit_problems_of(item: _Held, plan: Plan, known: _Circumstances) -> Iterator[Problem]:
    entry, live = item.entry, item.live
    peak_cause = None if close(live.max_lr, entry.lr) else _peak_cause(live.max_lr, plan, known)

    def cause(quantity: str, value: float | None) -> str:
        if quantity == "eps":
            return _eps_cause(value, plan)
        return _limit_cause(value, plan.min_lr, known) if peak_cause is None else peak_cause

    planned = {"max_lr": entry.lr, "min_lr": entry.min_lr, "eps": entry.eps}
    values = {"max_lr": live.max_lr, "min_lr": live.min_lr, "eps": live.eps}
    return value_problems(entry.name, planned, values, cause)


def _eps_cause(value: float | None, plan: Plan) -> str:
    if close(value, plan.adam_eps):
        return f"eps is the base's, not scaled as the gradient is. {_REBUILD}"
    return "Another eps reached this group: a callback, or a loaded checkpoint that mixed up the groups."


def _peak_cause(value: float | None, plan: Plan, known: _Circumstances) -> str:
    if value in known.decoupled:
        return "decoupled_lr is set: drop --decoupled-lr and use per_parameter in the recipe."
    if known.flat and value is not None and not known.overridden:
        return f"All groups have one learning rate, so the plan's are lost. {_REBUILD}"
    owner = next((name for lr, name in known.owners.items() if close(value, lr)), None)
    if owner is not None and not close(value, plan.lr):
        return (
            f"That is what {owner} should have: a loaded checkpoint mixed up the groups. Load it with the plug-in on, "
            "which restores them by name, or start the optimizer anew (--no-load-optim)."
        )
    return _limit_cause(value, plan.lr, known)


def _limit_cause(value: float | None, base: float, known: _Circumstances) -> str:
    if value is None:
        return f"Its group has none of its own, so the scheduler takes the base's. {_REBUILD}"
    if close(value, base):
        if known.overridden:
            return (
                f"That is the base's value: this group's own is lost. {_REBUILD} If a checkpoint was loaded, "
                "--override-opt-param-scheduler may have written over it: drop that."
            )
        return f"That is the base's value: this group's own is lost. {_REBUILD}"
    return "Something changed this group after it was built: a callback, or a loaded checkpoint of another recipe."


def _flat(pairs: list[tuple[float | None, float]]) -> bool:
    """Returns whether values that should differ are all one; pairs of (found, expected)."""
    found = {value for value, _ in pairs}
    return len(found) == 1 and len({expected for _, expected in pairs}) > 1


def _momentum_problems(owned: list[_Held]) -> list[Problem]:
    """Betas and momentum are one for all parameters of an optimizer. `require_base_values` holds them to the plan."""
    found = []
    for key in ("betas", "momentum"):
        for name in dict.fromkeys(item.entry.optimizer for item in owned):
            own = [item for item in owned if item.entry.optimizer == name]
            values = [tuple(value) if isinstance(value := item.group.get(key), list) else value for item in own]
            usual = Counter(values).most_common(1)[0][0]
            cause = "The rules hold for one choice of it in all groups. Leave it to the recipe."
            found += [
                Problem(item.entry.name, key, str(usual), str(value), cause)
                for item, value in zip(own, values, strict=True)
                if value != usual
            ]
    return found


# ---- what the scheduler makes of it --------------------------------------------------------------------------------


def _rate_problems(owned: list[_Held], plan: Plan, scheduler: Any) -> list[Problem]:
    """Each parameter's learning rate is to the base's at this step as in the plan.

    Only where the group's own peak and floor are right: else the reason has been told.
    """
    if isinstance(scheduler, OptimizerParamScheduler) and scheduler.init_lr != 0.0:
        return []  # told by `schedule_problems`
    judged = [i for i in owned if close(i.live.max_lr, i.entry.lr) and close(i.live.min_lr, i.entry.min_lr)]
    base = _base_rate(judged, plan, scheduler)
    flat = _flat([(item.live.lr, item.entry.lr) for item in judged])
    cause = (
        "The scheduler gives all groups one learning rate. Use Megatron's OptimizerParamScheduler, or let yours go by "
        "each group's max_lr and min_lr."
        if flat
        else "It is not what the schedule makes of this group's max_lr and min_lr: something else sets it. Leave it to "
        "the scheduler."
    )
    return [
        problem
        for item in judged
        for problem in value_problems(
            item.entry.name, {"lr": base * (item.entry.lr / plan.lr)}, {"lr": item.live.lr}, cause
        )
    ]


def _base_rate(owned: list[_Held], plan: Plan, scheduler: Any) -> float:
    """Returns the learning rate of a parameter that has the base's, at this step."""
    if isinstance(scheduler, OptimizerParamScheduler):
        return float(scheduler.get_lr({"max_lr": plan.lr, "min_lr": plan.min_lr}))
    # Another scheduler is known only by what it did. Who has the base's rate tells it best.
    at_base = [item for item in owned if item.entry.lr == plan.lr] or owned
    return median([item.live.lr * (plan.lr / item.entry.lr) for item in at_base]) if at_base else 0.0


def _decay_problems(owned: list[_Held], plan: Plan, scheduler: Any) -> list[Problem]:
    base = plan.weight_decay
    if isinstance(scheduler, OptimizerParamScheduler):
        base = float(scheduler.get_wd())  # whether it is the recipe's: see `schedule_problems`
    found: list[Problem] = []
    for item in owned:
        ratio = item.entry.weight_decay / plan.weight_decay if plan.weight_decay else 0.0
        live = base * item.live.wd_mult if scheduler is None else item.live.weight_decay
        planned = {"weight decay": base * ratio}
        cause = _decay_cause(item.entry, live, base)
        found += value_problems(item.entry.name, planned, {"weight decay": live}, cause)
    return found


def _decay_cause(entry: PlanEntry, live: float, base: float) -> str:
    if entry.is_vector:
        return f"Biases and gains have none, and this group's wd_mult is lost. {_REBUILD}"
    if close(live, base):
        return f"That is the base's, not compensated for this group's learning rate. {_REBUILD}"
    return "Something changed this group's weight decay or wd_mult: a callback, or a loaded checkpoint."


# ---- the schedule itself -------------------------------------------------------------------------------------------


def schedule_problems(plan: Plan, scheduler: Any, optimizer: Any) -> list[Problem]:
    """Returns where Megatron's scheduler is not the plan's.

    Any other is judged by what it does to the groups: see `optimizer_problems`.
    """
    if not isinstance(scheduler, OptimizerParamScheduler):
        return []
    found = []
    if scheduler.init_lr != 0.0:
        cause = (
            "A warm-up that starts every group at one learning rate breaks the ratios between them, and wide layers "
            "may start above their peak: drop --lr-warmup-init."
        )
        found.append(Problem("schedule", "lr_warmup_init", "0", number(scheduler.init_lr), cause))
    cause = "Groups are scaled relative to the recipe's value: use that one, not your own or an old checkpoint's."
    planned = {"max_lr": plan.lr, "min_lr": plan.min_lr, "start_wd": plan.weight_decay, "end_wd": plan.weight_decay}
    live = {quantity: getattr(scheduler, quantity) for quantity in planned}
    found += value_problems("schedule", planned, live, cause)
    driven = {id(group) for group in scheduler.optimizer.param_groups}
    if any(id(group) not in driven for group in optimizer.param_groups):
        cause = (
            "It was made for another optimizer, so this one's learning rate would never change. Make it for this one."
        )
        found.append(Problem("schedule", "optimizer", "the run's", "another", cause))
    return found
