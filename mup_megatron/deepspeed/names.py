"""The parameters of a model under DeepSpeed: by the plan's names, with global shapes, as groups for an optimizer.

A plan's names are those of `named_parameters()` of the model without wrappers. In DeepSpeed's pipeline these are global
already: a stage calls its layers by their place in the whole model, and `tied_modules.KEY` is the same on every stage.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from mup_megatron.modules import names as plain_names
from mup_megatron.modules.groups import PADDING, Form, Group
from mup_megatron.modules.groups import param_groups as groups_of
from mup_megatron.modules.names import unwrapped
from mup_megatron.theory import Plan


def is_pipeline(model: torch.nn.Module) -> bool:
    """Says if a model is a stage of DeepSpeed's pipeline."""
    module = sys.modules.get("deepspeed.runtime.pipe.module")
    return module is not None and isinstance(unwrapped(model), module.PipelineModule)


Named = Callable[[torch.nn.Module, Plan], Iterator[tuple[str, torch.nn.Parameter]]]


class Prepared(NamedTuple):
    """A model that an adapter has applied a plan to."""

    plan: Plan
    named: Named
    computes: Mapping[str, Any]


_prepared: "weakref.WeakKeyDictionary[torch.nn.Module, Prepared]" = weakref.WeakKeyDictionary()


def prepared(model: torch.nn.Module, plan: Plan, named: Named, *, computes: Mapping[str, Any]) -> None:
    """Notes that a plan was applied to a model.

    Args:
        model: not wrapped.
        plan: that was applied.
        named: how its parameters get the plan's names.
        computes: what weights do not show of what it computes; its checkpoints say it.
    """
    _prepared[model] = Prepared(plan, named, computes)


def prepared_plan(model: torch.nn.Module) -> Plan | None:
    """Returns the plan of `prepared`; None where there is none."""
    return _prepared[model].plan if model in _prepared else None


def computed_by(model: torch.nn.Module) -> Mapping[str, Any]:
    """Returns what is known of what a model computes, which its weights do not show."""
    inner = unwrapped(model)
    return _prepared[inner].computes if inner in _prepared else {}


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields (the plan's name, parameter) of what this rank holds, each once. What only pads a group is left out."""
    inner = unwrapped(model)
    own = plain_names.named_parameters(inner)
    if inner in _prepared:
        own = _prepared[inner].named(inner, _prepared[inner].plan)
    for name, parameter in own:
        if not name.rpartition(".")[2].startswith(PADDING):
            yield name, parameter


def param_groups(
    model: torch.nn.Module, plan: Plan, *, form: Form = Form.ABSOLUTE, pad: bool | None = None
) -> list[Group]:
    """Makes groups in the plan's order for `deepspeed.initialize(model_parameters=…)` or any torch optimizer.

    To be made before `deepspeed.initialize`: afterwards the engine's groups hold flat buffers. Frozen parameters are
    left out.

    Args:
        model: wrapped or not; of a pipeline, this rank's stage.
        plan: for the whole model.
        form: absolute values for DeepSpeed and torch, ratios for the fork Megatron-DeepSpeed.
        pad: give a group of which this rank holds nothing one element of its own, so that every stage of a pipeline
            has the same groups. Without it a pipeline under ZeRO-1 hangs. None: where the model is a pipeline.

    Raises:
        InputError: a parameter that the plan does not know, by name.
    """
    inner = unwrapped(model)
    padded = is_pipeline(inner) if pad is None else pad
    return groups_of(named_parameters(inner), plan, form=form, pad_on=inner if padded else None)
