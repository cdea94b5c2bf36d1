"""The models that a Megatron-Core target is checked on: of its architecture, at several small widths.

Every dimension that differs between the recipe's base and the target grows with the width here too; what the two share
(a fixed ffn, a fixed number of key/value groups) stays fixed. The code path is the target's. What no rule depends on
is cut, in base and target alike, to what a quick run can afford: vocabulary, sequence, the size and number of what
stays fixed, and layers (`layers.py`).
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mup_megatron.architectures.families import Size
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, shapes_of
from mup_megatron.check.family.layers import base_layers, in_terms_of, kept_layers, overrides_of_layers
from mup_megatron.check.family.sizes import DEPTH, HEAD_SIZE, SEQUENCE, SMALLEST, VOCABULARY, require_trainable
from mup_megatron.check.measure.optimizers import clamped
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe

WIDEST_BASE = 4096
"""Beyond which no base is looked for."""
BASE = 64
"""How wide the base is at most: the second of the usual widths, so that there are models on both sides of it."""
RATIOS = (0.125, 8.0)
"""Of sizes that grow to the hidden size, in eighths."""


def widths_for(target: ModelFile, recipe: Recipe, count: int, *, tensor_parallel: int = 1) -> list[int]:
    """Returns the hidden sizes of a check: doubling from the least that keeps whole heads and groups, and that so many
    tensor-parallel ranks can share.

    Raises:
        InputError: no models of its shape can be shared so.
    """
    growth = _Growth.of(target, recipe.megatron_base)
    unit = growth.unit
    smallest = -(-SMALLEST // unit) * unit
    for least in range(smallest, smallest + SMALLEST * unit * tensor_parallel, unit):
        widths = [least * 2**i for i in range(count)]
        if not all(growth.is_whole(width) for width in widths):
            continue
        models = models_for(target, recipe, widths)
        with contextlib.suppress(InputError):
            for model in models.values():
                model.require_tensor_parallel(tensor_parallel)
            return widths
    raise InputError(_NOWHERE)


def at_width(target: ModelFile, recipe: Recipe, width: int) -> ModelFile:
    """Returns the target's architecture at another hidden size.

    Raises:
        InputError: it cannot be built at that width; says what would fit.
    """
    growth = _Growth.of(target, recipe.megatron_base)
    if not growth.is_whole(width):
        raise InputError(
            f"--widths {width}: whole heads and groups of the target's kind need a multiple of {growth.unit}. Choose "
            "such widths."
        )
    changes = {
        "hidden_size": width,
        **target.heads(int(growth.heads(width)), size=int(growth.head_size(width)), groups=int(growth.groups(width))),
        **growth.own_sizes(width),
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": min(target.make_vocab_size_divisible_by, 32),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    return architecture_of(target).with_length(target.model_copy(update=changes), SEQUENCE)


@dataclass(frozen=True, kw_only=True)
class _Growth:
    """Says how the dimensions of a target follow its hidden size: those in which it differs from the base grow."""

    base: ModelFile
    target: ModelFile
    heads_grow: bool
    sizes_grow: bool
    groups_grow: bool
    growing: frozenset[str]
    """The keys of the sizes of families that do."""

    @classmethod
    def of(cls, target: ModelFile, base: ModelFile) -> "_Growth":
        # Where the base is as wide, nothing says what stays: all grows but the size of heads, as is usual.
        as_wide = base.hidden_size == target.hidden_size
        sizes_grow = base.head_size != target.head_size
        heads_differ = base.num_attention_heads != target.num_attention_heads
        return cls(
            base=base,
            target=target,
            heads_grow=heads_differ or (as_wide and not sizes_grow),
            sizes_grow=sizes_grow,
            groups_grow=base.query_groups != target.query_groups or (as_wide and not sizes_grow),
            growing=frozenset(
                size.key
                for size in architecture_of(target).sizes(target)
                if size.follows_width and (as_wide or size.of(base) != size.of(target))
            ),
        )

    @property
    def unit(self) -> int:
        """The least hidden size that is whole."""
        return _first_that(self.is_whole, range(1, 64 * WIDEST_BASE))

    def is_whole(self, width: int) -> bool:
        """Returns whether heads and groups are whole at a hidden size, and rotary embeddings possible."""
        if width < 1:
            return False
        heads, size, groups = self.heads(width), self.head_size(width), self.groups(width)
        if not (heads and size and groups):
            return False
        if any(number.denominator != 1 for number in (heads, size, groups, heads / groups)):
            return False
        return _rotates(self.target, int(size)) and (not self.sizes_grow or size % 2 == 0)

    def heads(self, width: int) -> Fraction:
        """Returns the number of attention heads."""
        target = self.target
        if not self.heads_grow:
            return Fraction(target.num_attention_heads)
        if not self.sizes_grow:
            return Fraction(target.num_attention_heads * width, target.hidden_size)
        # Both grow: their size with two doublings of the width, their number with the third. A wrong power of the size
        # has to show at whichever four widths are looked at.
        octaves = math.floor((math.log2(width / self.base.hidden_size) + 1) / 3 + 1e-9)
        return self.base.num_attention_heads * Fraction(2) ** octaves

    def head_size(self, width: int) -> Fraction:
        """Channels of each."""
        target = self.target
        if not self.sizes_grow:
            return Fraction(target.head_size)
        return Fraction(target.num_attention_heads * target.head_size * width, target.hidden_size) / self.heads(width)

    def groups(self, width: int) -> Fraction:
        """Returns the number of heads of keys and values."""
        target = self.target
        if not (self.groups_grow and self.heads_grow):
            return Fraction(target.query_groups)
        return self.heads(width) * target.query_groups / target.num_attention_heads

    def own_sizes(self, width: int) -> dict[str, int]:
        """Returns those of the families, by key."""
        sizes = {size.key: size.of(self.target) or 0 for size in architecture_of(self.target).sizes(self.target)}
        return {
            key: max(1, round(size * width / self.target.hidden_size)) if key in self.growing else size
            for key, size in sizes.items()
        }


def _rotates(model: ModelFile, head_size: int) -> bool:
    """Returns whether rotary embeddings turn whole pairs of the channels of such heads."""
    if model.position_embedding_type != "rope":
        return True
    rotated = int(head_size * model.rotary_percent)
    return rotated > 0 and rotated % 2 == 0


def models_for(target: ModelFile, recipe: Recipe, widths: Sequence[int]) -> dict[int, ModelFile]:
    """Width → model.

    Raises:
        InputError: the target cannot be built at a width, or the widest model is larger than a check can train.
    """
    models = {width: at_width(target, recipe, width) for width in widths}
    widest = models[max(widths)]
    shapes = {".".join(tensor.name.split(".")[-2:]): tensor.shape for tensor in shapes_of(widest, widest)[1].tensors}
    require_trainable(shapes, widest.hidden_size)
    return models


def condensed(
    target: ModelFile, recipe: Recipe, *, tensor_parallel: int = 1, stages: int = 1, depth: int | None = DEPTH
) -> tuple[ModelFile, Recipe]:
    """A target and a recipe's base that differ in what these two differ in, at the least cost: small heads, few groups,
    few layers, and a base that is among the widths of a check.

    What the two share is cut alike in both; what grows keeps its ratio to the hidden size.

    Args:
        target: what is to be trained.
        recipe: with which it is.
        tensor_parallel: ranks that share what stays fixed.
        stages: pipeline stages, virtual ones counted, that share the layers.
        depth: how many layers are left, if there are more, of which every kind that the recipe's patterns tell apart
            comes first; None leaves all.

    Raises:
        InputError: the target has layers of the user's own.
    """
    _require_known(target)
    architecture, recipe = architecture_of(target), in_terms_of(target, recipe)
    target, base = _turning_whole_pairs(target, recipe.megatron_base)
    growth = _Growth.of(target, base)
    cut = _Cut.of(target, base, growth, tensor_parallel)
    base_width = _first_that(cut.fits, [*range(min(base.hidden_size, BASE), 0, -1), *range(BASE, WIDEST_BASE)])
    # So far away that what grows differs for certain.
    width = _first_that(cut.fits, range(64 * base_width, 64 * WIDEST_BASE, base_width))
    small_base, small = cut.model(base, base_width), cut.model(target, width)
    kept = kept_layers(target, recipe, stages, depth)
    overrides = recipe.per_parameter if kept is None else overrides_of_layers(target, recipe, kept)
    layers = target.num_layers if kept is None else len(kept)
    own = base.num_layers
    if own > layers:
        own = layers if base.num_layers == target.num_layers else max(1, layers // 2)
    elif own == layers and base.num_layers != target.num_layers:
        own = max(1, layers // 2)
    own_layers = kept if kept is not None and base.num_layers == target.num_layers else base_layers(base, own)
    small_base = architecture.with_layers(small_base, own_layers)
    small = small if kept is None else architecture.with_layers(small, kept)
    return small, recipe.model_copy(update={"base": small_base, "per_parameter": overrides})


def _require_known(target: ModelFile) -> None:
    """Raises InputError for what the correct runs of a check do not know."""
    if target.custom_tensors:
        raise InputError(
            "custom_tensors: a check has no layers of your own to compare with. Check a model without them; training "
            "compares the live model with the plan in any case."
        )


def _turning_whole_pairs(*models: ModelFile) -> list[ModelFile]:
    """The models with half or all of each head's channels rotary, in whole pairs: no rule depends on how many turn."""
    half = all(model.rotary_percent < 0.75 and model.head_size % 4 == 0 for model in models)
    return [model.model_copy(update={"rotary_percent": 0.5 if half else 1.0}) for model in models]


_NOWHERE = (
    "num_attention_heads, num_query_groups, kv_channels: those of base and target are whole at no width that a check "
    "can train. Choose numbers with common factors, or fewer tensor-parallel ranks."
)


def _first_that(fits: Callable[[int], bool], widths: Iterable[int]) -> int:
    found = next((width for width in widths if fits(width)), None)
    if found is None:
        raise InputError(_NOWHERE)
    return found


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """The smallest numbers that stand for those of base and target; by model where the two differ."""

    growth: _Growth
    head_size: int | None
    """None where it grows."""
    heads: int | None
    """None where their number grows."""
    growing: int
    """Likewise at the base, where both grow."""
    groups: int | None
    """None where their number grows."""
    per_group: Mapping[int, int]
    """Queries of a group, as they are → as they are in the check."""
    own_sizes: Mapping[str, Mapping[int, int]]
    """Of families, those that do not grow: key → as it is → as it is in the check."""

    @classmethod
    def of(cls, target: ModelFile, base: ModelFile, growth: _Growth, tensor_parallel: int) -> "_Cut":
        few, many = sorted(model.num_attention_heads // model.query_groups for model in (base, target))
        least = min(few, 2)
        per_group = {many: min(many, 2 * least), few: least}
        sharing = tensor_parallel * max(per_group.values())
        smallest = min(target.head_size, HEAD_SIZE, max(4, SMALLEST // sharing))
        sizes = range(smallest, target.head_size)
        size = next((d for d in sizes if d % 2 == 0 and _rotates(target, d)), target.head_size)
        shared = tensor_parallel if tensor_parallel > 1 else 2
        groups = None if growth.groups_grow and growth.heads_grow else min(target.query_groups, shared)
        heads = None
        if not growth.heads_grow:
            heads = math.lcm(*per_group.values()) * min(target.query_groups, shared)
        return cls(
            growth=growth,
            head_size=None if growth.sizes_grow else size,
            heads=heads,
            growing=2 * max(2, sharing),
            groups=groups,
            per_group=per_group,
            own_sizes={
                size.key: _cut(size, base, target, tensor_parallel)
                for size in architecture_of(target).sizes(target)
                if size.key not in growth.growing
            },
        )

    def fits(self, width: int) -> bool:
        """Returns whether base and target can both be so wide."""
        return all(self._attention(model, width) is not None for model in (self.growth.base, self.growth.target))

    def model(self, model: ModelFile, width: int) -> ModelFile:
        """Base or target, that wide."""
        found = self._attention(model, width)
        assert found is not None
        heads, size, groups = found
        return model.model_copy(
            update={
                "hidden_size": width,
                **model.heads(heads, size=size, groups=groups),
                **{size.key: self._own_size(size, model, width) for size in architecture_of(model).sizes(model)},
            }
        )

    def _own_size(self, size: Size, model: ModelFile, width: int) -> int:
        now = size.of(model)
        assert now is not None
        if size.key in self.own_sizes:
            return self.own_sizes[size.key][now]
        return max(1, round(clamped(round(8 * now / model.hidden_size) / 8, RATIOS) * width))

    def _attention(self, model: ModelFile, width: int) -> tuple[int, int, int] | None:
        """Heads, their size, groups; None where they are not whole."""
        ratio = Fraction(model.num_attention_heads * model.head_size, model.hidden_size).limit_denominator(8)
        channels = max(ratio, Fraction(1, 8)) * width
        size = self.head_size
        if self.heads is not None:
            heads = Fraction(self.heads)
        elif size is not None:
            heads = channels / size
        else:
            heads = self.growing * Fraction(2) ** math.floor(math.log2(width / BASE) / 2 + 1e-9)
        if size is None:
            if (channels / heads).denominator != 1:
                return None
            size = int(channels / heads)
        per_group = self.per_group[model.num_attention_heads // model.query_groups]
        groups = heads / per_group if self.groups is None else Fraction(self.groups)
        whole = heads >= 1 and groups >= 1 and all(x.denominator == 1 for x in (heads, groups, heads / groups))
        if not whole or size < 1 or not _rotates(model, size) or (self.head_size is None and size % 2):
            return None
        return int(heads), size, int(groups)


def _cut(size: Size, base: ModelFile, target: ModelFile, tensor_parallel: int) -> dict[int, int]:
    """Returns a size that does not grow, as it is → as it is in the check; two that differ do so there."""
    few, many = sorted(value for model in (base, target) if (value := size.of(model)) is not None)
    shared = max(tensor_parallel, size.small // tensor_parallel * tensor_parallel)
    less = min(few, shared)
    times = max(2, min(round(many / few), size.spread))
    return {many: less if many == few else min(many, times * less), few: less}
