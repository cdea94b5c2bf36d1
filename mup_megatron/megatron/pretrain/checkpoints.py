"""The recipe that a Megatron-LM checkpoint was trained with. Neither loads nor saves one; imports nothing of Megatron.

Recipe and fingerprint travel among Megatron's own arguments, which every checkpoint format stores. A copy for people,
and for a launcher that must not load a checkpoint to know, lies in the checkpoint's folder.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mup_megatron import checkpoint_recipe
from mup_megatron.checkpoint_recipe import SIDECAR
from mup_megatron.errors import InputError
from mup_megatron.files import require_ordinary
from mup_megatron.messages import is_first
from mup_megatron.recipe import Recipe

_TRACKER = "latest_checkpointed_iteration.txt"
_FINGERPRINT = "mup_fingerprint"
_CONTENT = "mup_recipe_content"
_FOLDED = "mup_folded"


# ---- whose checkpoint it is ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedRecipe:
    """The recipe that a checkpoint says it was trained with."""

    fingerprint: str | None
    """None: plain Megatron."""
    recipe: Recipe | None
    folded: bool = False
    """Whether its multipliers are in its weights."""


def sign(values: argparse.Namespace, given: Recipe) -> None:
    """Puts a recipe among Megatron's arguments."""
    setattr(values, _FINGERPRINT, given.fingerprint)
    setattr(values, _CONTENT, checkpoint_recipe.packed(given))


def sign_folded(values: argparse.Namespace, *, folded: bool) -> None:
    """Says among a checkpoint's arguments that its multipliers are in its weights, or not any more."""
    if folded:
        setattr(values, _FOLDED, True)
    elif hasattr(values, _FOLDED):
        delattr(values, _FOLDED)


def recipe_within(values: Any) -> SavedRecipe:
    """Returns the recipe among the arguments that a checkpoint was written with.

    Raises:
        InputError: there is one, and it cannot be read.
    """
    fingerprint = getattr(values, _FINGERPRINT, None)
    if fingerprint is None:
        return SavedRecipe(None, None)
    content = getattr(values, _CONTENT, None)
    source = f"the checkpoint's recipe {fingerprint}"
    given = checkpoint_recipe.unpacked(content, source=source)
    return SavedRecipe(fingerprint, given, folded=bool(getattr(values, _FOLDED, False)))


def require_same(found: SavedRecipe, wanted: Recipe, *, accept: bool) -> None:
    """Raises InputError unless a checkpoint is of the run's recipe, or the change is accepted; or if it is folded."""
    if found.folded:
        raise InputError(
            "--load: the checkpoint's multipliers are folded into its weights, where they would act a second time. "
            "Give back the weights that were trained with `mup-megatron unfold`, and load those."
        )
    if accept or found.fingerprint == wanted.fingerprint:
        return
    remedy = "If you mean it, give --mup-accept-recipe-change{}."
    if found.recipe is None:
        raise InputError(
            "--load: the checkpoint was trained without a recipe, so its weights and optimizer are not those of the "
            f"plan; this run's recipe is {wanted.fingerprint}. Begin a new run with an empty --load and --save. "
            f"{remedy.format(' --no-load-optim')}"
        )
    differences = checkpoint_recipe.differences(found.recipe, wanted)
    lines = [f"  {key}: {before} there, {now} here" for key, before, now in differences]
    raise InputError(
        "\n".join(
            [
                f"--load: the checkpoint was trained with another recipe: its fingerprint is {found.fingerprint}, "
                f"this run's is {wanted.fingerprint}. What differs:",
                *lines,
                f"Give the checkpoint's recipe ({SIDECAR} in its folder). {remedy.format('')}",
            ]
        )
    )


def require_matching_optimizer(found: SavedRecipe) -> None:
    """Raises InputError if the optimizer's state would be loaded from a checkpoint of plain Megatron."""
    if found.recipe is None:
        raise InputError(
            "--mup-accept-recipe-change: the checkpoint was trained without a recipe, so its optimizer has other "
            "groups of parameters. Take the weights alone and begin with a new optimizer: add --no-load-optim."
        )


# ---- beside it -----------------------------------------------------------------------------------------------------


def write_sidecar(folder: str | None, given: Recipe) -> str | None:
    """Puts the recipe into a folder of checkpoints, on the first rank.

    Returns why that could not be done. It is no reason to end a run: the recipe is in the checkpoint as well.
    """
    if folder is None or not is_first():
        return None
    return checkpoint_recipe.write_sidecar(Path(folder), given)


def require_plain(words: Sequence[str]) -> None:
    """Raises InputError if a command line without --mup-recipe would go on from a checkpoint of a recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--load")
    parser.add_argument("--pretrained-checkpoint")
    parser.add_argument("--ckpt-step")
    try:
        values, _ = parser.parse_known_args(list(words))
    except SystemExit:  # a flag without its value: Megatron says so better
        return
    for flag, root in (("--load", values.load), ("--pretrained-checkpoint", values.pretrained_checkpoint)):
        beside = _sidecar(Path(root), values.ckpt_step) if root else None
        if beside is not None:
            raise InputError(
                f"{flag} {root}: this checkpoint was trained with a recipe ({beside}), and without it every parameter "
                f"would go on with another learning rate and scale. Give --mup-recipe {beside}."
            )


def _sidecar(root: Path, step: str | None) -> Path | None:
    """Returns the recipe beside the checkpoint that would be loaded, or the one that the folder's last run had."""
    current = _current(root, step)
    folders = [current, root] if current is not None else [root]
    return next((folder / SIDECAR for folder in folders if (folder / SIDECAR).exists()), None)


def _current(root: Path, step: str | None) -> Path | None:
    try:
        if step is None:
            require_ordinary(root / _TRACKER)
        text = step if step is not None else (root / _TRACKER).read_text(encoding="utf-8").strip()
        return root / (text if text == "release" else f"iter_{int(text):07d}")
    except (OSError, ValueError):
        return None  # not a checkpoint, or a damaged one: Megatron says so
