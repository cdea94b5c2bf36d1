"""The recipe that a checkpoint of DeepSpeed's engine was trained with. Neither loads nor saves one.

The recipe travels in the client state, which every rank's file of model states holds and which the conversion to a
universal checkpoint copies. A copy for people lies in the checkpoint's folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mup_megatron.checkpoint_recipe import SIDECAR, differences, packed, unpacked
from mup_megatron.errors import InputError
from mup_megatron.files import read_text
from mup_megatron.recipe import Recipe
from mup_megatron.unpickling import read_plain_values

KEY = "mup_megatron"
"""In the client state, which is the user's: so it is not the entry's short name."""
_COMPUTES = "computes"


@dataclass(frozen=True)
class CheckpointRecipe:
    """The recipe that a checkpoint was trained with."""

    folder: Path
    recipe: Recipe | None
    """None: plain DeepSpeed."""
    computes: Mapping[str, Any] = field(default_factory=dict)
    """What its weights do not show of what the model computes, where an adapter knew it."""


def client_state(given: Recipe, computes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the part of a client state that carries a recipe.

    Args:
        given: the run's.
        computes: what weights do not show of what the model computes, in plain values.
    """
    more = {_COMPUTES: dict(computes)} if computes else {}
    return {KEY: {"fingerprint": given.fingerprint, "recipe": packed(given), **more}}


def recipe_of_checkpoint(load_dir: str | Path, tag: str | None, *, universal: bool) -> CheckpointRecipe | None:
    """Returns the recipe of the checkpoint that is about to be loaded; None where there is no checkpoint.

    Raises:
        InputError: it cannot be read, or its recipe.
    """
    folder = _folder(Path(load_dir), tag, universal=universal)
    states = sorted(folder.glob("*mp_rank_*model_states.pt")) if folder is not None else []
    if folder is None or not states:
        return None  # DeepSpeed says so better
    content = _client_state(states[0])
    if content is None:
        return CheckpointRecipe(folder, None)
    own = content if isinstance(content, dict) else {}
    recipe = unpacked(own.get("recipe"), source=f"{folder}: the checkpoint's recipe")
    computes = own.get(_COMPUTES)
    return CheckpointRecipe(folder, recipe, computes if isinstance(computes, dict) else {})


def _client_state(states: Path) -> Any:
    """Returns what stands under our key in a file of model states, which is plain.

    Beside it the user's own client state may be anything, and DeepSpeed unpickles the file afterwards whatever it asks
    for: this looks at it before, and neither refuses nor runs any of it.
    """
    content = read_plain_values(states, remedy="Use another checkpoint.")
    if not isinstance(content, Mapping):
        raise InputError(f"{states}: not a file of DeepSpeed's model states. Use another checkpoint.")
    return content.get(KEY)


def _folder(load_dir: Path, tag: str | None, *, universal: bool) -> Path | None:
    if tag is not None:
        return load_dir / str(tag)
    latest = load_dir / ("latest_universal" if universal else "latest")
    if not latest.is_file():
        return None
    return load_dir / read_text(latest, remedy="Write a checkpoint's tag into it.").strip()


def require_same(found: CheckpointRecipe, wanted: Recipe, *, accept: bool, optimizer: bool) -> None:
    """Raises InputError unless a checkpoint is of the run's recipe, or the change is accepted.

    Args:
        found: the checkpoint's.
        wanted: the run's.
        accept: the entry accepts a change.
        optimizer: the optimizer's state is to be loaded, not the weights alone.
    """
    if found.recipe is None:
        # Its optimizer has other groups, so its state cannot be taken over whatever is accepted; and under the plan's
        # multipliers its weights are another function.
        if optimizer or not accept:
            raise InputError(
                f"{found.folder}: the checkpoint was trained without a recipe, so its weights and its optimizer's "
                "groups are not those of the plan. Begin anew, or, if you mean it, take the weights alone with "
                'load_module_only=True and "accept_recipe_change": true in "mup".'
            )
        return
    if accept or found.recipe.fingerprint == wanted.fingerprint:
        return
    listed = ", ".join(f"{key} {before} there and {now} here" for key, before, now in differences(found.recipe, wanted))
    raise InputError(
        f"{found.folder}: the checkpoint was trained with another recipe ({listed}). Give its recipe ({SIDECAR} "
        'in that folder), or accept the change with "accept_recipe_change": true in "mup".'
    )
