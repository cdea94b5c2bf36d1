"""Who looks on while Megatron-LM's loop trains: `--mup-observe MODULE:ARGUMENT`. Knows nothing of what is looked for.

The module has a function `observe(argument, scene)` that gives an `Observer`. It is called on every rank once model and
optimizer stand, and what it gives before and after each iteration.
"""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A run that is set up, for an observer to look at."""

    chunks: Sequence[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    model: ModelFile
    recipe: Recipe
    values: argparse.Namespace
    """Megatron's arguments."""


class Observer(Protocol):
    """Called on every rank, in the same order."""

    def stepping(self, iterators: Any) -> Any:
        """An iteration is about to begin; returns the iterators of data that it reads, those given or others."""

    def stepped(self, losses: Mapping[str, Any]) -> None:
        """An iteration is over; the losses are those of Megatron's log, on the last pipeline stage alone."""


def observer(wanted: str, scene: Scene) -> Observer:
    """Begins to observe.

    Args:
        wanted: MODULE:ARGUMENT, as `--mup-observe` takes it.
        scene: what there is to look at.

    Raises:
        InputError: there is no such module, or it cannot observe.
    """
    name, colon, argument = wanted.partition(":")
    try:
        observe = importlib.import_module(name).observe if colon else None
    except (ImportError, AttributeError) as error:
        raise InputError(f"--mup-observe {wanted}: {error}. Give a module with a function `observe`.") from None
    if observe is None:
        raise InputError(f"--mup-observe {wanted}: not of the form MODULE:ARGUMENT.")
    return cast("Observer", observe(argument, scene))
