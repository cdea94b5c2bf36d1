"""The layers of a target that are trained: one of every kind, and the first ones; and the recipe for those alone.

Kinds are told apart by what a layer consists of, and by which of the recipe's patterns meet it.
"""

import fnmatch
from collections.abc import Mapping, Sequence

from mup_megatron.architectures.decoder import as_other
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, decoder_of, shapes_of
from mup_megatron.check.measure.names import in_layer, layer_of
from mup_megatron.recipe import PerParameter, Recipe
from mup_megatron.theory import Tensor


def kept_layers(target: ModelFile, recipe: Recipe, stages: int, depth: int | None) -> list[int] | None:
    """Returns which of the target's layers are trained: the first of each kind, then the first ones; None for all."""
    count = target.num_layers if depth is None else min(target.num_layers, -(-depth // stages) * stages)
    return None if count == target.num_layers else _first_of_each(_kinds(target, recipe), count)


def base_layers(base: ModelFile, count: int) -> list[int]:
    """Returns which of the base's layers stand for all of them, about so many: one of each family at least."""
    families = decoder_of(base).layers(base)
    kinds = {layer: tuple(family.name for family in own) for layer, own in enumerate(families)}
    return _first_of_each(kinds, max(count, len(set(kinds.values()))))


def _first_of_each(kinds: Mapping[int, object], count: int) -> list[int]:
    """The first layer of each kind, then the first ones; so many, in order."""
    firsts = list({kind: layer for layer, kind in reversed([*kinds.items()])}.values())
    chosen = sorted(firsts)[:count]
    rest = [layer for layer in kinds if layer not in chosen]
    return sorted([*chosen, *rest[: count - len(chosen)]])


def in_terms_of(target: ModelFile, recipe: Recipe) -> Recipe:
    """Returns the recipe with its base as a model of the target's architecture, if it is one of another."""
    base, own = recipe.megatron_base, architecture_of(target)
    if architecture_of(base) is own:
        return recipe
    tensors = shapes_of(base, target)[1].tensors
    overrides = [
        recipe.per_parameter[index].model_copy(update={"match": tensor.name})
        for tensor in tensors
        if (index := _index(recipe, tensor)) is not None
    ]
    other = as_other(architecture_of(base), own, base)
    assert other is not None
    other = other.model_copy(update={"transformer_impl": target.transformer_impl})
    return recipe.model_copy(update={"base": other, "per_parameter": tuple(overrides)})


def overrides_of_layers(target: ModelFile, recipe: Recipe, kept: Sequence[int]) -> tuple[PerParameter, ...]:
    """Returns the recipe's overrides for a model of these layers alone: by whole names where a pattern tells layers
    apart.
    """
    if not recipe.per_parameter or len(set(_kinds(target, recipe).values())) == 1:
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


def _kinds(target: ModelFile, recipe: Recipe) -> dict[int, object]:
    """Returns layer → for each of its parameters, by its name in the layer, which of the recipe's patterns meets it."""
    found: dict[int, list[tuple[str, int | None]]] = {}
    for parameter in shapes_of(recipe.megatron_base, target)[1].tensors:
        if (layer := layer_of(parameter.name)) is not None:
            found.setdefault(layer, []).append((in_layer(parameter.name, "*"), _index(recipe, parameter)))
    return {layer: tuple(indices) for layer, indices in found.items()}


def _index(recipe: Recipe, parameter: Tensor) -> int | None:
    name = parameter.name_at_base or parameter.name
    own = recipe.per_parameter
    return next((index for index, one in enumerate(own) if fnmatch.fnmatchcase(name, one.match)), None)
