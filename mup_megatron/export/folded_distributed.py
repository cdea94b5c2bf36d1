"""Folds in torch's distributed format: of the model's tensors, and of what the optimizer keeps of them."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from mup_megatron.export.folding import ORDERS, Folding, changed
from mup_megatron.export.folds import Fold
from mup_megatron.megatron.stored_again import Object, Part, write_again
from mup_megatron.megatron.stored_names import places
from mup_megatron.unpickling import read_torch

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
"""What an optimizer keeps of a parameter, under the key of the parameter."""
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")
_FORMAT, _COMMON = "metadata.json", "common.pt"
"""Files of the format that hold no weights; the second is of releases of Megatron-Core before 0.18."""


def carries_optimizer(metadata: Metadata) -> bool:
    """Returns whether all that the optimizer keeps is there by parameter and in its shape, and of a kind that is known.

    It is not where it is cut along the data-parallel ranks, as the distributed optimizer's usually is.
    """
    shapes = _shapes(metadata)
    for key, shape in shapes.items():
        if _OPTIMIZER.match(key) is None:
            continue
        state = _STATE.fullmatch(key)
        if state is None or state[1] not in ORDERS or shapes.get(state[2]) != shape:
            return False
    return True


def optimizer_told(metadata: Metadata, folding: Folding) -> str:
    """Returns what becomes of the optimizer's state, as half a sentence."""
    if not any(map(_OPTIMIZER.match, _shapes(metadata))):
        return "there is no state of an optimizer"
    if folding.optimizer:
        return "the optimizer's state goes along"
    return "without the optimizer's state, which is not there by parameter, so that `unfold` cannot give it back"


def copy_beside(folder: Path, to: Path, *, remedy: str) -> None:
    """Copies the files of the format that hold no weights.

    Raises:
        InputError: one is damaged, or holds what may run code: it goes to software that runs it.
        OSError: the disk is full, or cannot be written.
    """
    if (folder / _COMMON).exists():
        read_torch(folder / _COMMON, source=str(folder / _COMMON), remedy=remedy)
    for name in (_FORMAT, _COMMON):
        if (folder / name).exists():
            shutil.copy(folder / name, to)


def write_folded(
    folder: Path,
    metadata: Metadata,
    to: Path,
    folding: Folding,
    *,
    back: bool,
    objects: Mapping[str, Object],
    remedy: str,
) -> None:
    """Writes a checkpoint's tensors and objects once more, folded or with the folds taken out.

    Args:
        folder: the checkpoint's.
        metadata: as `stored.read_metadata` returned it.
        to: where they go.
        folding: what is folded, or was.
        back: True to take it out.
        objects: what becomes of objects that are no tensors, by key.
        remedy: what to do about a damaged checkpoint, as a sentence.

    Raises:
        InputError: a part is damaged, or holds what may run code.
        OSError: the disk is full, or cannot be written.
    """
    shapes = _shapes(metadata)
    at_places = places({key: shape for key, shape in shapes.items() if _OPTIMIZER.match(key) is None})
    todo: dict[str, dict[tuple[int, ...], Sequence[Fold]]] = {}
    for name, folds in folding.by_name.items():
        if (place := at_places.get(name)) is not None:  # not in every version of Megatron
            todo.setdefault(place.key, {})[place.at] = folds
    parts = {}
    for key in shapes:
        state = _STATE.fullmatch(key)
        order = 0 if state is None else ORDERS.get(state[1], 0)
        own = todo.get(key if state is None else state[2])
        if own is not None:
            parts[key] = _part(own, order=order, back=back)
    write_again(
        folder,
        metadata,
        to,
        parts=parts,
        objects=objects,
        without=lambda key: not folding.optimizer and _OPTIMIZER.match(key) is not None,
        remedy=remedy,
    )


def _part(todo: Mapping[tuple[int, ...], Sequence[Fold]], *, order: int, back: bool) -> Part:
    """Returns what becomes of a part of a stored tensor, which may be of several layers or experts."""

    def change(chunk: ChunkStorageMetadata, part: torch.Tensor) -> torch.Tensor:
        part = part.clone()
        for at, folds in todo.items():
            cut = len(at)
            inside = tuple(index - first for index, first in zip(at, chunk.offsets, strict=False))
            if all(0 <= index < size for index, size in zip(inside, chunk.sizes, strict=False)):
                first_row = chunk.offsets[cut] if cut < len(chunk.offsets) else 0
                part[inside] = changed(part[inside], folds, order=order, back=back, first_row=first_row)
        return part

    return change


def _shapes(metadata: Metadata) -> Mapping[str, tuple[int, ...]]:
    return {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
