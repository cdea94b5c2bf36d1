"""Models that `save_pretrained` or the Trainer saved with their multipliers: safetensors, a marked configuration."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mup_megatron.errors import InputError
from mup_megatron.export.hugging_face import HuggingFaceModel, hugging_face_model
from mup_megatron.export.shards import INDEX, SINGLE, TYPES
from mup_megatron.export.weights import Stored, require_fingerprint
from mup_megatron.json_io import read_json
from mup_megatron.modules.marker import KEY, mark_of
from mup_megatron.recipe import Recipe
from mup_megatron.targets import CONFIG_FILE
from mup_megatron.validation import brief

_TRAINERS = re.compile(r"checkpoint-(\d+)")
_KNOWN = {name: dtype for dtype, name in TYPES.items()}
_REMEDY = "Save the model again with save_pretrained, or give another checkpoint."


class SavedWeights:
    """The tensors of safetensors files, by the names there."""

    def __init__(self, folder: Path) -> None:
        """Reads the index, or the only file's header.

        Raises:
            InputError: a file is damaged, or there are both.
        """
        self._folder = folder
        index = folder / INDEX
        self._file_of = _of_index(index) if index.is_file() else dict.fromkeys(self._names(SINGLE), SINGLE)
        if (folder / SINGLE).is_file() and SINGLE not in self._file_of.values():
            raise InputError(f"{folder}: has {SINGLE} and {INDEX}, of two savings. Remove what is not of the last one.")

    @cached_property
    def stored(self) -> Mapping[str, Stored]:
        """Everything that there is."""
        found = {}
        for file in dict.fromkeys(self._file_of.values()):
            with self._opened(file) as tensors:
                for name in (name for name, own in self._file_of.items() if own == file):
                    part = tensors.get_slice(name)
                    dtype = _KNOWN.get(part.get_dtype())
                    if dtype is not None:  # a whole number is no weight
                        found[name] = Stored(tuple(part.get_shape()), dtype)
        return found

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor."""
        with self._opened(self._file_of[name]) as tensors:
            found: torch.Tensor = tensors.get_tensor(name)
        return found

    def _names(self, file: str) -> Sequence[str]:
        with self._opened(file) as tensors:
            return [*tensors.keys()]

    @contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        path = self._folder / file
        try:
            with safe_open(path, "pt") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({brief(error, 100)}). {_REMEDY}") from None


def _of_index(path: Path) -> Mapping[str, str]:
    """Returns the file of each tensor, which lies beside the index."""
    content = read_json(path)
    found = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping) or not all(
        isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file for file in found.values()
    ):
        raise InputError(f"{path}: weight_map has to say a safetensors file beside it for each tensor. {_REMEDY}")
    return found


def is_at(path: Path) -> bool:
    """Returns whether a saved model, or checkpoints of the Trainer's that have one, may be at a path."""
    return _has_model(path) or _last_of_trainer(path) is not None


def open_saved(path: Path, recipe: Recipe, *, recipe_source: str) -> HuggingFaceModel:
    """Returns the trained model that was saved in a folder; its weights are not read yet.

    Args:
        path: the folder, or one with the Trainer's `checkpoint-…`, the last of which is meant.
        recipe: the run's.
        recipe_source: what the recipe is called in messages.

    Raises:
        InputError: it is damaged, of another recipe, or was not trained with one; names the file.
    """
    folder = path if _has_model(path) else _last_of_trainer(path)
    assert folder is not None, path
    config = folder / CONFIG_FILE
    content = read_json(config)
    if not isinstance(content, Mapping) or "model_type" not in content:
        raise InputError(f"{config}: no configuration of transformers (model_type is missing). {_REMEDY}")
    mark = mark_of(content.get(KEY), source=str(config))
    if mark is None:
        raise InputError(
            f"{config}: does not say a recipe ({KEY}), so the model has no multipliers: it is exported already, or "
            "mup_megatron was not there when it was saved."
        )
    require_fingerprint(recipe, mark.fingerprint, recipe_source=recipe_source, trained=folder, remedy="Give that one.")
    weights = SavedWeights(folder)
    return hugging_face_model(content, recipe, weights, source=str(config), described=str(folder), folder=folder)


def _has_model(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and any((path / file).is_file() for file in (SINGLE, INDEX))


def _last_of_trainer(path: Path) -> Path | None:
    """Returns the last of the Trainer's checkpoints in a folder that has a model."""
    numbered = ((int(match[1]), each) for each in path.iterdir() if (match := _TRAINERS.fullmatch(each.name)))
    return next((each for _, each in sorted(numbered, reverse=True) if _has_model(each)), None)
