"""From a live model's parameters to the plan's names, and agreement of all ranks on what is wrong.

A rank of a pipeline numbers its layers from 0 and a tensor-parallel rank holds shards; the plan knows one model with
global names and shapes. Nothing here changes a model.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from mup_megatron.architectures.names import global_name
from mup_megatron.collectives import gathered, raise_together
from mup_megatron.theory import Plan, PlanEntry


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside Megatron's wrappers (DDP, Float16Module)."""
    model: Any = chunk
    while hasattr(model, "module"):
        model = model.module
    assert isinstance(model, torch.nn.Module)
    return model


def named_parameters(
    model_chunks: Sequence[torch.nn.Module], *, tied: bool
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(global name, parameter) for everything that this rank holds, over all its virtual pipeline stages.

    With a tied readout the last stage's copy of the embedding has the embedding's name.
    """
    for chunk in model_chunks:
        model: Any = unwrapped(chunk)
        layers = layers_of(model)
        for name, parameter in model.named_parameters():
            yield global_name(name, layers, tied=tied), parameter


def layers_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """Returns the global index, from 0, of each layer that each stack of a model holds; the model is not wrapped."""
    return {
        name: [int(layer.layer_number) - 1 for layer in stack.layers]  # type: ignore[union-attr]
        for name, stack in model.named_children()
        if hasattr(stack, "layers")
    }


def require_match(model_chunks: Sequence[torch.nn.Module], plan: Plan) -> None:
    """Raises InputError, the same on every rank, unless model and plan have the same parameters and shapes.

    Collective: every rank has to call it.
    """
    problems = []
    held = set()
    for name, parameter in named_parameters(model_chunks, tied=plan.tied):
        held.add(name)
        if name not in plan.by_name:
            problems.append(
                f"{name}: the model has this parameter, the plan has not. The model is not the one of the model file, "
                "or has a kind of layer that is not supported."
            )
        elif (problem := _shape_problem(plan[name], parameter)) is not None:
            problems.append(problem)
    everywhere = set().union(*gathered(held))
    for entry in plan.entries:
        if entry.name not in everywhere:
            problems.append(
                f"{entry.name}: the plan has this parameter, the model has not. Make the model file say what the "
                "model is; `mup-megatron explain` lists what the plan expects."
            )
    raise_together(problems)


def _shape_problem(entry: PlanEntry, parameter: torch.nn.Parameter) -> str | None:
    found = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        found[getattr(parameter, "partition_dim", 0)] *= parallel_state.get_tensor_model_parallel_world_size()
    expected = list(entry.shape)
    if entry.padded_to is not None:
        multiple = entry.padded_to * parallel_state.get_tensor_model_parallel_world_size()
        expected[0] = -(-expected[0] // multiple) * multiple
    if found == expected:
        return None
    return (
        f"{entry.name}: the model's global shape is {tuple(found)}, the plan's {tuple(expected)}. "
        "Make the model file say what the model is."
    )
