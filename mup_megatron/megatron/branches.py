"""The plan's factors of residual branches in a live model: where a layer adds what a branch gives to the stream.

Not a hook of the branch's module: parts of it are called by themselves where experts' communication is overlapped or a
CUDA graph has a part of a layer, and modules, kernels and saved names stay as they are. The layer's own function that
adds (`self_attn_bda`, …) is wrapped, so recomputation, sequence parallelism and a stream in single precision are its
affair as before.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mup_megatron.live.hooks import Hooks
from mup_megatron.theory import Acts, Site

_ADDS = {
    "self_attention": "self_attn_bda",
    "cross_attention": "cross_attn_bda",
    "mlp": "mlp_bda",
    "mixer": "mamba_bda",
}
"""Module of a branch → its layer's attribute that makes the function which adds its output."""


@dataclass(frozen=True, slots=True)
class ScaledBranch:
    """In the place of such an attribute: multiplies output and bias of the branch before they are added."""

    factor: float
    makes: Callable[..., Callable[..., torch.Tensor]]
    """The layer's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Callable[..., torch.Tensor]:
        """Returns the layer's function for these settings, which then adds the scaled branch."""
        add = self.makes(*args, **kwargs)

        def scaled(branch: tuple[torch.Tensor, torch.Tensor | None], *rest: Any, **settings: Any) -> torch.Tensor:
            output, bias = branch
            return add((output * self.factor, None if bias is None else bias * self.factor), *rest, **settings)

        return scaled


def problems(model: Any, modules: Mapping[str, torch.nn.Module], sites: Iterable[Site]) -> list[str]:
    """Returns why the factors of branches cannot act in a model that is not wrapped, by its global names."""
    wanted = _wanted(sites)
    if wanted and getattr(model.config, "inference_fuse_tp_communication", False):
        return [
            "inference_fuse_tp_communication: this inference adds branches to the residual stream inside of a kernel, "
            "without their multiplier. Turn it off."
        ]
    return [
        f"{name}: {type(modules[layer]).__name__} adds this branch by no function of its own that could be told a "
        "multiplier. Use Megatron's own layer, or take residual_multiplier and parametrization.depth out of the recipe."
        for name in wanted
        if (layer := name.rpartition(".")[0]) in modules and _added(modules, name) is None
    ]


def attach(modules: Mapping[str, torch.nn.Module], sites: Iterable[Site]) -> None:
    """Puts the factors of branches into those of their layers that are here, by their global names."""
    for name, factor in _wanted(sites).items():
        makes = _added(modules, name)
        if makes is not None:
            layer, _, branch = name.rpartition(".")
            setattr(modules[layer], _ADDS[branch], ScaledBranch(factor, makes))


def found(modules: Mapping[str, torch.nn.Module], name: str) -> Hooks:
    """Returns the factors of ours with which the layer of a module adds what that gives."""
    factors: Hooks = []
    makes = _added(modules, name)
    while isinstance(makes, ScaledBranch):
        factors.append((Acts.BRANCH, makes.factor))
        makes = makes.makes
    return factors


def _wanted(sites: Iterable[Site]) -> dict[str, float]:
    return {site.module: site.factor / site.stock for site in sites if site.acts is Acts.BRANCH and site.changes}


def _added(modules: Mapping[str, torch.nn.Module], name: str) -> Callable[..., Any] | None:
    """Returns what makes the function that adds a branch; None where there is none, or a module in its place."""
    layer, _, branch = name.rpartition(".")
    makes = getattr(modules.get(layer), _ADDS.get(branch, ""), None)
    return None if makes is None or isinstance(makes, torch.nn.Module) else makes
