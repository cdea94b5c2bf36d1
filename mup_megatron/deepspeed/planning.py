"""The plan that an engine trains by: made from the recipe of its `"mup"` entry and its model, or applied before."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mup_megatron.collectives import gathered, raise_together, raising_together
from mup_megatron.deepspeed.entry import Entry
from mup_megatron.deepspeed.names import named_parameters, prepared_plan
from mup_megatron.errors import InputError
from mup_megatron.live.compare import Remedies, parameter_problems
from mup_megatron.modules.applied import applied_plan
from mup_megatron.modules.names import unwrapped
from mup_megatron.modules.plan import plan_for_module
from mup_megatron.modules.weights import full_shape
from mup_megatron.recipe import HuggingFaceBase, ModuleBase, Recipe
from mup_megatron.targets import plan_for_file
from mup_megatron.theory import Plan


def plan_for(model: torch.nn.Module, recipe: Recipe, target: str | None = None, *, readout: str | None = None) -> Plan:
    """Returns the plan of a model: what each of its parameters gets.

    Args:
        model: wrapped or not; of a pipeline, this rank's stage.
        recipe: what is transferred. Its base decides how the model is looked at.
        target: what the whole model is, where that can't be read off it: `package.module:function` that builds it, for
            any torch module; else the path of a Hugging Face configuration or of a model file. None: a Hugging Face
            model says it itself.
        readout: name of the weight that computes a torch module's output, where it is tied to an embedding.

    Raises:
        InputError: model and recipe are not of one architecture.
    """
    if isinstance(recipe.base, ModuleBase):
        return plan_for_module(_factory(target), recipe, readout=readout)
    if target is not None:
        return plan_for_file(Path(target), recipe)
    if not isinstance(recipe.base, HuggingFaceBase):
        raise InputError(
            "the recipe is for Megatron-Core models, which are prepared before: call mup_megatron.deepspeed.megatron."
            "prepare(model, plan), or build them with its pipeline_module."
        )
    inner: Any = unwrapped(model)
    if not hasattr(getattr(inner, "config", None), "model_type"):
        raise InputError(
            f"the recipe is for a Hugging Face model, and a {type(inner).__name__} has no configuration of one. Write "
            'the path of the configuration as "target".'
        )
    from mup_megatron import huggingface

    return huggingface.plan_for(inner, recipe)


def _factory(target: str | None) -> Callable[[], torch.nn.Module]:
    """Returns the function that `package.module:function` names."""
    module, _, name = (target or "").partition(":")
    if not name:
        raise InputError(
            "the recipe is for a torch module, so its initialisation has to be looked at: write what builds the model "
            'as "target", "package.module:function".'
        )
    try:
        function: Callable[[], torch.nn.Module] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f'"target" {target}: {error}. Write "package.module:function".') from None
    return function


def plan_of_entry(model: torch.nn.Module, recipe: Recipe, entry: Entry) -> Plan:
    """Returns the plan that an entry asks for with this recipe, which need not be the entry's own.

    Raises:
        InputError: as `plan_for`; also for a mistake in what "target" names: the other ranks have to hear of it.
    """
    try:
        return plan_for(model, recipe, entry.target, readout=entry.readout)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f'no plan could be made of "target" {entry.target} ({type(error).__name__}: {error}). Correct it.'
        ) from error


def plan_on_all_ranks(model: torch.nn.Module, recipe: Recipe, entry: Entry) -> Plan:
    """Returns `plan_of_entry`'s plan; an error names the recipe, and every rank raises it. Collective."""
    with raising_together():
        try:
            plan = plan_of_entry(model, recipe, entry)
        except InputError as error:
            raise InputError(f"{entry.recipe}: {error}") from error.__cause__
    return plan


def plan_applied_to(model: torch.nn.Module) -> Plan | None:
    """Returns the plan that was applied to a model before, through whichever of the adapters; None where none was."""
    inner = unwrapped(model)
    return prepared_plan(inner) or applied_plan(inner)


def require_match(model: torch.nn.Module, plan: Plan) -> None:
    """Raises InputError unless all ranks together have the plan's parameters, and no other. Collective."""
    held = {name: full_shape(parameter) for name, parameter in named_parameters(model)}
    everywhere = set().union(*gathered(set(held)))
    raise_together(parameter_problems(held, plan, _REMEDIES, everywhere=everywhere)[:1])


_REMEDIES = Remedies(
    unknown="Make the plan from the model that is trained.",
    missing='Correct "target" or the recipe\'s base.',
    shape='Correct "target".',
)
