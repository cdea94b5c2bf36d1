"""Which of a GPT's layers are trained: of every kind that the recipe's patterns tell apart one, and the first ones."""

import fnmatch
from collections.abc import Sequence

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import shapes_of
from mup_megatron.check.measure.names import in_layer, layer_of
from mup_megatron.recipe import PerParameter, Recipe
from mup_megatron.theory import Tensor


def kept_layers(target: ModelFile, recipe: Recipe, stages: int, depth: int | None) -> list[int] | None:
    """Returns which of the target's layers are trained: the first of each kind, then the first ones; None for all."""
    count = target.num_layers if depth is None else min(target.num_layers, -(-depth // stages) * stages)
    if count == target.num_layers:
        return None
    kinds: dict[tuple[int | None, ...], int] = {}
    for layer, indices in _indices(target, recipe).items():
        kinds.setdefault(indices, layer)
    firsts = list(kinds.values())[:count]
    rest = [layer for layer in range(target.num_layers) if layer not in firsts]
    return sorted([*firsts, *rest[: count - len(firsts)]])


def overrides_of_layers(target: ModelFile, recipe: Recipe, kept: Sequence[int]) -> tuple[PerParameter, ...]:
    """Returns the recipe's overrides for a model of these layers alone: by whole names where a pattern tells layers
    apart.
    """
    if len(set(_indices(target, recipe).values())) == 1:
        return recipe.per_parameter
    found = []
    for parameter in shapes_of(recipe.megatron_base, target)[1].tensors:
        name = parameter.name_at_base or parameter.name
        index, layer = _index(recipe, parameter), layer_of(name)
        if index is None or (layer is not None and layer not in kept):
            continue
        match = name if layer is None else in_layer(name, kept.index(layer))
        found.append(recipe.per_parameter[index].model_copy(update={"match": match}))
    return tuple(found)


def _indices(target: ModelFile, recipe: Recipe) -> dict[int, tuple[int | None, ...]]:
    """Returns layer → for each of its parameters which of the recipe's patterns meets it."""
    found: dict[int, list[int | None]] = {}
    for parameter in shapes_of(recipe.megatron_base, target)[1].tensors:
        if (layer := layer_of(parameter.name)) is not None:
            found.setdefault(layer, []).append(_index(recipe, parameter))
    return {layer: tuple(indices) for layer, indices in found.items()}


def _index(recipe: Recipe, parameter: Tensor) -> int | None:
    name = parameter.name_at_base or parameter.name
    own = recipe.per_parameter
    return next((index for index, one in enumerate(own) if fnmatch.fnmatchcase(name, one.match)), None)
