"""The mark in the configuration of a saved model: the plan that it was trained with.

Multipliers and the scale of attention live in the process. A model that is loaded without them is another function, so
its configuration says that it has them. Hugging Face's configurations keep keys that they do not know.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.modules.names import unwrapped
from mup_megatron.validation import brief

KEY = "mup_megatron"


def marker(fingerprint: str, softmax_scale: float | None, multipliers: Mapping[str, float]) -> dict[str, Any]:
    """Returns the mark as it is written.

    Args:
        fingerprint: of the recipe.
        softmax_scale: of attention; None where it keeps the library's.
        multipliers: of weights, by their names, where they are not 1.
    """
    return {"fingerprint": fingerprint, "softmax_scale": softmax_scale, "multipliers": dict(multipliers)}


@dataclass(frozen=True, slots=True)
class Mark:
    """The mark that a configuration has."""

    fingerprint: str
    softmax_scale: float | None
    multipliers: Mapping[str, float]

    @property
    def changes_function(self) -> bool:
        """True where the weights are another function without what it names."""
        return self.softmax_scale is not None or bool(self.multipliers)

    def difference(self, softmax_scale: float | None, multipliers: Mapping[str, float]) -> str | None:
        """Says in what a plan with these differs, in a sentence; None where the weights are one function with both."""
        if not _same(self.softmax_scale, softmax_scale):
            return f"attention's scale was {_shown(self.softmax_scale)} and is {_shown(softmax_scale)}"
        for name in (*self.multipliers, *multipliers):
            one, other = self.multipliers.get(name, 1.0), multipliers.get(name, 1.0)
            if not _same(one, other):
                return f"the multiplier of {brief(name, 60)} was {one:g} and is {other:g}"
        return None


def _same(one: float | None, other: float | None) -> bool:
    return one is other if one is None or other is None else math.isclose(one, other, rel_tol=1e-6)


def _shown(scale: float | None) -> str:
    return "the library's" if scale is None else f"{scale:g}"


def marked(model: torch.nn.Module) -> Mark | None:
    """Returns the mark of a loaded model's configuration; None where it has none.

    Raises:
        InputError: what stands there was not written by this package.
    """
    return mark_of(getattr(getattr(unwrapped(model), "config", None), KEY, None), source="the model's configuration")


def mark_of(found: Any, *, source: str) -> Mark | None:
    """Returns what stands under KEY in a configuration; None where nothing does.

    Raises:
        InputError: it was not written by this package; `source` names the configuration.
    """
    if found is None:
        return None
    content = found if isinstance(found, Mapping) else {}
    fingerprint = content.get("fingerprint")
    if not isinstance(fingerprint, str):
        raise InputError(f"{KEY} in {source} has no fingerprint. Restore it, or take the key out.")
    scale, multipliers = content.get("softmax_scale"), content.get("multipliers", {})
    if not (
        (scale is None or _is_number(scale))
        and isinstance(multipliers, Mapping)
        and all(map(_is_number, multipliers.values()))
    ):
        raise InputError(
            f"{KEY} in {source}: softmax_scale must be a number or null, and multipliers an object of numbers. Restore "
            "it, or take the key out."
        )
    return Mark(fingerprint, scale, {str(name): factor for name, factor in multipliers.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
