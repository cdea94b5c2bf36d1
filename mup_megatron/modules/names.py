"""Names of parameters and modules without what wrappers put into them.

`torch.compile`, data parallelism, FSDP, activation checkpointing and DeepSpeed's engine stand around a module, or
around a part of it, and each adds a word to the names of what is inside. A plan has the names without. Wrappers are
known by what they are, so that a module of one's own may be called `module`, or `_orig_mod` beside others.
"""

import itertools
import sys
from collections.abc import Container, Iterator
from typing import Any

import torch

_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What `torch.compile`, FSDP and activation checkpointing call the module that they hold."""
_WRAPPERS = ("OptimizedModule", "FullyShardedDataParallel", "ActivationWrapper")
"""Their classes, by name: to import them takes long."""
_MODULE = "module"
"""So data parallelism and engines call it; and anybody may."""


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model inside all of its wrappers."""
    while (attribute := _inner(model)) is not None:
        model = getattr(model, attribute)
    return model


def named_parameters(model: torch.nn.Module, *, shared: bool = False) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields a module's parameters without wrappers' words; with `shared`, each under all of its names."""
    inside = _insides(model)
    for name, parameter in model.named_parameters(remove_duplicate=not shared):
        yield _plain(name, inside), parameter


def named_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a module's buffers by their names without wrappers' words."""
    inside = _insides(model)
    for name, buffer in model.named_buffers():
        yield _plain(name, inside), buffer


def named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields a module's modules by their names, without wrappers and their words."""
    inside = _insides(model)
    for name, module in model.named_modules():
        if _inner(module) is None:
            yield _plain(name, inside), module


def planned_name(name: str, planned: Container[str]) -> str | None:
    """Returns the planned one that a live name stands for, where the module itself is not at hand.

    None where it stands for none of them, or might for several.
    """
    if name in planned:
        return name
    words = name.split(".")
    places = [index for index, word in enumerate(words) if word == _MODULE or word in _INNER]
    found = set()
    for count in range(len(places) + 1):
        for dropped in itertools.combinations(places, count):
            candidate = ".".join(word for index, word in enumerate(words) if index not in dropped)
            if candidate in planned:
                found.add(candidate)
    return found.pop() if len(found) == 1 else None


def _inner(module: Any) -> str | None:
    """Returns the name under which a wrapper holds what is inside; None for any other module."""
    held = module._modules
    if _MODULE in held and isinstance(module, _holders()):
        return _MODULE
    # A wrapper has nothing but what it wraps, or is one of torch's to which somebody has added something.
    alone = len(held) == 1 and not module._parameters
    known = alone or any(kind.__name__ in _WRAPPERS for kind in type(module).__mro__)
    return next((name for name in _INNER if name in held), None) if known else None


def _holders() -> tuple[type, ...]:
    engine = sys.modules.get("deepspeed.runtime.engine")
    own = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel)
    return own if engine is None else (*own, engine.DeepSpeedEngine)


def _insides(model: torch.nn.Module) -> frozenset[str]:
    """Returns the full names of what wrappers hold."""
    return frozenset(
        f"{name}.{inner}" if name else inner
        for name, module in model.named_modules(remove_duplicate=False)
        if (inner := _inner(module)) is not None
    )


def _plain(name: str, insides: frozenset[str]) -> str:
    if not insides:
        return name
    words = name.split(".")
    return ".".join(word for index, word in enumerate(words) if ".".join(words[: index + 1]) not in insides)
