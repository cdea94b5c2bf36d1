"""Checkpoints of `mup-megatron train`, whatever layout the run had. Reading one runs no code.

Importing it imports Megatron: the CPU runtime has to come before.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file, shapes_of
from mup_megatron.errors import InputError
from mup_megatron.export.distributed import StoredWeights
from mup_megatron.export.folded_distributed import carries_optimizer, copy_beside, optimizer_told, write_folded
from mup_megatron.export.folding import Folding, Rewritten, folding
from mup_megatron.export.staging import require_free, staged
from mup_megatron.export.weights import Source, require_fingerprint
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, Tensor
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
    return _open(path, recipe, recipe_source=recipe_source).source()


def fold_trained(path: Path, to: Path, recipe: Recipe, *, recipe_source: str) -> Rewritten:
    """Writes a checkpoint with its multipliers in its weights; arguments as for `open_trained`.

    Raises:
        InputError: as `open_trained`; or it cannot be done exactly, or written.
    """
    opened = _open(path, recipe, recipe_source=recipe_source)
    opened.source().require_whole()
    metadata = opened.found.metadata
    made = folding(opened.plan, opened.tensors, optimizer=carries_optimizer(metadata))
    return _rewrite(opened, to, made, back=False)


def unfold_trained(path: Path, to: Path, recipe: Recipe, *, recipe_source: str) -> Rewritten:
    """Writes what `fold_trained` made a folded checkpoint of, to rounding; arguments as for `open_trained`.

    Raises:
        InputError: as `open_trained`; or it is not folded, or has no optimizer's state, or cannot be written.
    """
    opened = _open(path, recipe, recipe_source=recipe_source, folded=True)
    source = opened.found.folder / checkpoint.EXTRAS / checkpoint.FOLDED
    text = opened.found.extras[checkpoint.FOLDED]
    made = Folding.from_text(text, source=str(source), remedy=opened.found.remedy)
    made.require_of(opened.plan, opened.tensors, source=str(source))
    if not made.optimizer:
        raise InputError(
            f"{opened.found.folder}: its optimizer's state was left out when it was folded, and `mup-megatron train` "
            "cannot go on without. Go on from the checkpoint that it was made of."
        )
    return _rewrite(opened, to, made, back=True)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A checkpoint whose run is known."""

    found: checkpoint.Found
    model: ModelFile
    plan: Plan

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The model's, with the parts of those that are fused."""
        _, shape = shapes_of(self.model, self.model)
        return tuple(shape.tensors)

    def source(self) -> Source:
        """Returns the model, whose weights are read one at a time."""
        folder = self.found.folder
        weights = StoredWeights(folder, self.found.metadata, remedy=self.found.remedy)
        return Source(model=self.model, plan=self.plan, weights=weights, described=str(folder), folder=folder)


def _open(path: Path, recipe: Recipe, *, recipe_source: str, folded: bool = False) -> _Opened:
    root, iteration = _chosen(path)
    if folded and not (root / checkpoint.name_of(iteration) / checkpoint.EXTRAS / checkpoint.FOLDED).exists():
        raise InputError(f"{path}: is not folded. Go on with it as it is.")
    extras = (*record.CHECKPOINTED, *([checkpoint.FOLDED] if folded else []))
    with ranks.process_group("gloo"):
        found = checkpoint.find(root, iteration, extras=extras)
    inside = found.folder / checkpoint.EXTRAS
    run = identity.from_text(found.extras[record.RUN], source=str(inside / record.RUN), remedy=found.remedy)
    if not isinstance(run.get("fingerprint"), str):
        raise InputError(f"{inside / record.RUN}: says no recipe's fingerprint. {found.remedy}")
    require_fingerprint(
        recipe,
        run["fingerprint"],
        recipe_source=recipe_source,
        trained=found.folder,
        remedy=f"Give {checkpoint.EXTRAS}/{record.RECIPE} of that folder.",
    )
    model = model_file(run.get("model"), source=f"{inside / record.RUN}: model")
    plan = recipe.plan(model)
    record.require_same_plan(found.extras, recipe, plan, folder=inside, remedy=found.remedy)
    return _Opened(found=found, model=model, plan=plan)


def _rewrite(opened: _Opened, to: Path, made: Folding, *, back: bool) -> Rewritten:
    found = opened.found
    require_free(to, found.folder)
    with staged(to, unchanged=str(found.folder)) as root:
        folder = root / checkpoint.name_of(found.iteration)
        (folder / checkpoint.EXTRAS).mkdir(parents=True)
        write_folded(found.folder, found.metadata, folder, made, back=back, objects={}, remedy=found.remedy)
        copy_beside(found.folder, folder, remedy=found.remedy)
        extras = {**found.extras, checkpoint.FOLDED: made.to_text()}
        if back:
            del extras[checkpoint.FOLDED]
        for name, text in extras.items():
            (folder / checkpoint.EXTRAS / name).write_text(text, encoding="utf-8")
        checkpoint.seal(root, found.iteration)
    return Rewritten(to=to, tensors=tuple(made.by_name), optimizer=optimizer_told(found.metadata, made))


def _chosen(path: Path) -> tuple[Path, int]:
    """Returns the folder of a run's checkpoints, and the iteration of the one that is meant."""
    one = _FOLDER.fullmatch(path.resolve().name)
    if one is not None:
        return path.resolve().parent, int(one[1])
    iteration = checkpoint.latest(path)
    assert iteration is not None, path
    return path, iteration
