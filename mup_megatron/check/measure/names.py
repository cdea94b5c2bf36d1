"""The modules of a live model that an architecture has measured, by name. And which layer something is in."""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mup_megatron.architectures.measured import Kind, Measured

if TYPE_CHECKING:
    from torch import nn

    from mup_megatron.check.measure.trainee import At

_LAYER = re.compile(r"(?:^|(?<=\.))layers\.(\d+)(?=\.|$)")


def watched_modules(
    modules: Iterable[tuple[str, "nn.Module"]], measured: Iterable[Measured]
) -> Iterator[tuple[str, "nn.Module", "At"]]:
    """Yields those of (global name, module) that are measured, and where each of them is looked at."""
    kinds = {each.module: each.kind for each in measured}
    for name, module in modules:
        if name in kinds:
            yield name, module, "masked input" if kinds[name] is Kind.LOGITS else "output"


def layer_of(name: str) -> int | None:
    """Returns the layer that a parameter or module is in."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def in_layer(name: str, layer: int | str) -> str:
    """Returns the name of the same in another layer, or in several, as `layers.0-3`; as it is for what is in none."""
    return _LAYER.sub(f"layers.{layer}", name, count=1)
