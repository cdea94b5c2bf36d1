"""A trained model → a folder that stock transformers loads: configuration, weights in shards, tokenizer.

The folder is written under another name and renamed once it is whole, so that nothing is ever half there.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.export import shards
from mup_megatron.export.architectures.target import Piece
from mup_megatron.export.folds import Fold, folded
from mup_megatron.export.staging import require_free, staged
from mup_megatron.export.tokenizers import Tokenizer
from mup_megatron.export.weights import Outline, TrainedModel

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LARGEST = 5 * 10**9
"""Bytes of a file of weights, unless told otherwise."""
RECORD = "mup_megatron.json"
"""The file that says what was exported and how; transformers does not read it."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export that is done."""

    to: Path
    architecture: str
    carried: Mapping[str, float]
    """The multipliers that the configuration says, by its keys."""
    folded: Sequence[str]
    """The tensors that were multiplied."""
    left_out: Sequence[str]
    """What is not part of the model any more, in words."""
    files: Sequence[str]
    parameters: int
    size: int
    """Bytes of all weights."""


def export(
    source: TrainedModel,
    to: Path,
    *,
    architecture: str | None = None,
    largest: int = LARGEST,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
) -> Exported:
    """Writes a trained model as one of transformers.

    Args:
        source: the model.
        to: a folder that is not there yet, or empty.
        architecture: None for the one that leaves most weights as they are.
        largest: bytes of a file of weights.
        dtype: of the weights; None for that which they were trained in.
        tokenizer: goes with it.

    Raises:
        InputError: no architecture has what the model has, a weight is missing or damaged, or the disk is full.
    """
    require_free(to, source.folder)
    source.require_whole()
    outline = source.outline(architecture)
    if tokenizer is not None:
        tokenizer.require_within(outline.vocab_size)
    dtype = dtype or _trained_in(source, outline)
    pieces = {piece.name: piece for piece in outline.pieces}
    written = [
        shards.Written(each.name, each.shape, torch.float32 if each.single_precision else dtype)
        for each in outline.pieces
    ]
    types = {each.name: each.dtype for each in written}
    reader = _Reader(source, outline.folds)
    special = _special(outline, tokenizer)
    with staged(to, unchanged=source.described) as folder:
        files = shards.write(
            folder, shards.split(written, largest), lambda name: reader.piece(pieces[name], types[name])
        )
        done = Exported(
            to=to,
            architecture=outline.architecture,
            carried=outline.carried,
            folded=tuple(dict.fromkeys(each.tensor for each in outline.folds)),
            left_out=outline.left_out,
            files=files,
            parameters=sum(math.prod(each.shape) for each in written),
            size=sum(each.size for each in written),
        )
        own_type = {"dtype": str(dtype).removeprefix("torch.")}
        _write_json(folder / "config.json", {**outline.config, **special, **own_type})
        _write_json(folder / "generation_config.json", special)
        _write_json(folder / RECORD, _record(source, done, outline.folds))
        if tokenizer is not None:
            tokenizer.write(folder)
    return done


def _trained_in(source: TrainedModel, outline: Outline) -> torch.dtype:
    """Returns the type of a model's weights; where they have several, the one that holds all of them."""
    read = (each.source for each in outline.pieces if each.source is not None and not each.single_precision)
    return functools.reduce(torch.promote_types, (source.weights.stored[name].dtype for name in read))


def _special(outline: Outline, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the special tokens; the defaults of architectures are those of their authors' tokenizers."""
    known = outline.config if tokenizer is None else tokenizer.special_ids
    return {key: known.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


class _Reader:
    """Reads pieces of a source with their folds; several pieces of one tensor, one after the other, once."""

    def __init__(self, source: TrainedModel, todo: Sequence[Fold]) -> None:
        self._source, self._weights = source, source.weights
        self._folds: dict[str, list[Fold]] = {}
        for each in todo:
            self._folds.setdefault(each.tensor, []).append(each)
        self._last: tuple[str, torch.Tensor] | None = None

    def piece(self, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
        if piece.source is None:
            return torch.zeros(piece.shape, dtype=dtype)
        found = self._whole(piece.source)
        if piece.rows is not None:
            parts = [found[rows.start : rows.stop] for rows in piece.rows]
            found = parts[0] if len(parts) == 1 else torch.cat(parts)
        if piece.transposed:
            found = found.t()
        if piece.shift:
            found = found.to(torch.promote_types(found.dtype, torch.float32)) + piece.shift
        made = found.to(dtype)
        if not _finite(made):
            if not _finite(found):
                raise InputError(
                    f"{self._source.described}: {piece.source} holds infinities or what is no number. Export a "
                    "checkpoint from before the run diverged."
                )
            raise InputError(
                f"{piece.source}: has values that are too large for {str(dtype).removeprefix('torch.')}. Choose "
                "--dtype bfloat16 or float32."
            )
        return made

    def _whole(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # two whole tensors at a time would be one too many
            self._last = name, folded(self._weights.read(name), self._folds.get(name, ()))
        return self._last[1]


def _finite(tensor: torch.Tensor) -> bool:
    return all(math.isfinite(each) for each in tensor.aminmax())


# ---- files ---------------------------------------------------------------------------------------------------------


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _record(source: TrainedModel, done: Exported, todo: Sequence[Fold]) -> dict[str, Any]:
    return {
        "fingerprint": source.plan.fingerprint,
        "checkpoint": source.described,
        "architecture": done.architecture,
        "multipliers": dict(done.carried),
        "folded": [each.to_json() for each in todo],
        "left_out": list(done.left_out),
    }
