"""The layers of a target that are trained: one of every kind, and the first ones; and the recipe for those alone.

Kinds are told apart by what a layer consists of, and by which of the recipe's patterns meet it.
"""

import fnmatch
from collections.abc import Container, Mapping, Sequence

from mup_megatron.architectures import names
from mup_megatron.architectures.architecture import as_other
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, shapes_of
from mup_megatron.check.measure.names import in_layer
from mup_megatron.recipe import PerParameter, Recipe
from mup_megatron.theory import Tensor


def kept_layers(target: ModelFile, recipe: Recipe, stages: int, depth: int | None) -> list[int] | None:
    """Returns which of the target's layers are trained: the first of each kind, then the first ones; None for all."""
    count = target.num_layers if depth is None else min(target.num_layers, -(-depth // stages) * stages)
    return None if count == target.num_layers else _first_of_each(_kinds(target, recipe), count)


def base_layers(base: ModelFile, count: int) -> list[int]:
    """Returns which of the base's layers stand for all of them, about so many: one of each family at least."""
    kinds: dict[int, list[str]] = {layer: [] for layer in range(base.num_layers)}
    for stack, layers in architecture_of(base).stacks(base).items():
        for families, kind in zip(layers, kinds.values(), strict=False):
            kind.extend(f"{stack} {family.name}" for family in families)
    named = {layer: tuple(kind) for layer, kind in kinds.items()}
    return _first_of_each(named, max(count, len(set(named.values()))))


def _first_of_each(kinds: Mapping[int, object], count: int) -> list[int]:
    """Returns the first layer of each kind, then the first ones; so many, in order."""
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
    found, own = [], architecture_of(target)
    left = {stack: len(layers) for stack, layers in own.stacks(own.with_layers(target, kept)).items()}
    for parameter in shapes_of(recipe.megatron_base, target)[1].tensors:
        name = parameter.name_at_base or parameter.name
        index, place = _index(recipe, parameter), _place(name, left)
        if index is None:
            continue
        match = name
        if place is not None:
            stack, layer = place
            if layer not in kept[: left[stack]]:
                continue
            match = in_layer(name, kept.index(layer))
        found.append(recipe.per_parameter[index].model_copy(update={"match": match}))
    return tuple(found)


def _kinds(target: ModelFile, recipe: Recipe) -> dict[int, object]:
    """Returns layer → for each of its parameters, by its name in the layer, which of the recipe's patterns meets it."""
    found: dict[int, list[tuple[str, int | None]]] = {layer: [] for layer in range(target.num_layers)}
    stacks = architecture_of(target).stacks(target)
    for parameter in shapes_of(recipe.megatron_base, target)[1].tensors:
        place = _place(parameter.name, stacks)
        if place is not None and place[1] in found:
            found[place[1]].append((in_layer(parameter.name, "*"), _index(recipe, parameter)))
    return {layer: tuple(indices) for layer, indices in found.items()}


def _place(name: str, stacks: Container[str]) -> tuple[str, int] | None:
    """Returns the stack and the layer of it that a parameter is in; None for what is in none, as further layers are."""
    parts = names.layer_of(name)
    return None if parts is None or parts[0] not in stacks else parts[:2]


def _index(recipe: Recipe, parameter: Tensor) -> int | None:
    name = parameter.name_at_base or parameter.name
    own = recipe.per_parameter
    return next((index for index, one in enumerate(own) if fnmatch.fnmatchcase(name, one.match)), None)
