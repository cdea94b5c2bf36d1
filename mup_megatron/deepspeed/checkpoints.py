"""Which recipe a checkpoint of DeepSpeed's engine was trained with. Neither loads nor saves one.

The recipe travels in the client state, which every rank's file of model states holds and which the conversion to a
universal checkpoint copies. A copy for people lies in the checkpoint's folder.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.recipe import Recipe, recipe

SIDECAR = "mup.recipe.yaml"
KEY = "mup"
"""In the client state."""


@dataclass(frozen=True)
class Origin:
    """What a checkpoint says of the recipe that it was trained with."""

    folder: Path
    recipe: Recipe | None
    """None: plain DeepSpeed."""


def client_state(given: Recipe) -> dict[str, Any]:
    """What goes into the client state. As text, so that nothing of this package is needed to read it."""
    return {KEY: {"fingerprint": given.fingerprint, "recipe": json.dumps(given.model_dump(mode="json"))}}


def origin(load_dir: str | Path, tag: str | None, *, universal: bool) -> Origin | None:
    """The recipe of the checkpoint that is about to be loaded; None where there is no checkpoint.

    Raises:
        InputError: it has a recipe that cannot be read.
    """
    folder = _folder(Path(load_dir), tag, universal=universal)
    states = sorted(folder.glob("*mp_rank_*model_states.pt")) if folder is not None else []
    if folder is None or not states:
        return None  # DeepSpeed says so better
    # Mapped, not read: of the weights only their sizes are looked at.
    content = torch.load(states[0], map_location="cpu", mmap=True, weights_only=False).get(KEY)
    if content is None:
        return Origin(folder, None)
    try:
        values = json.loads(content["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: the checkpoint's recipe cannot be read ({error}). Use another one.") from None
    return Origin(folder, recipe(values, source=f"{folder}: the checkpoint's recipe"))


def _folder(load_dir: Path, tag: str | None, *, universal: bool) -> Path | None:
    if tag is not None:
        return load_dir / str(tag)
    latest = load_dir / ("latest_universal" if universal else "latest")
    return load_dir / latest.read_text(encoding="utf-8").strip() if latest.is_file() else None


def require_same(found: Origin, wanted: Recipe, *, accept: bool, optimizer: bool) -> None:
    """Raises InputError unless a checkpoint is of the run's recipe, or the change is accepted.

    Args:
        found: the checkpoint's.
        wanted: the run's.
        accept: the entry accepts a change.
        optimizer: the optimizer's state is to be loaded, not the weights alone.
    """
    if found.recipe is None:
        # Its optimizer has other groups, so its state cannot be taken over whatever is accepted.
        if optimizer:
            raise InputError(
                f"{found.folder}: the checkpoint was trained without a recipe, so its optimizer has other groups than "
                "the plan. Take the weights alone with load_module_only=True, or begin anew."
            )
        return
    if accept or found.recipe.fingerprint == wanted.fingerprint:
        return
    differences = ", ".join(
        f"{key} {before} there and {now} here" for key, before, now in _differences(found.recipe, wanted)
    )
    raise InputError(
        f"{found.folder}: the checkpoint was trained with another recipe ({differences}). Give its recipe ({SIDECAR} "
        'in that folder), or accept the change with "accept_recipe_change": true in "mup".'
    )


def require_plain(found: Origin) -> None:
    """Raises InputError if an engine without the entry would go on training from a checkpoint of a recipe."""
    if found.recipe is not None:
        raise InputError(
            f"{found.folder}: the checkpoint was trained with a recipe, and without it every parameter would go on "
            f'with another learning rate and scale. Write "mup": {{"recipe": "{found.folder / SIDECAR}"}} into the '
            "configuration."
        )


def write_sidecar(folder: Path, given: Recipe) -> str | None:
    """Puts the recipe into a checkpoint's folder. Returns why that could not be done: no reason to end a run."""
    try:
        write_atomically(folder / SIDECAR, given.to_yaml())
    except (InputError, OSError) as error:
        return str(error)
    return None


def _differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    left, right = (dict(_flat(r.model_dump(mode="json", exclude={"training", "provenance"}))) for r in (before, now))
    for key in {**left, **right}:
        if left.get(key) != right.get(key):
            yield key, left.get(key), right.get(key)


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content
