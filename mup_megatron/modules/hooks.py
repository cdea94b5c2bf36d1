"""Multipliers as forward hooks: they survive wrapping, recomputation and every parallel layout, and act in inference
too.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ScaledInput:
    """Forward pre-hook: multiplies a module's input, and so its weight but not its bias."""

    factor: float

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The module's arguments with the first one scaled."""
        return (args[0] * self.factor, *args[1:])


@dataclass(frozen=True, slots=True)
class ScaledOutput:
    """Forward hook: multiplies a module's output."""

    factor: float

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """The module's output, scaled."""
        return output * self.factor
