"""The models that a Hugging Face configuration is checked on, at several small widths.

Every ratio of widths is the target's; what base and target share stays fixed. The size of heads, the number of groups
and the depth are cut in both where the configuration's keys allow it, and vocabulary and positions always.
"""

import contextlib
import copy
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from mup_megatron.check.family.sizes import DEPTH, HEAD_SIZE, SEQUENCE, SMALLEST, VOCABULARY
from mup_megatron.errors import InputError
from mup_megatron.huggingface import configs
from mup_megatron.recipe import HuggingFaceBase, Recipe

_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "embedding_size")
_DROPOUT = re.compile(r".*dropout.*|.*pdrop|.*layerdrop")
_POSITIONS = ("max_position_embeddings", "n_positions")
_PERIODS = re.compile(r".*_(?:period|interval|step|pattern)")
"""Keys that say after how many layers another kind of layer comes."""
_OTHER_HEADS = re.compile(r".*head_dim|.*_rank|.*head_size|.*kv_channels|num_kv_heads|multi_query")
"""Keys of attention that the rules below do not know: its heads are then left as they are."""
_GROUPS = "num_key_value_heads"
_NOT_BUILT = (ValueError, TypeError, AssertionError, AttributeError, KeyError, IndexError, RuntimeError, InputError)
"""What a model's own code raises where a size is none that it is made for."""


def width_of(config: PretrainedConfig) -> int:
    """Returns a configuration's width, in its own key for it."""
    own = config.to_dict()
    found: int | None = next((own[key] for key in _WIDTH_KEYS if isinstance(own.get(key), int)), None)
    if found is None:
        raise InputError(f"model type {config.model_type}: none of {', '.join(_WIDTH_KEYS)} says how wide it is.")
    return found


def widths_for(config: PretrainedConfig, base: PretrainedConfig, count: int) -> list[int]:
    """Returns the widths of a check: small multiples of the least that keeps whole heads."""
    unit = _unit(config, base)
    smallest = -(-SMALLEST // unit) * unit
    return [smallest * 2**i for i in range(count)]


def at_width(config: PretrainedConfig, base: PretrainedConfig, width: int) -> PretrainedConfig:
    """Returns the configuration at another width.

    Raises:
        InputError: heads would not be whole; says what would fit.
    """
    unit = _unit(config, base)
    if width < unit or width % unit:
        raise InputError(f"--widths {width}: whole heads and groups of the target need multiples of {unit}.")
    whole = width_of(config)

    def scaled(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [scaled(item) for item in value]
        return max(1, round(value * width / whole))

    changed = copy.deepcopy(config)
    for key, value in growing_keys(config, base).items():
        setattr(changed, key, scaled(value))
    return changed


def growing_keys(config: PretrainedConfig, base: PretrainedConfig) -> dict[str, Any]:
    """The keys that grow with width, with the target's values: those that differ from the base's, or all of them where
    the base is as wide.
    """
    own, other = config.to_dict(), base.to_dict()
    as_wide = width_of(config) == width_of(base)
    sizes_grow = configs.head_size(config) != configs.head_size(base)
    keys = configs.WIDTHS | (configs.HEAD_SIZES if sizes_grow else configs.HEADS)
    grown = {
        key: value
        for key, value in own.items()
        if key in keys and value is not None and (as_wide or value != other.get(key))
    }
    # A configuration may leave its head size to be computed, and its number of heads then keeps it.
    return {key: value for key, value in grown.items() if isinstance(value, int | list | tuple)}


def _unit(config: PretrainedConfig, base: PretrainedConfig) -> int:
    """Returns the width with the least number of whole heads and groups."""
    own, grown, width = config.to_dict(), growing_keys(config, base), width_of(config)
    counts = [value for key, value in grown.items() if key in configs.HEADS and isinstance(value, int)]
    shared = [own[key] for key in configs.HEADS - set(grown) if isinstance(own.get(key), int)]
    if counts and shared:
        # A number of groups that does not grow has to divide the number of heads.
        return Fraction(width * math.lcm(*shared), max(counts)).numerator
    return width // math.gcd(width, *counts)


def smallest_that_builds(
    model_class: Any, config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe
) -> tuple[PretrainedConfig, PretrainedConfig, Recipe]:
    """Target, base and recipe with as few layers and as small heads as a model can be built with."""
    for change in (lambda *of: _with_small_heads(*_shallow(*of)), _shallow):
        try:
            small, small_base, small_recipe = change(config, base, recipe)
            width = widths_for(small, small_base, 1)[0]
            with torch.device("meta"), configs.quiet():
                model_class(at_width(small, small_base, width))
        except _NOT_BUILT:
            continue
        return small, small_base, small_recipe
    return config, base, recipe


def remarks_on_size(small: PretrainedConfig, config: PretrainedConfig, base: PretrainedConfig) -> list[str]:
    """Returns remarks on what is as large as the target's."""
    remarks = []
    if (layers := depth_of(small)) > DEPTH:
        remarks.append(
            f"{layers} of {depth_of(config)} layers are trained, not {DEPTH}: recipe or configuration tell so many "
            "apart, or the model cannot be built with fewer."
        )
    own, left, size = config.to_dict(), small.to_dict(), configs.head_size(config)
    counts = [own[key] for key in configs.HEADS if isinstance(own.get(key), int)]
    cut = any(own.get(key) != left.get(key) for key in configs.HEADS | configs.HEAD_SIZES)
    grow = size != configs.head_size(base)
    if counts and not cut and not grow and (size is None or size > HEAD_SIZE):
        of_size = "" if size is None else f", of size {size}"
        remarks.append(f"Heads are the target's own{of_size}: the model cannot be built with smaller ones.")
    return remarks


def _with_small_heads(
    config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe
) -> tuple[PretrainedConfig, PretrainedConfig, Recipe]:
    """With small heads and few groups: see `family.condensed`."""
    own = config.to_dict()
    size, other = configs.head_size(config), configs.head_size(base)
    counts = {key: own[key] for key in configs.HEADS if own.get(key) is not None}
    queries = {key: value for key, value in counts.items() if key != _GROUPS}
    if size is None or other is None or not all(isinstance(value, int) for value in counts.values()):
        return config, base, recipe
    if any(_OTHER_HEADS.fullmatch(key) and key not in configs.HEAD_SIZES for key, x in own.items() if x):
        return config, base, recipe
    there = base.to_dict()
    per_group = (
        {
            sides[key] // sides.get(_GROUPS, sides[key])
            for sides in (own | counts, there)
            for key in queries
            if sides.get(key)
        }
        if own.get(_GROUPS)
        else {1}
    )
    few, many = min(per_group), max(per_group)
    least = min(few, 2)
    cut_per_group = {many: min(many, 2 * least), few: least}
    sizes = [d for d in range(min(HEAD_SIZE, size), size) if d % 2 == 0 and _turns(own, d)]
    fixed_heads = math.lcm(*cut_per_group.values()) * 2
    changed = []
    for model, keys, head in ((config, own, size), (base, there, other)):
        changes: dict[str, Any] = {}
        for key in queries:
            if size != other:
                heads = min(fixed_heads, keys[key])
            else:
                heads = next((keys[key] * head // d for d in sizes if keys[key] * head % d == 0), keys[key])
            changes[key] = heads
            new = keys[key] * head // heads
            changes |= {name: new for name in configs.HEAD_SIZES if isinstance(keys.get(name), int)}
            if isinstance(keys.get(_GROUPS), int):
                as_base = own[_GROUPS] == there.get(_GROUPS) and own[key] != there.get(key)
                changes[_GROUPS] = (
                    min(keys[_GROUPS], 2) if as_base else heads // cut_per_group[keys[key] // keys[_GROUPS]]
                )
        small = copy.deepcopy(model)
        for key, value in changes.items():
            setattr(small, key, value)
        changed.append((small, changes))
    (small, _), (small_base, of_base) = changed
    return small, small_base, _with_base(recipe, of_base, there)


def _turns(own: Mapping[str, Any], head_size: int) -> bool:
    """Returns whether rotary embeddings of a part of each head turn whole pairs."""
    rope = own.get("rope_parameters") or {}
    part = own.get("partial_rotary_factor") or own.get("rotary_pct") or rope.get("partial_rotary_factor") or 1.0
    rotated = int(head_size * part)
    return rotated > 0 and rotated % 2 == 0


def _with_base(recipe: Recipe, changes: Mapping[str, Any], there: Mapping[str, Any]) -> Recipe:
    assert isinstance(recipe.base, HuggingFaceBase)
    known = {key: value for key, value in changes.items() if key in there}
    return recipe.model_copy(update={"base": recipe.base.model_copy(update=known)})


def _shallow(
    config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe
) -> tuple[PretrainedConfig, PretrainedConfig, Recipe]:
    """With few layers, of which every kind that configuration and recipe tell apart is there."""
    own = config.to_dict()
    depths = {key: own[key] for key in configs.DEPTHS if isinstance(own.get(key), int)}
    if not depths:
        return config, base, recipe
    deepest = max(depths.values())
    periods = [value for key, value in own.items() if _PERIODS.fullmatch(key) and isinstance(value, int)]
    lists = {key: value for key, value in own.items() if isinstance(value, list | tuple) and len(value) == deepest}
    count = max([DEPTH, *(period for period in periods if period <= deepest)])
    count = max(count, 1 + (own.get("first_k_dense_replace") or 0))
    for value in lists.values():
        count = max([count, *(value.index(item) + 1 for item in value)])
    if count >= deepest or _names_layers(recipe):
        return config, base, recipe
    there = base.to_dict()
    changes: dict[str, Any] = {key: min(value, count) for key, value in depths.items()}
    changes |= {key: list(value[:count]) for key, value in lists.items()}
    of_base = {key: value for key, value in changes.items() if there.get(key) is not None}
    if recipe.parametrization.depth is not None and any(there.get(key) != own[key] for key in depths):
        # Depths that differ still do, so that the rule has something to say.
        fewer = max(1, count // 2)
        of_base |= {key: min(of_base[key], fewer) for key in depths if key in of_base}
        of_base |= {key: of_base[key][:fewer] for key in lists if key in of_base}
    changed = []
    for model, values in ((config, changes), (base, of_base)):
        small = copy.deepcopy(model)
        for key, value in values.items():
            setattr(small, key, value)
        changed.append(small)
    return changed[0], changed[1], _with_base(recipe, of_base, there)


def depth_of(config: PretrainedConfig) -> int:
    """Returns how many layers there are, of the deepest stack."""
    own = config.to_dict()
    return max([own[key] for key in configs.DEPTHS if isinstance(own.get(key), int)], default=0)


def of_full_depth(
    model_class: Any, config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe
) -> tuple[Callable[[int], nn.Module], Recipe, list[int]]:
    """Returns a factory of narrow models of all layers, their recipe, and how wide they can be."""
    small, small_base, own = config, base, recipe
    with contextlib.suppress(*_NOT_BUILT):
        found = _with_small_heads(config, base, recipe)
        with torch.device("meta"), configs.quiet():
            model_class(at_width(found[0], found[1], widths_for(found[0], found[1], 1)[0]))
        small, small_base, own = found
    small, own = with_few_tokens(small, small_base, own)
    widths = widths_for(small, small_base, 4)
    own = with_narrow_base(own, at_width(small, small_base, widths[0]), growing_keys(small, small_base))

    def factory(width: int) -> nn.Module:
        with configs.quiet():
            model: nn.Module = model_class(at_width(small, small_base, width))
        return model

    return factory, own, widths


def _names_layers(recipe: Recipe) -> bool:
    """Returns whether a pattern of the recipe means some layers alone: all of them are trained then."""
    return any(re.search(r"\.[\d\[?]", own.match) for own in recipe.per_parameter)


def with_few_tokens(
    config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe
) -> tuple[PretrainedConfig, Recipe]:
    """Target and recipe with a small vocabulary, few positions and no dropout."""
    assert isinstance(recipe.base, HuggingFaceBase)
    own = config.to_dict()
    changes: dict[str, Any] = {key: min(own[key], 2 * SEQUENCE) for key in _POSITIONS if isinstance(own.get(key), int)}
    vocabulary = own.get("vocab_size")
    if isinstance(vocabulary, int):
        changes["vocab_size"] = min(vocabulary, VOCABULARY)
    small = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(small, key, value)
    for key, value in own.items():
        if _DROPOUT.fullmatch(key) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(small, key, 0.0)
        if key.endswith("_token_id") and isinstance(value, int) and value >= changes.get("vocab_size", value + 1):
            setattr(small, key, 0)
    there = base.to_dict()
    at_base = {key: min(value, there[key]) for key, value in changes.items() if isinstance(there.get(key), int)}
    cut_base = recipe.base.model_copy(update=at_base)
    return small, recipe.model_copy(update={"base": cut_base})


def with_narrow_base(recipe: Recipe, narrowest: PretrainedConfig, grown: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with a base that is as wide as the narrowest model."""
    own = narrowest.to_dict()
    base = recipe.base.model_copy(update={key: own[key] for key in grown})
    return recipe.model_copy(update={"base": base})


def drops(config: PretrainedConfig) -> bool:
    """Returns whether a configuration has any dropout."""
    return any(
        _DROPOUT.fullmatch(key) and isinstance(value, int | float) and value > 0
        for key, value in config.to_dict().items()
    )
