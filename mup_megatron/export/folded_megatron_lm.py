"""Checkpoints of Megatron-LM, folded and unfolded in the format that they are in.

Importing it imports Megatron: the CPU runtime has to come before.
"""

from pathlib import Path
from typing import Any

from mup_megatron import checkpoint_recipe
from mup_megatron.errors import InputError
from mup_megatron.export.folded_distributed import carries_optimizer, copy_beside, optimizer_told, write_folded
from mup_megatron.export.folding import MARKER, Folding, Rewritten, changed, folding
from mup_megatron.export.megatron_lm import COMMON_FILE, COMMON_OBJECT, Opened
from mup_megatron.export.ranks import FILE, Layout, rank_of, read_rank, stages, tensors_of
from mup_megatron.export.staging import require_free, staged
from mup_megatron.files import read_text, sync
from mup_megatron.megatron.pretrain.checkpoints import sign_folded
from mup_megatron.megatron.stored_again import save_torch
from mup_megatron.recipe import Recipe
from mup_megatron.training.checkpoint import TRACKER
from mup_megatron.unpickling import read_torch

_OPTIMIZER = "optimizer"
_LEFT_OUT = (
    "without the optimizer's state, which the format torch does not keep by name: go on with --no-load-optim, or fold "
    "one that was saved with --ckpt-format torch_dist"
)


def fold_megatron_lm(path: Path, to: Path, recipe: Recipe, *, recipe_source: str) -> Rewritten:
    """Writes a checkpoint with its multipliers in its weights.

    Args:
        path: the folder of a run's checkpoints, whose last one is meant; or that of one checkpoint.
        to: a folder of checkpoints that is not there yet, or empty.
        recipe: the run's.
        recipe_source: what the recipe is called in messages.

    Raises:
        InputError: it is damaged, of another recipe or of none, folded already, or cannot be folded or written.
    """
    opened = Opened(path, recipe, recipe_source=recipe_source)
    opened.source().require_whole()
    if opened.values.get("qk_l2_norm") and opened.plan.changes_softmax_scale:
        raise InputError(
            f"{opened.folder}: --qk-l2-norm gives queries one length whatever their weights are, so that the scale of "
            "attention cannot be folded into these."
        )
    optimizer = opened.metadata is not None and carries_optimizer(opened.metadata)
    made = folding(opened.plan, opened.tensors, optimizer=optimizer)
    return _rewrite(opened, to, recipe, made, back=False)


def unfold_megatron_lm(path: Path, to: Path, recipe: Recipe, *, recipe_source: str) -> Rewritten:
    """Writes what a folded checkpoint was made of, to rounding; arguments as for `fold_megatron_lm`.

    Raises:
        InputError: it is damaged, of another recipe, not folded, or cannot be written.
    """
    opened = Opened(path, recipe, recipe_source=recipe_source, folded=True)
    source = opened.folder / MARKER
    made = Folding.from_text(read_text(source, remedy=opened.remedy), source=str(source), remedy=opened.remedy)
    made.require_of(opened.plan, opened.tensors, source=str(source))
    return _rewrite(opened, to, recipe, made, back=True)


def _rewrite(opened: Opened, to: Path, recipe: Recipe, made: Folding, *, back: bool) -> Rewritten:
    require_free(to, opened.folder)
    name = opened.folder.resolve().name
    with staged(to, unchanged=str(opened.folder)) as root:
        folder = root / name
        folder.mkdir()
        if opened.metadata is None:
            optimizer = _LEFT_OUT
            _write_ranks(opened, folder, made, back=back)
        else:
            optimizer = optimizer_told(opened.metadata, made)
            _write_distributed(opened, folder, made, back=back)
        if back:
            for each in (folder, root):
                (each / checkpoint_recipe.SIDECAR).write_text(recipe.to_yaml(), encoding="utf-8")
        else:
            (folder / MARKER).write_text(made.to_text(), encoding="utf-8")
        (root / TRACKER).write_text(name if name == "release" else str(int(name.removeprefix("iter_"))))
        for each in (*(each for each in root.rglob("*") if each.is_file()), folder):
            sync(each)
    return Rewritten(to=to, tensors=tuple(made.by_name), optimizer=optimizer)


def _write_distributed(opened: Opened, folder: Path, made: Folding, *, back: bool) -> None:
    assert opened.metadata is not None

    def signed(state: Any) -> Any:
        (content,) = state
        sign_folded(content["args"], folded=not back)
        return state

    objects = {COMMON_OBJECT: signed} if COMMON_OBJECT in opened.metadata.state_dict_metadata else {}
    write_folded(opened.folder, opened.metadata, folder, made, back=back, objects=objects, remedy=opened.remedy)
    copy_beside(opened.folder, folder, remedy=opened.remedy)
    if (path := opened.folder / COMMON_FILE).exists():
        content = read_torch(path, source=str(path), remedy=opened.remedy)
        _save(signed([content])[0], folder / COMMON_FILE)


def _write_ranks(opened: Opened, folder: Path, made: Folding, *, back: bool) -> None:
    """Writes the file of each rank, one after the other."""
    weights, layout = opened.of_ranks(), Layout.of(opened.values)
    for path in opened.files:
        content, rank = dict(read_rank(path, remedy=opened.remedy)), rank_of(path, layout)
        for stage, key in enumerate(stages(content)):
            for own, tensor in tensors_of(content[key]).items():
                name = weights.names.of(own, rank, stage)
                if todo := made.by_name.get(name):
                    first_row = weights.first_row(name, rank)
                    content[key][own] = changed(tensor, todo, back=back, first_row=first_row)
        content.pop(_OPTIMIZER, None)
        sign_folded(content["args"], folded=not back)
        (folder / path.parent.name).mkdir()
        _save(content, folder / path.parent.name / FILE)


def _save(content: Any, path: Path) -> None:
    with path.open("wb") as stream:
        save_torch(content, stream)
