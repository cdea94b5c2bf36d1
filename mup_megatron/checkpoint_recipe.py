"""The recipe that a checkpoint was trained with, as the checkpoint carries it: text within, and a file beside it.

Where in a checkpoint the text is, and what follows from it, is the adapters' affair.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.recipe import Recipe, recipe
from mup_megatron.validation import brief

SIDECAR = "mup.recipe.yaml"
"""Name of the file, which is for people, and for a launcher that must not load a checkpoint."""


def packed(given: Recipe) -> str:
    """Returns a recipe as text: plain in every format, and nothing of this package is needed to read it."""
    return json.dumps(given.model_dump(mode="json"))


def unpacked(text: Any, *, source: str) -> Recipe:
    """Returns the recipe of `packed`.

    Args:
        text: what the checkpoint has in its place.
        source: what it is called in an error.

    Raises:
        InputError: it cannot be read.
    """
    try:
        content = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{source} cannot be read ({brief(error)}). Use another one.") from None
    return recipe(content, source=source)


def write_sidecar(folder: Path, given: Recipe) -> str | None:
    """Puts the recipe into a folder of checkpoints.

    Returns why that could not be done. It is no reason to end a run: the recipe is in the checkpoint as well.
    """
    try:
        write_atomically(folder / SIDECAR, given.to_yaml())
    except (InputError, OSError) as error:
        return str(error)
    return None


def differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) of whatever makes two recipes different runs."""
    # As the fingerprint sees them: the tuning's run counts for values that are moved from it.
    left, right = (dict(_flat(r.model_dump(mode="json", exclude=set(r.not_of_the_run)))) for r in (before, now))
    for key in {**left, **right}:
        if left.get(key) != right.get(key):
            yield key, left.get(key), right.get(key)


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content
