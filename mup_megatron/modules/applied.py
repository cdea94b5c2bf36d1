"""The traces of a plan in a module, and whether they are still there.

A mark goes with copies and pickles of a model, to which the plan is applied just as well; the registry of `live/` knows
the model alone.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from mup_megatron.errors import InputError
from mup_megatron.live import hooks
from mup_megatron.live.applied import plan_applied_to
from mup_megatron.live.compare import Remedies, hook_problems, parameter_problems, scale_problem
from mup_megatron.live.hooks import Hooks
from mup_megatron.live.problems import Problem
from mup_megatron.modules.attention import attention_modules
from mup_megatron.modules.names import named_modules, named_parameters, unwrapped
from mup_megatron.modules.parameters import TABLES
from mup_megatron.modules.weights import full_shape
from mup_megatron.theory import Acts, Plan
from mup_megatron.validation import brief

_MARK = "_mup_applied"
"""Attribute of a model, not of its tensors: `Applied`. It goes with copies and pickles, to which the plan is applied
just as well.
"""


BRANCH_OUTPUT = "(output)"
"""Behind a layer's name, in place of a weight's: its output is a residual branch, and what is multiplied."""
_TOLD = 3
"""How many multipliers are told; all of them are in the mark."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The traces of a plan in a model."""

    fingerprint: str
    """Of the recipe."""
    scales: Mapping[str, float | None]
    """Of each of its attentions, by name; None where it has none that can be told."""
    softmax_scale: float | None
    """None where attention keeps its own."""
    multipliers: Mapping[str, float]
    """What the forward pass multiplies weights by, where that is not 1; by the name in the layer that uses them, of
    which a tied table has two."""

    @property
    def changes_function(self) -> bool:
        """True where the model computes something else with these weights than it would without the plug-in."""
        return self.softmax_scale is not None or bool(self.multipliers)

    def told(self) -> str:
        """Returns what the model computes with besides its weights, in words."""
        factors = [f"{brief(name, 60)} × {factor:g}" for name, factor in self.multipliers.items()]
        more = f" and {len(factors) - _TOLD} more" if len(factors) > _TOLD else ""
        multipliers = f"multipliers ({', '.join(factors[:_TOLD])}{more})" if factors else ""
        scale = "" if self.softmax_scale is None else f"an attention scale of {self.softmax_scale:g}"
        return " and ".join(filter(None, (multipliers, scale)))

    def within(self, name: str) -> "Applied":
        """Returns those in a submodule, by the names there."""
        start = f"{name}."
        scales, multipliers = (
            {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
            for found in (self.scales, self.multipliers)
        )
        return Applied(
            fingerprint=self.fingerprint,
            scales=scales,
            softmax_scale=self.softmax_scale if scales else None,
            multipliers={key: factor for key, factor in multipliers.items() if factor is not None},
        )


def leave_mark(model: torch.nn.Module, plan: Plan, multipliers: Mapping[str, float]) -> None:
    """Leaves a mark in a module to which a plan has just been applied, and in the models within it."""
    applied = Applied(
        fingerprint=plan.fingerprint,
        scales={name: attention.scale for name, _, attention in attention_modules(model)},
        softmax_scale=plan.softmax_scale if plan.changes_softmax_scale else None,
        multipliers=multipliers,
    )
    for name, module in named_modules(model):
        if not name:
            setattr(module, _MARK, applied)
        elif hasattr(type(module), "save_pretrained"):  # a model within the model, which may be saved by itself
            setattr(module, _MARK, applied.within(name))


def is_marked(module: torch.nn.Module) -> bool:
    """Returns whether a plan was applied to this very module, or to the one that it is a copy of."""
    return hasattr(module, _MARK)


def applied_plan(model: torch.nn.Module) -> Plan | None:
    """Returns the plan that was applied to a module, wrapped or not; None if none was."""
    return plan_applied_to(unwrapped(model))


def applied_to(model: torch.nn.Module) -> Applied | None:
    """Returns what plans have left in a module or in parts of it, or in the one that it is a copy of."""
    own: dict[str, Applied] = {}
    for name, module in named_modules(unwrapped(model)):
        found = getattr(module, _MARK, None)
        if found is not None and not any(not outer or name.startswith(f"{outer}.") for outer in own):
            own[name] = found
    if "" in own or not own:
        return own.get("")
    return Applied(
        fingerprint=next(iter(own.values())).fingerprint,
        scales={f"{name}.{key}": scale for name, part in own.items() for key, scale in part.scales.items()},
        softmax_scale=next((part.softmax_scale for part in own.values() if part.softmax_scale is not None), None),
        multipliers={f"{name}.{key}": factor for name, part in own.items() for key, factor in part.multipliers.items()},
    )


def require_match(model: torch.nn.Module, plan: Plan) -> None:
    """Raises InputError unless module and plan have the same parameters and shapes."""
    held = {name: full_shape(parameter) for name, parameter in named_parameters(model)}
    remedy = "Make the plan from the model that is trained."
    problems = parameter_problems(held, plan, Remedies(remedy, remedy, remedy))
    if problems:
        more = f" There are {len(problems) - 1} more like this." if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}")


def require_applied(model: torch.nn.Module, plan: Plan) -> None:
    """Raises InputError unless a model still is what `apply_plan` made of it, but for the values of its weights."""
    require_match(model, plan)
    require_kept(model)


def require_kept(model: torch.nn.Module) -> None:
    """Raises InputError if a multiplier or a scale of attention is not what a plan has left in a model.

    Something may have been replaced since: a readout or an embedding of another size, an attention.
    """
    problems = kept_problems(model)
    if problems:
        raise InputError(str(problems[0]))


def kept_problems(model: torch.nn.Module) -> list[Problem]:
    """Returns where a model's multipliers and scales of attention are not those that a plan has left in it."""
    applied = applied_to(model)
    if applied is None:
        return []
    model = unwrapped(model)
    modules = dict(named_modules(model))
    wanted = _wanted(applied, modules)
    problems = list(hook_problems(_found(wanted, modules), wanted))
    live = {name: attention.scale for name, _, attention in attention_modules(model)}
    cause = (
        "Its attention was changed or replaced after the plan was applied. Change the model first, and apply the plan "
        "then."
    )
    for name in {**applied.scales, **live}:
        scale = live.get(name)
        problem = scale_problem(
            name,
            applied.scales.get(name),
            () if scale is None else (scale,),
            lambda _: cause,
            must_be_known=applied.softmax_scale is not None and name in modules,
        )
        problems += [problem] if problem is not None else []
    return problems


def _wanted(applied: Applied, modules: Mapping[str, torch.nn.Module]) -> dict[str, Hooks]:
    """Returns the hooks that a plan has left, by the layer that they were left at."""
    wanted: dict[str, Hooks] = {}
    for key, factor in applied.multipliers.items():
        layer, _, what = key.rpartition(".")
        table = what == BRANCH_OUTPUT or any(
            isinstance(module, TABLES) for name, module in modules.items() if _is_in(name, layer)
        )
        wanted.setdefault(layer, []).append((Acts.OUTPUT if table else Acts.INPUT, factor))
    return wanted


def _found(layers: Collection[str], modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, Hooks]]:
    """Yields the hooks that are there, by the name of the layer: another may have been put around it, as LoRA does."""
    there = {name: found for name, module in modules.items() if (found := hooks.found(module))}
    layer_of = {name: max((each for each in layers if _is_in(name, each)), key=len, default=name) for name in there}
    yield from ((layer_of[name], found) for name, found in there.items())
    yield from ((layer, []) for layer in layers if layer not in layer_of.values())


def _is_in(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")
