"""From a live model's parameters to the plan's names, and agreement of all ranks on what is wrong.

A rank of a pipeline numbers its layers from 0, an expert-parallel rank its experts, and a tensor-parallel rank holds
shards; the plan knows one model with global names and shapes. Nothing here changes a model.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from mup_megatron.architectures.names import global_name
from mup_megatron.collectives import gathered, raise_together
from mup_megatron.live.compare import Remedies, parameter_problems, site_problems
from mup_megatron.megatron import versions
from mup_megatron.theory import Plan


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """Returns the model inside Megatron's wrappers (DDP, Float16Module)."""
    model: Any = chunk
    while hasattr(model, "module"):
        model = model.module
    assert isinstance(model, torch.nn.Module)
    return model


def named_parameters(
    model_chunks: Sequence[torch.nn.Module], *, tied: bool
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields (global name, parameter) for everything that this rank holds, over all its virtual pipeline stages.

    With a tied readout the last stage's copy of the embedding has the embedding's name.
    """
    for chunk in model_chunks:
        model: Any = unwrapped(chunk)
        layers, experts = layers_of(model), experts_of(model)
        for name, parameter in model.named_parameters():
            yield global_name(versions.parameter_name(name), layers, tied=tied, experts=experts), parameter


def layers_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """Returns the global index, from 0, of each layer that each stack of a model holds; the model is not wrapped."""
    return {
        name: [int(layer.layer_number) - 1 for layer in stack.layers]  # type: ignore[union-attr]
        for name, stack in model.named_children()
        if hasattr(stack, "layers")
    }


def experts_of(model: torch.nn.Module) -> Sequence[int] | None:
    """Returns the global index, from 0, of each expert that each layer of a model holds; None without experts."""
    held = (getattr(module, "local_expert_indices", None) for module in model.modules())
    return next((indices for indices in held if isinstance(indices, list)), None)


def named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields (global name, module) of everything in a model that is not wrapped."""
    layers, experts = layers_of(model), experts_of(model)
    for name, module in model.named_modules():
        yield global_module_name(name, layers, experts), module


def global_module_name(name: str, layers: Mapping[str, Sequence[int]], experts: Sequence[int] | None = None) -> str:
    """Returns the global name of a module, given those of `layers_of`; a tied readout is a readout here."""
    # Names of parameters are what is translated.
    return global_name(f"{name}.weight", layers, tied=False, experts=experts).removesuffix(".weight")


_REMEDIES = Remedies(
    unknown="The model is not the one of the model file, or has a kind of layer that is not supported.",
    missing="Make the model file say what the model is; `mup-megatron explain` lists what the plan expects.",
    shape="Make the model file say what the model is.",
)


def require_match(model_chunks: Sequence[torch.nn.Module], plan: Plan) -> None:
    """Raises InputError, the same on every rank, unless model and plan have the same parameters, shapes and sites.

    Collective: every rank has to call it.
    """
    experts = {entry.name for entry in plan.entries if entry.is_expert}
    held = {
        name: global_shape(name, parameter, expert=name in experts)
        for name, parameter in named_parameters(model_chunks, tied=plan.tied)
    }
    modules = {name for chunk in model_chunks for name, _ in named_modules(unwrapped(chunk))}
    of_ranks = gathered((set(held), modules & {site.module for site in plan.sites}))
    everywhere, sites = (set[str]().union(*each) for each in zip(*of_ranks, strict=True))
    size = parallel_state.get_tensor_model_parallel_world_size()
    problems = parameter_problems(held, plan, _REMEDIES, everywhere=everywhere, tensor_parallel=size)
    raise_together(problems + site_problems(sites, plan.sites, _NO_SITE))


_NO_SITE = "Use Megatron's own layers, or a recipe whose factor is 1 here."


def local_values(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Returns what this rank holds of a parameter: FSDP keeps a part of it, as a tensor of another kind."""
    values: Any = parameter.detach()
    local: torch.Tensor = values.to_local() if hasattr(values, "to_local") else values
    return local


def global_shape(name: str, parameter: torch.nn.Parameter, *, expert: bool = False) -> tuple[int, ...]:
    """Returns the shape in a model that is not split, of a parameter by its global name and what its entry says."""
    shape = list(parameter.shape)
    if expert:
        return _global_shape_of_experts(name, shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[getattr(parameter, "partition_dim", 0)] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def _global_shape_of_experts(name: str, shape: list[int]) -> tuple[int, ...]:
    """Experts have a tensor parallelism of their own; where all of them are one tensor, it is also divided by them."""
    size = parallel_state.get_expert_tensor_parallel_world_size()
    own = name.rpartition(".mlp.experts.")[2]
    if own in _LEGACY:
        shape[_LEGACY[own]] *= size * parallel_state.get_expert_model_parallel_world_size()
    elif "linear_fc1." in own:
        shape[0] *= size
    elif len(shape) > 1:
        shape[1] *= size
    return tuple(shape)


_LEGACY = {"weight1": 1, "weight2": 0}
"""Tensors of all experts of a layer → the dimension that is divided."""
