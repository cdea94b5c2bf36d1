"""A recipe and a factory of any torch module → a plan. Allocates nothing."""

import logging
import re
from collections.abc import Callable

import torch

from mup_megatron.errors import InputError
from mup_megatron.modules.attention import AttentionSettings, attention_modules, attention_of
from mup_megatron.modules.shapes import Facts, MetaModule, base_parameters, model_shapes
from mup_megatron.recipe import ModuleBase, Recipe
from mup_megatron.theory import Plan, Property

_log = logging.getLogger(__name__)

REFERENCE_STD = 0.02
"""A module's own initialisation is what a recipe's `init_method_std` of this much stands for; others are in
proportion."""


def module_base(base: Callable[[], torch.nn.Module], wider: Callable[[], torch.nn.Module]) -> ModuleBase:
    """Returns the `base` of a recipe for any torch module.

    Args:
        base: builds the module at which hyperparameters are tuned.
        wider: builds one of the same kind in which every side that grows with width has another size: the target, or
            one that is twice as wide.

    Raises:
        InputError: the two have other parameters or no other size, or a parameter's initial draw is not understood.
    """
    built = MetaModule.of(base)
    attention = attention_of(built.module)
    parameters = base_parameters(built, MetaModule.of(wider))
    if not any(any(parameter.grows) for parameter in parameters.values()):
        raise InputError("wider: it has every size of the base. Let it build a module that is wider.")
    return ModuleBase(
        parameters=parameters,
        head_size=None if attention is None else attention.head_size,
        softmax_scale=None if attention is None else attention.scale,
    )


def plan_for_module(target: Callable[[], torch.nn.Module], recipe: Recipe, *, readout: str | None = None) -> Plan:
    """Returns the plan of a torch module: what every parameter gets.

    Args:
        target: builds the module that is trained; called on the meta device.
        recipe: its base is what `module_base` gave.
        readout: name of the weight that computes the model's output, where it is not the last one with a fixed output.

    Raises:
        InputError: the recipe is for another kind of model, or parameters cannot be classified; names them.
    """
    base = recipe.base
    if not isinstance(base, ModuleBase):
        raise InputError(
            "the recipe's base is not a torch module. Make one with mup_megatron.modules.module_base, or give a model "
            "of the recipe's kind."
        )
    scale = recipe.moved.init_method_std / REFERENCE_STD
    parameters = {
        name: own if own.init_std is None else own.model_copy(update={"init_std": own.init_std * scale})
        for name, own in base.parameters.items()
    }
    attention = None if base.head_size is None else AttentionSettings(base.head_size, base.softmax_scale)
    built = MetaModule.of(target)
    shapes = model_shapes(built, parameters, Facts(readout=readout, base_attention=attention))
    properties = {tensor.name: tensor.properties for tensor in shapes[1].tensors}
    if readout is not None and not properties[shapes[1].readout or ""] & {Property.READOUT, Property.EMBEDDING}:
        raise InputError(
            f"readout {readout}: it is no weight from a growing side to a fixed one, and no tied table. Name the "
            "weight that computes the model's output, or none."
        )
    _warn_of_unread_attention(built.module)
    return recipe.plan_for_shapes(*shapes)


def _warn_of_unread_attention(model: torch.nn.Module) -> None:
    """Says which attentions go on with a scale of their own: nobody can see whether their heads grow."""
    read = {name for name, _, _ in attention_modules(model)}
    parents = {".".join(name.split(".")[:n]) for name in read for n in range(name.count(".") + 1)}
    unread = [
        name
        for name, module in model.named_modules()
        if name not in read | parents and re.search("AttentionSettings|Attn", type(module).__name__)
    ]
    if unread:
        _log.warning(
            "%s: an attention without `head_dim` and `scaling`, whose scale can be neither seen nor set. Keep the "
            "size of its heads, or give it both.",
            unread[0],
        )
