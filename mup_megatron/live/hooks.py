"""Forward factors at the plan's sites: put there as hooks, and read back.

Hooks survive wrapping, recomputation and every parallel layout, and act in inference too. Nothing is hooked where the
model itself does what a site says, so that a plan at its base leaves a model as it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mup_megatron.theory import Acts, Site

Hooks = list[tuple[Acts, float]]
"""(what is scaled, factor) of each hook of a module or of its branch, those on its input first."""


@dataclass(frozen=True, slots=True)
class ScaledInput:
    """Forward pre-hook: multiplies a module's input, and so its weight but not its bias."""

    factor: float

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the module's arguments with the first one scaled."""
        return (args[0] * self.factor, *args[1:])


@dataclass(frozen=True, slots=True)
class ScaledOutput:
    """Forward hook: multiplies a module's output."""

    factor: float

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Returns the module's output, scaled."""
        return output * self.factor


def wanted(sites: Iterable[Site]) -> dict[str, Hooks]:
    """Returns the hooks that sites ask for, by the name of the module; none where the model does it by itself."""
    asked: dict[str, Hooks] = {}
    for site in sites:
        if site.acts is not Acts.SCALE and site.changes:
            asked.setdefault(site.module, []).append((site.acts, site.factor / site.stock))
    return {name: sorted(hooks, key=lambda hook: hook[0] is not Acts.INPUT) for name, hooks in asked.items()}


def attach(modules: Mapping[str, torch.nn.Module], sites: Iterable[Site]) -> None:
    """Puts the factors of sites at those of their modules that are here, by the names that the sites have for them.

    Not those of branches that are no module's output: how a layer adds them is its framework's.
    """
    for name, hooks in wanted(sites).items():
        if name not in modules:
            continue
        for acts, factor in hooks:
            if acts is Acts.OUTPUT:
                modules[name].register_forward_hook(ScaledOutput(factor))
            elif acts is Acts.INPUT:
                modules[name].register_forward_pre_hook(ScaledInput(factor))


def found(module: torch.nn.Module) -> Hooks:
    """Returns the hooks of ours that a module has."""
    before = [(Acts.INPUT, h.factor) for h in module._forward_pre_hooks.values() if isinstance(h, ScaledInput)]
    after = [(Acts.OUTPUT, h.factor) for h in module._forward_hooks.values() if isinstance(h, ScaledOutput)]
    return before + after
