"""Layers that are alike: without values, what one of them computes is what the next one would.

A deep model's forward pass on the meta device is mostly one layer again and again. Two layers are alike if all of their
modules have the same classes, shapes, settings and hooks, but for the layer's own number and what its buffers hold.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, cast

import torch

_SETTINGS = (bool, int, float, str, type(None))
_NUMBER = frozenset({"layer_idx", "layer_id", "layer_number"})


@contextlib.contextmanager
def once(model: torch.nn.Module, state_of: Callable[[torch.Tensor], Hashable]) -> Iterator[None]:
    """Within it each of a list's modules gives, of an input alike, the output that one alike has given.

    Args:
        model: on the meta device.
        state_of: what is known of a tensor beside its shape, on which an output depends.
    """
    given: dict[Hashable, Any] = {}
    changed = []
    for module in list(model.modules()):
        if isinstance(module, torch.nn.ModuleList):
            for child in module:
                if "forward" not in vars(child):
                    child.forward = _remembering(child.forward, _kind_of(child), given, state_of)
                    changed.append(child)
    try:
        yield
    finally:
        for child in changed:
            del child.forward


def _remembering(
    forward: Callable[..., Any],
    kind: Hashable,
    given: dict[Hashable, Any],
    state_of: Callable[[torch.Tensor], Hashable],
) -> Callable[..., Any]:
    def remembering(*args: Any, **kwargs: Any) -> Any:
        key = kind, _shape_of(args, state_of), _shape_of(kwargs, state_of)
        if key not in given:
            given[key] = forward(*args, **kwargs)
        return given[key]

    return remembering


def _kind_of(module: torch.nn.Module) -> Hashable:
    """Returns what layers that are alike have in common."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return (
        type(module),
        tuple((key, _setting(value)) for key, value in vars(module).items() if key not in _NUMBER),
        tuple(
            getattr(hook, "__code__", id(hook))
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        ),
        tuple((name, tuple(tensor.shape)) for name, tensor in tensors),
        tuple((name, _kind_of(child)) for name, child in module.named_children()),
    )


def _setting(value: Any) -> Hashable:
    """Returns a setting, or several, as they are; of what is none only that."""
    if isinstance(value, list | tuple):
        return tuple(map(_setting, value))
    if isinstance(value, _SETTINGS):
        return cast("Hashable", value)
    return type(value).__qualname__


def _shape_of(value: Any, state_of: Callable[[torch.Tensor], Hashable]) -> Hashable:
    """Returns what an output depends on without values."""
    match value:
        case torch.Tensor():
            return tuple(value.shape), value.dtype, state_of(value)
        case list() | tuple():
            return tuple(_shape_of(each, state_of) for each in value)
        case dict():
            return tuple((key, _shape_of(each, state_of)) for key, each in value.items())
        case _ if isinstance(value, _SETTINGS):
            return value
    return id(value)
