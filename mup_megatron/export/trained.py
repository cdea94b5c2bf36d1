"""Checkpoints of `mup-megatron train`, whatever layout the run had. Reading one runs no code.

Importing it imports Megatron: the CPU runtime has to come before.
"""

import re
from pathlib import Path

from mup_megatron.architectures.registry import model_file
from mup_megatron.errors import InputError
from mup_megatron.export.distributed import StoredWeights
from mup_megatron.export.weights import Source
from mup_megatron.recipe import Recipe
from mup_megatron.training import checkpoint, identity, ranks, record

_FOLDER = re.compile(r"iter_(\d{7,})")


def is_at(path: Path) -> bool:
    """Returns whether checkpoints of a training with Megatron-Core may be at a path."""
    return (path / checkpoint.TRACKER).exists() or _FOLDER.fullmatch(path.resolve().name) is not None


def open_trained(path: Path, recipe: Recipe, *, recipe_source: str) -> Source:
    """Returns the trained model in a checkpoint, whose files have been looked at and whose weights are not read yet.

    Args:
        path: the folder of a run's checkpoints, whose last one is meant; or that of one checkpoint.
        recipe: the run's.
        recipe_source: what the recipe is called in messages.

    Raises:
        InputError: there is none, it is damaged, or it is of another recipe; names the file.
    """
    root, iteration = _chosen(path)
    with ranks.process_group("gloo"):
        found = checkpoint.find(root, iteration, extras=record.CHECKPOINTED)
    inside = found.folder / checkpoint.EXTRAS
    run = identity.from_text(found.extras[record.RUN], source=str(inside / record.RUN), remedy=found.remedy)
    if not isinstance(run.get("fingerprint"), str):
        raise InputError(f"{inside / record.RUN}: says no recipe's fingerprint. {found.remedy}")
    if run["fingerprint"] != recipe.fingerprint:
        raise InputError(
            f"{recipe_source}: its fingerprint is {recipe.fingerprint[:12]}…, and {found.folder} was trained with "
            f"another recipe, {run['fingerprint'][:12]}…. Give {checkpoint.EXTRAS}/{record.RECIPE} of that folder."
        )
    model = model_file(run.get("model"), source=f"{inside / record.RUN}: model")
    plan = recipe.plan(model)
    record.require_same_plan(found.extras, recipe, plan, folder=inside, remedy=found.remedy)
    weights = StoredWeights(found.folder, found.metadata, remedy=found.remedy)
    return Source(model=model, plan=plan, weights=weights, described=str(found.folder), folder=found.folder)


def _chosen(path: Path) -> tuple[Path, int]:
    """Returns the folder of a run's checkpoints, and the iteration of the one that is meant."""
    one = _FOLDER.fullmatch(path.resolve().name)
    if one is not None:
        return path.resolve().parent, int(one[1])
    iteration = checkpoint.latest(path)
    assert iteration is not None, path
    return path, iteration
