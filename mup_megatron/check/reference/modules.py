"""A plan carried out by hand on a torch module, beside the adapters: what a live one is compared with.

It shares the model's own code with what is checked, and the plan, and nothing else: weights are drawn anew, multipliers
are hooks of its own, every parameter has a group of its own in torch's optimizer, or in
what orthogonalises beside it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mup_megatron.check.entries import is_embedding, is_vector
from mup_megatron.check.measure.optimizers import Handling, correct_optimizers, of_torch
from mup_megatron.modules.attention import attention_modules, scale_attribute
from mup_megatron.recipe import Recipe
from mup_megatron.theory import BRANCH, Plan, PlanEntry


def carry_out(model: nn.Module, plan: Plan, *, seed: int) -> None:
    """Makes a bare module what a plan says.

    Args:
        model: freshly built.
        plan: for it.
        seed: of its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            entry = plan[name]
            if entry.init_std is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * entry.init_std)
            elif entry.init_value is not None:
                parameter.fill_(entry.init_value)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model.requires_grad_(True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        factor = _factor(module, names, plan)
        if factor != 1.0:
            multiply(module, factor)
    for site in (plan.site(place) for place in plan.places if place.carries == BRANCH):
        _multiply_output(model.get_submodule(site.module), site.factor / site.stock)
    stock = plan.head_size**-0.5 if plan.stock_softmax_scale is None else plan.stock_softmax_scale
    if plan.softmax_scale != stock:
        for _, module, attention in attention_modules(model):
            key = scale_attribute(module)
            if key is not None and attention.scale is not None:
                setattr(module, key, attention.scale / stock * plan.softmax_scale)


def _factor(module: nn.Module, names: Mapping[int, str], plan: Plan) -> float:
    """Returns what a module's weight is to be multiplied by; parameters have names by their identity."""
    own = [names[id(p)] for p in module.parameters(False) if not is_vector(plan[names[id(p)]])]
    if not own:
        return 1.0
    entry = plan[own[0]]
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return entry.multiplier
    if entry.name != plan.readout:
        return entry.multiplier
    factor = plan.output_multiplier if is_embedding(entry) else entry.multiplier
    return factor / plan.stock_readout_ratio


def multiply(module: nn.Module, factor: float) -> None:
    """Multiplies a module's weight, and not its bias."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.register_forward_hook(lambda _module, _args, output: factor * output)
    else:
        module.register_forward_pre_hook(lambda _module, args: (factor * args[0], *args[1:]))


def _multiply_output(module: nn.Module, factor: float) -> None:
    """Multiplies what a module gives, bias included."""
    module.register_forward_hook(lambda _module, _args, output: factor * output)


def optimizers_for(model: nn.Module, recipe: Recipe, plan: Plan) -> list[torch.optim.Optimizer]:
    """Returns those that train a correct run, with a group for each parameter that is trained."""
    return correct_optimizers(groups_of(model, plan, lambda entry: of_torch(entry.optimizer)), recipe)


def groups_of(model: nn.Module, plan: Plan, handling: Callable[[PlanEntry], Handling]) -> list[dict[str, Any]]:
    """Returns a group for each parameter that is trained, as `correct_optimizers` takes them.

    Args:
        model: that is trained.
        plan: for it.
        handling: how a parameter is taken.
    """
    found = []
    for name, parameter in model.named_parameters():
        entry = plan[name]
        if parameter.requires_grad:
            values = {"lr": entry.lr, "weight_decay": entry.weight_decay}
            own = values if entry.eps is None else {**values, "eps": entry.eps}
            said = {"name": name, "optimizer": entry.optimizer, "handling": handling(entry)}
            found.append({"params": [parameter], **said, **own})
    return found
