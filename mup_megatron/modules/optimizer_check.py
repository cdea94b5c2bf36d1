"""Checks that an optimizer does what a plan's values are for. It is seen from what its step does, not from its name."""

import collections
import copy
import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.live.compare import value_problems
from mup_megatron.modules.applied import require_kept
from mup_megatron.modules.groups import FLAT, PADDING, Group, GroupValues, flattened, members, values
from mup_megatron.modules.names import named_parameters
from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS
from mup_megatron.modules.weights import full_shape, is_sharded, reshard
from mup_megatron.recipe import Hyperparameters
from mup_megatron.theory import Plan

_log = logging.getLogger(__name__)


def check_optimizer(optimizer: Any, plan: Plan, model: torch.nn.Module | None = None) -> None:
    """Raises InputError unless an optimizer is one that the plan's values are for, and has them.

    Its step is tried on a small tensor of its own, so that any AdamW is accepted; those of which kernels and wrappers
    are known go by their names.

    Args:
        optimizer: made of `param_groups(…)`; in Accelerate's, DeepSpeed's or ZeroRedundancyOptimizer's wrapper or not.
            A list of them, where several step tensors of the plan.
        plan: that of the model.
        model: the model, which tells frozen parameters from forgotten ones. Without it none may be frozen.

    Raises:
        InputError: another kind of optimizer, a group with other values than the plan's or with other betas or
            momentum than the recipe's, parameters that are missing or there twice, or a model of which something was
            replaced after the plan was applied; names them.
    """
    if model is not None:
        reshard(model)
        require_kept(model)
        _require_shapes(model, plan)
    parts = optimizer if isinstance(optimizer, list | tuple) else (optimizer,)
    groups: list[Group] = [group for part in parts for group in part.param_groups]
    for part in parts:
        _require_rule(_unwrapped(part), part.param_groups, _stepped_by(part, plan, model), plan)
    _require_one_of_each(groups)
    _require_values(groups, plan, model)
    for part in parts:
        _require_one_beta(part.param_groups)
    _require_one_schedule(groups)
    if not any(type(part).__module__.startswith("deepspeed") for part in parts):  # those hold flat buffers
        _require_all(groups, plan, model)


def _unwrapped(optimizer: Any) -> Any:
    """Returns the optimizer inside of Accelerate's, DeepSpeed's or ZeroRedundancyOptimizer's."""
    while True:
        held = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", None)
        if held is None:
            return optimizer
        optimizer = held


# ---- the rule ------------------------------------------------------------------------------------------------------


def _stepped_by(optimizer: Any, plan: Plan, model: torch.nn.Module | None) -> str:
    """Returns the one of the plan's optimizers that steps what a live one has."""
    if len(plan.optimizers) == 1:
        return plan.optimizers[0]
    held = dict.fromkeys(wanted.optimizer for _, wanted, _ in _compared(optimizer.param_groups, plan, model))
    if len(held) > 1:
        raise InputError(
            f"{type(optimizer).__name__}: it has parameters of {' and of '.join(held)}, and the plan steps them by one "
            "of each. Make an optimizer of the groups of each `optimizer`, and hand over the list of them."
        )
    return next(iter(held), plan.optimizer)


def _require_rule(optimizer: Any, groups: list[Group], wanted: str, plan: Plan) -> None:
    known = TORCH_OPTIMIZERS[wanted]
    scales, mode = known.of_scale, plan.scale_mode if wanted == plan.optimizer else None
    if mode not in scales:
        first = next(filter(None, scales))
        raise InputError(
            f"muon_scale_mode: the plan's is {mode}, which torch's optimizer for {wanted} has not. Tune with {first}, "
            "and let the recipe say so."
        )
    torchs_own = plan.optimizer_values and isinstance(optimizer, known.kind)
    if torchs_own and (impossible := known.problem(_hyperparameters(plan))) is not None:
        raise InputError(impossible)
    cause = _wrong(optimizer, groups, wanted, _settings(wanted, plan), scales[mode])
    if cause is not None:
        raise InputError(
            f"{type(optimizer).__name__}: {cause}, and the plan is for {wanted}: its values would have wrong effects. "
            f"Use {known.fitting}."
        )


def _wrong(
    optimizer: Any, groups: list[Group], wanted: str, settings: Mapping[str, Any], scale: Mapping[str, Any]
) -> str | None:
    """Returns why an optimizer is not the wanted one; None where it is, or where that cannot be seen.

    Args:
        optimizer: without wrappers.
        groups: its groups.
        wanted: its name in a recipe.
        settings: the plan's betas, momentum and the like, for groups that do not say them.
        scale: what torch's says for the plan's scale of updates.
    """
    kind, known = type(optimizer), TORCH_OPTIMIZERS[wanted]
    names = {name for own in kind.__mro__ for name in (own.__name__,)}
    if names & set(known.kernels):
        decays = any(group.get("weight_decay") for group in groups)
        if getattr(optimizer, "adam_w_mode", True) in (False, 0) and decays:
            return "without adam_w_mode it puts weight decay into the gradient"
        return None
    if any(names & set(other.kernels) for other in TORCH_OPTIMIZERS.values()):
        return "it is another optimizer"
    if kind.__module__.startswith("bitsandbytes"):
        own = kind.__name__.removeprefix("Paged")
        return None if known.bitsandbytes and own.startswith(known.bitsandbytes) else "it is another optimizer"
    causes = (_wrong_step(optimizer, group, wanted, settings, scale) for group in _probed_groups(groups))
    return next(filter(None, causes), None)


def _wrong_step(
    optimizer: Any, group: Group, wanted: str, settings: Mapping[str, Any], scale: Mapping[str, Any]
) -> str | None:
    """Returns why an optimizer's steps with a group's settings are not those of the wanted one, as `_wrong`."""
    kind, known = type(optimizer), TORCH_OPTIMIZERS[wanted]
    try:
        clone = _clone(optimizer, group)
    except Exception as error:  # what an optimizer of somebody's holds may not be copied
        _log.warning("%s: it cannot be copied (%s), so whether it is %s was not checked.", kind.__name__, error, wanted)
        return None
    try:
        moved = _moved(clone)
    except Exception as error:  # an optimizer of somebody's may raise anything
        if kind.__module__.startswith(("torch.optim", "transformers")):
            return f"its step cannot use the plan's groups ({type(error).__name__})"
        _log.warning(
            "%s: its step does not run on a small tensor on the CPU (%s), so whether it is %s was not checked.",
            kind.__name__,
            type(error).__name__,
            wanted,
        )
        return None
    said, options = {**settings, **group}, {**known.options, **scale}
    if _alike(moved, _reference(known.kind, said, options), known.rounding):
        return None
    if known.coupled is not None and _alike(moved, _reference(known.coupled, said, {}), known.rounding):
        return "it puts weight decay into the gradient"
    if any(
        _alike(moved, _reference(known.kind, other, options), known.rounding) for other in _with_independent_decay(said)
    ):
        return "its weight decay is not multiplied by the learning rate (it is independent of that) as the plan's is"
    return f"its step is not {known.kind.__name__}'s"


def _with_independent_decay(group: Group) -> Iterator[Group]:
    """Groups whose weight decay, multiplied by the rate, is what this one's is without: the same at every rate, or
    following the schedule and not its peak.
    """
    if decay := group.get("weight_decay"):
        for rate in dict.fromkeys((group["lr"], group.get("initial_lr", group["lr"]))):
            yield group | {"weight_decay": decay / rate}


def _probed_groups(groups: list[Group]) -> list[Group]:
    """Returns a group for each of the settings that groups have, with values under which rules differ visibly."""
    found: dict[str, Group] = {}
    for own in groups:
        group = {key: value for key, value in own.items() if key != "params"}
        group["lr"] = 0.01
        if "weight_decay" in group:
            group["weight_decay"] = 0.1 if any(each.get("weight_decay") for each in groups) else 0.0
        if isinstance(group.get("eps"), float):
            group["eps"] = 1e-2
        group |= {key: False for key in ("fused", "foreach", "capturable", "differentiable") if key in group}
        settings = sorted((key, repr(value)) for key, value in group.items() if not key.endswith(("name", "_lr")))
        found.setdefault(repr(settings), group)
    return [*found.values()]


_REPLACED = ("param_groups", "state", "step", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
"""What a copy of an optimizer gets anew; a `step` among its attributes is a scheduler's."""


def _clone(optimizer: Any, group: Group) -> Any:
    """Returns an optimizer of the same class and settings that has no state, no hooks, and one small parameter."""
    clone = object.__new__(type(optimizer))
    # Copied, since a step may change whatever the optimizer holds: a count of its own, a list, a lock's owner.
    clone.__dict__.update(copy.deepcopy({key: value for key, value in vars(optimizer).items() if key not in _REPLACED}))
    clone.state = collections.defaultdict(dict)
    clone._optimizer_step_pre_hooks = collections.OrderedDict()
    clone._optimizer_step_post_hooks = collections.OrderedDict()
    clone.param_groups = [group | {"params": _tried()}]
    return clone


def _reference(kind: type[torch.optim.Optimizer], group: Mapping[str, Any], options: Mapping[str, Any]) -> torch.Tensor:
    """Returns where the steps of one of torch's optimizers lead, with what it knows of a group's settings."""
    known = inspect.signature(kind).parameters
    settings = {key: group[key] for key in _SETTINGS if key in group and key in known}
    return _moved(kind(_tried(), **{**settings, **options}))


_SETTINGS = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad", "momentum", "dampening", "nesterov"),
    *("ns_steps", "ns_coefficients"),
)


def _tried() -> list[torch.nn.Parameter]:
    """A wide matrix and a tall one: there are optimizers whose steps depend on that."""
    wide = torch.tensor([[0.5, -1.0, 2.0], [1.5, -0.25, 0.75]])
    return [torch.nn.Parameter(wide), torch.nn.Parameter(wide.T.clone())]


def _moved(optimizer: Any) -> torch.Tensor:
    """Returns where some steps of an optimizer lead that has `_tried`."""
    parameters = optimizer.param_groups[0]["params"]
    slope = torch.tensor([[0.02, -0.3, 0.01], [-0.05, 0.4, 0.1]])
    if getattr(optimizer, "defaults", {}).get("differentiable"):
        optimizer.defaults = optimizer.defaults | {"differentiable": False}  # read there, and not in the group
    for size in (1.0, 1.5, 2.5):
        for parameter, each in zip(parameters, (slope, slope.T), strict=True):
            parameter.grad = each * size
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def _alike(one: torch.Tensor, other: torch.Tensor, rounding: float) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=rounding)


# ---- groups --------------------------------------------------------------------------------------------------------


def _require_one_of_each(groups: list[Group]) -> None:
    held = [id(parameter) for group in groups for parameter in group["params"]]
    if len(set(held)) < len(held):
        raise InputError(
            "the optimizer has a parameter twice, which would be stepped twice. Hand over param_groups(…) once."
        )


def _require_one_beta(groups: list[Group]) -> None:
    """Raises InputError where betas differ. A cycle may drive them, and an earlier release's plan does not say them."""
    if len({tuple(group["betas"]) for group in groups if "betas" in group}) > 1:
        raise InputError("betas differ between the optimizer's groups. Give all of them the same.")


def _require_values(groups: list[Group], plan: Plan, model: torch.nn.Module | None) -> None:
    rebuild = "Make the optimizer of param_groups(model.named_parameters(), plan), and leave its groups alone."
    settings = {name: _settings(name, plan) for name in plan.optimizers}
    for name, wanted, group in _compared(groups, plan, model):
        planned = {"lr": wanted.lr, "weight decay": wanted.weight_decay, "eps": wanted.eps}
        # Where there is a scheduler: the peak that a cycle goes up to, or what it starts from.
        peak = group.get("max_lr", group.get("initial_lr", group["lr"]))
        live = {"lr": peak, "weight decay": group.get("weight_decay"), "eps": group.get("eps")}
        _require(name, planned, live, rebuild)
        for key, value in settings[wanted.optimizer].items():
            if key in group:  # somebody's own may call it otherwise, or have it elsewhere, which its steps show
                planned, live = _numbers(key, value), _numbers(key, group[key])
                if _CYCLED in group:
                    planned = {each: number for each, number in planned.items() if each not in _DRIVEN}
                remedy = f"Give the optimizer {key}={value}, or tune with another value and let the recipe say it."
                _require(name, planned, dict.fromkeys(planned) | live, remedy)


def _require(name: str, planned: Mapping[str, float | None], live: Mapping[str, float | None], remedy: str) -> None:
    for problem in value_problems(name, planned, live, remedy):
        raise InputError(str(problem))


def _settings(optimizer: str, plan: Plan) -> dict[str, Any]:
    """Returns what a plan says for all parameters of one of its optimizers, by torch's names: betas, momentum."""
    if not plan.optimizer_values:  # as an earlier release has written it
        return {}
    return TORCH_OPTIMIZERS[optimizer].settings(_hyperparameters(plan))


def _hyperparameters(plan: Plan) -> Hyperparameters:
    return Hyperparameters(lr=plan.lr, **plan.optimizer_values)


_CYCLED = "base_momentum"
"""What torch's schedulers that drive the first beta or momentum give a group."""
_DRIVEN = ("betas[0]", "momentum")


def _numbers(key: str, value: Any) -> dict[str, float | None]:
    """Returns a setting's numbers, of which betas have two, by name; None for what is no number."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return {f"{key}[{index}]": _number(each) for index, each in enumerate(value)}
    return {key: _number(value)}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | torch.Tensor) else None


def _require_one_schedule(groups: list[Group]) -> None:
    """Raises InputError where a scheduler, or somebody else, has moved learning rates apart."""
    moved = [
        (group.get("name", index), group["lr"] / group["initial_lr"])
        for index, group in enumerate(groups)
        if group.get("initial_lr")
    ]
    for name, factor in moved[1:]:
        if not math.isclose(factor, moved[0][1], rel_tol=_SCHEDULED, abs_tol=1e-6):
            raise InputError(
                f"group {name}: lr is {factor:.4g} times its initial_lr, and {moved[0][1]:.4g} times in group "
                f"{moved[0][0]}. Let one schedule multiply all groups, without a floor in lr that they share."
            )


_SCHEDULED = 1e-3
"""Relative difference of two groups' parts of their peaks that is rounding: some schedulers multiply step by step."""


def _compared(
    groups: list[Group], plan: Plan, model: torch.nn.Module | None
) -> Iterator[tuple[str, GroupValues, Group]]:
    """(who, what it should get, what it has) of each group, or of each parameter where groups are somebody's own."""
    planned = values(plan)
    if model is None and not all(group.get("name") in planned for group in groups):
        raise InputError(
            "the optimizer's groups are not the plan's. Make it of param_groups(model.named_parameters(), plan)."
        )
    name_of = {} if model is None else {id(parameter): name for name, parameter in named_parameters(model)}
    for group in groups:
        if group.get("name") in planned:
            yield group["name"].removeprefix("mup "), planned[group["name"]], group
        # A parameter may have been moved into another group.
        for parameter in group["params"]:
            name = name_of.get(id(parameter))
            if name is not None and name in plan.by_name:
                yield name, GroupValues.of(plan[name]), group


def _require_shapes(model: torch.nn.Module, plan: Plan) -> None:
    """Raises InputError for a model whose weights are not the plan's any more, or not seen under an older FSDP."""
    sharded = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    for name, parameter in named_parameters(model):
        if name.rpartition(".")[2] == FLAT:
            raise InputError(flattened(name))
        if sharded or not parameter.requires_grad or name not in plan.by_name:
            continue
        if full_shape(parameter) != plan[name].shape:
            raise InputError(
                f"{name}: the model's shape is {full_shape(parameter)}, the plan's {plan[name].shape}: it was "
                "replaced after the plan was made. Change the model first, and make and apply the plan then."
            )


def _require_all(groups: list[Group], plan: Plan, model: torch.nn.Module | None) -> None:
    held = {id(parameter) for group in groups for parameter in group["params"]}
    if model is not None:
        missing = [
            name
            for name, parameter in named_parameters(model)
            if parameter.requires_grad and id(parameter) not in held and not name.rpartition(".")[2].startswith(PADDING)
        ]
        hint = "Freeze it with requires_grad_(False), or hand it over."
        if missing and is_sharded(dict(named_parameters(model))[missing[0]]):
            hint = "Hand it over; after a forward pass under FSDP2, call model.reshard() before the optimizer is made."
    else:
        count = {group["name"]: len(group["params"]) for group in groups}
        missing = [names[0] for group, names in members(plan).items() if count.get(group, 0) < len(names)]
        hint = "Hand them over; where they are frozen, say check_optimizer(optimizer, plan, model)."
    if missing:
        more = "" if len(missing) == 1 else f" and {len(missing) - 1} more"
        of = "" if model is not None else "parameters like "
        raise InputError(f"{of}{missing[0]}{more}: the optimizer does not have it. {hint}")
