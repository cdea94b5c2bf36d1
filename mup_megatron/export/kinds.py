"""The kinds of checkpoint that there are, and which of them is at a path. Nobody else asks which one it is.

Importing it imports Megatron: the CPU runtime has to come before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mup_megatron.errors import InputError
from mup_megatron.export import megatron_lm, trained
from mup_megatron.export.folded_megatron_lm import fold_megatron_lm, unfold_megatron_lm
from mup_megatron.export.folding import Rewritten
from mup_megatron.export.weights import Source
from mup_megatron.recipe import Recipe
from mup_megatron.training.checkpoint import TRACKER


class Opens(Protocol):
    """Opens a checkpoint of a kind."""

    def __call__(self, path: Path, recipe: Recipe, *, recipe_source: str) -> Source:
        """Returns the trained model. Raises InputError if it is damaged, or of another recipe; names the file."""
        ...


class Rewrites(Protocol):
    """Writes a checkpoint once more in its own format, folded or with its folds taken out."""

    def __call__(self, path: Path, to: Path, recipe: Recipe, *, recipe_source: str) -> Rewritten:
        """Returns what was done. Raises InputError if it cannot be done exactly, or written; `to` is not there then."""
        ...


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of checkpoint."""

    name: str
    """Of what saves it, for messages."""
    is_at: Callable[[Path], bool]
    """Whether one is at a path, by the names of files."""
    open: Opens
    fold: Rewrites | None = None
    """None where it cannot be done."""
    unfold: Rewrites | None = None


KINDS: Sequence[Kind] = (
    Kind(
        name="Megatron-LM",
        is_at=megatron_lm.is_at,
        open=megatron_lm.open_megatron_lm,
        fold=fold_megatron_lm,
        unfold=unfold_megatron_lm,
    ),
    Kind(
        name="`mup-megatron train`",
        is_at=trained.is_at,
        open=trained.open_trained,
        fold=trained.fold_trained,
        unfold=trained.unfold_trained,
    ),
)
"""In the order in which they are looked for."""


def kind_at(path: Path) -> Kind:
    """Returns the kind of the checkpoint at a path.

    Raises:
        InputError: there is none.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder. Give that of a run's checkpoints.")
    found = next((each for each in KINDS if each.is_at(path)), None)
    if found is None:
        known = ", ".join(each.name for each in KINDS)
        raise InputError(
            f"{path}: no checkpoint there ({TRACKER} is missing). Give the folder of a run's checkpoints ({known})."
        )
    return found


def open_source(path: Path, recipe: Recipe, *, recipe_source: str) -> Source:
    """Returns the trained model of a checkpoint of any kind; its weights are not read yet.

    Args:
        path: the folder of a run's checkpoints, whose last one is meant; or that of one checkpoint.
        recipe: the run's.
        recipe_source: what the recipe is called in messages.

    Raises:
        InputError: there is none, it is damaged, or of another recipe; names the file.
    """
    return kind_at(path).open(path, recipe, recipe_source=recipe_source)


def rewrite(path: Path, to: Path, recipe: Recipe, *, recipe_source: str, back: bool) -> Rewritten:
    """Writes a checkpoint of any kind once more in its format, folded; or with its folds taken out.

    Args:
        path: as for `open_source`.
        to: a folder that is not there yet, or empty.
        recipe: the run's.
        recipe_source: what the recipe is called in messages.
        back: True to take them out.

    Raises:
        InputError: it cannot be done exactly, or written.
    """
    kind = kind_at(path)
    way = kind.unfold if back else kind.fold
    if way is None:
        raise InputError(
            f"{path}: a checkpoint of {kind.name}, which cannot be {'unfolded' if back else 'folded'}. Make a model of "
            "transformers of it with `mup-megatron export`."
        )
    return way(path, to, recipe, recipe_source=recipe_source)
