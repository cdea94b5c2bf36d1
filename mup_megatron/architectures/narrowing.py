"""The same model at a smaller width: heads as they are asked for, all else as the families of its layers say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of


@dataclass(frozen=True, slots=True)
class Rounded:
    """A size that is not exactly in the wider model's ratio to the hidden size, because it has to be whole."""

    key: str
    wider: int
    exact: Fraction
    size: int


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A narrower model, and in what it differs from the wider one in more than width."""

    model: ModelFile
    rounded: Sequence[Rounded]
    notes: Sequence[str]
    """What it has to have less of than the wider one, in sentences."""


def narrowed(model: ModelFile, hidden: int, heads: Mapping[str, int]) -> Narrowed:
    """Returns the model at this hidden size, with these `ModelFile.heads`.

    Widths keep their ratio to the hidden size, as far as they stay whole; counts and ranks are kept.
    """
    architecture, ratio = architecture_of(model), Fraction(hidden, model.hidden_size)
    rounded, notes, sizes = [], [], {}
    for size in architecture.widths(model):
        wider = size.of(model)
        assert wider is not None
        sizes[size.key] = now = max(1, round(wider * ratio))
        if now != wider * ratio:
            rounded.append(Rounded(size.key, wider, wider * ratio, now))
    for size in architecture.sizes(model):
        if size.divides is not None and (wider := size.of(model)) is not None:
            multiple = sizes.get(size.divides, model.value_of(size.divides))
            sizes[size.key] = now = math.gcd(multiple, wider)
            if now != wider:
                notes.append(
                    f"{size.key} {now}, in the target {wider}, which do not divide {size.divides} {multiple}: "
                    f"{size.fewer}."
                )
    changes = {**sizes, **heads, "hidden_size": hidden}
    return Narrowed(model.model_copy(update=changes), rounded, notes)
