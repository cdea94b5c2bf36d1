"""The parts of a checkpoint in torch's distributed format, read and checked before a library reads them.

Such a checkpoint's `.metadata` is a pickle, and every object in its data is one. Torch and Megatron-Core load both as
they are. Here the first is read with a list of the classes that it consists of, each object is looked at, and the
library is handed what was read: it opens `.metadata` no second time.

Imports torch, not Megatron.
"""

import contextlib
import copy
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mup_megatron.errors import InputError
from mup_megatron.files import require_ordinary
from mup_megatron.unpickling import not_read, read_pickle, read_torch, torch_loads_only_tensors
from mup_megatron.validation import brief

METADATA = ".metadata"

_CLASSES: Mapping[str, Collection[str]] = {
    "collections": {"OrderedDict"},
    # Of Megatron-Core before 0.19.
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreSavePlan"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    # Megatron keeps the plans by which a checkpoint was written.
    "torch.distributed.checkpoint.planner": {
        *("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
    "torch.serialization": {"_get_layout"},
}
"""What a `.metadata` of torch 2.6 to 2.13 consists of."""


def read_metadata(folder: Path, *, files: Collection[str], remedy: str) -> Metadata:
    """The `.metadata` of a checkpoint, once it is what torch writes and speaks of nothing outside the checkpoint.

    Args:
        folder: the checkpoint's.
        files: names of the checkpoint's files, relative to it.
        remedy: what to do about a damaged one, as a sentence.

    Raises:
        InputError: it is missing or damaged, names a class that is not part of the format, or contradicts the files.
    """
    path = folder / METADATA
    try:
        require_ordinary(path)
        with path.open("rb") as stream:
            metadata = read_pickle(stream, _CLASSES, source=str(path), remedy=remedy)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). {remedy}") from None
    try:
        sizes = {name: (folder / name).stat().st_size for name in files if (folder / name).is_file()}
        problem = _problem(metadata, sizes)
    except (AttributeError, TypeError, ValueError) as error:  # a part that lacks what its class has
        problem = brief(error)
    if problem is not None:
        raise InputError(f"{path}: damaged ({problem}). {remedy}")
    assert isinstance(metadata, Metadata)
    return metadata


def require_plain_objects(folder: Path, metadata: Metadata, *, remedy: str) -> None:
    """Raises InputError, by class and file, if an object in a checkpoint's data is more than tensors and plain values.

    Tensors are read by torch's restricted reader in any case.
    """
    for key, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            _object(folder, info, key.fqn, remedy=remedy)


def read_tensor(folder: Path, metadata: Metadata, key: str, *, remedy: str, at: Sequence[int] = ()) -> torch.Tensor:
    """Returns a tensor of a checkpoint, whole, whoever held which part of it.

    Args:
        folder: the checkpoint's.
        metadata: as `read_metadata` returned it.
        key: the tensor's.
        remedy: what to do about a damaged one, as a sentence.
        at: indices of its first dimensions, of which the rest is returned; only that is read.

    Raises:
        InputError: a part of it is damaged, or holds what may run code.
    """
    entry = metadata.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    whole = torch.empty(tuple(entry.size)[len(at) :], dtype=entry.properties.dtype)
    for chunk in entry.chunks:
        ends = [first + length for first, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(not first <= index < end for index, first, end in zip(at, chunk.offsets, ends, strict=False)):
            continue
        part = read_part(folder, metadata, key, chunk, remedy=remedy)
        inside = tuple(index - first for index, first in zip(at, chunk.offsets, strict=False))
        box = tuple(slice(first, end) for first, end in zip(chunk.offsets[len(at) :], ends[len(at) :], strict=True))
        whole[box] = part[inside]
    return whole


def read_part(folder: Path, metadata: Metadata, key: str, chunk: ChunkStorageMetadata, *, remedy: str) -> torch.Tensor:
    """Returns a part of a tensor, as one rank has written it.

    Raises:
        InputError: it is damaged, or holds what may run code.
    """
    entry: Any = metadata.state_dict_metadata[key]
    dtype = entry.properties.dtype
    info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
    found = _object(folder, info, key, remedy=remedy)
    if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (chunk.sizes, dtype):
        raise InputError(
            f"{folder / info.relative_path}: {brief(key, 60)} is not the tensor that {METADATA} says. {remedy}"
        )
    return found


def read_object(folder: Path, metadata: Metadata, key: str, *, remedy: str) -> Any:
    """Returns an object of a checkpoint that is no tensor.

    Args:
        folder: the checkpoint's.
        metadata: as `read_metadata` returned it.
        key: the object's.
        remedy: what to do about a damaged one, as a sentence.

    Raises:
        InputError: it is damaged, or holds what may run code.
    """
    return _object(folder, metadata.storage_data[MetadataIndex(key)], key, remedy=remedy)


def _object(folder: Path, info: Any, key: str, *, remedy: str) -> Any:
    """Returns what is stored at a place, tensors and plain values alone."""
    path = folder / info.relative_path
    try:
        with path.open("rb") as stream:
            stream.seek(info.offset)
            data = stream.read(info.length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). {remedy}") from None
    return read_torch(io.BytesIO(data), source=f"{path}: {brief(key, 60)}", remedy=remedy)


@contextlib.contextmanager
def loading(folder: Path, metadata: Metadata, *, remedy: str) -> Iterator[None]:
    """For the time of a library's loading: it is given this metadata, and whatever it raises becomes an InputError."""
    readers: Any = FileSystemReader
    read_metadata, slice_file = readers.read_metadata, readers._slice_file
    source = folder

    def read(reader: Any, *args: Any, **kwargs: Any) -> Metadata:
        given = copy.copy(metadata)
        given.storage_meta = StorageMeta(load_id=reader.load_id)
        return given

    def noted(reader: Any, file: Any, info: Any) -> Any:
        nonlocal source
        source = folder / info.relative_path
        return slice_file(reader, file, info)

    readers.read_metadata, readers._slice_file = read, noted
    try:
        with torch_loads_only_tensors():
            yield
    except InputError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # Torch's CheckpointException is no Exception. Which others Megatron, torch and numpy raise for a part that is
        # not what they wrote, nobody says.
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        told = next((failure for failure, _ in failures), error)
        raise not_read(told, source=str(source), remedy=remedy) from error
    finally:
        readers.read_metadata, readers._slice_file = read_metadata, slice_file


# ---- what must hold ------------------------------------------------------------------------------------------------


def _problem(metadata: object, sizes: Mapping[str, int]) -> str | None:
    """Returns what is wrong with a `.metadata`, in a few words; None if nothing is."""
    if not isinstance(metadata, Metadata):
        return f"a {type(metadata).__name__} in place of torch's Metadata"
    entries, stored = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        return "its tables are missing"
    for key, info in stored.items():
        problem = _problem_of_place(key, info, sizes)
        if problem is not None:
            return problem
    places = {(key.fqn, key.offset) for key in stored}
    for name, entry in entries.items():
        problem = _problem_of_entry(name, entry)
        if problem is not None:
            return problem
        offsets = [chunk.offsets for chunk in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [None]
        if any((name, offset) not in places for offset in offsets):
            return f"{brief(name, 60)} is in no file"
    return None


def _problem_of_place(key: object, info: Any, sizes: Mapping[str, int]) -> str | None:
    if not isinstance(key, MetadataIndex) or not isinstance(key.fqn, str):
        return "an entry without a name"
    name = brief(key.fqn, 60)
    if type(info).__name__ != "_StorageInfo" or not isinstance(info.relative_path, str):
        return f"{name} has no place"
    if info.relative_path not in sizes:
        return f"{name} is said to be in {brief(info.relative_path, 40)!r}, which is no file of the checkpoint"
    if not _are_sizes(info.offset, info.length) or info.offset + info.length > sizes[info.relative_path]:
        return f"{name} is said to lie beyond the end of {info.relative_path}"
    if getattr(info, "transform_descriptors", None):
        return f"{name} is compressed"
    return None


def _problem_of_entry(name: object, entry: object) -> str | None:
    if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
        return f"{brief(name, 60)} is neither a tensor nor an object"
    if isinstance(entry, BytesStorageMetadata):
        return None
    tensor: Any = entry  # of whose fields nothing is known yet
    shown = brief(name, 60)
    if not isinstance(tensor.properties, TensorProperties) or not isinstance(tensor.properties.dtype, torch.dtype):
        return f"{shown} has no type"
    if not isinstance(tensor.size, torch.Size) or not isinstance(tensor.chunks, list):
        return f"{shown} has no shape"
    for chunk in tensor.chunks:
        if not isinstance(chunk, ChunkStorageMetadata) or not _are_shapes(chunk.offsets, chunk.sizes):
            return f"{shown} has a part without a shape"
        if not (len(chunk.offsets) == len(chunk.sizes) == len(tensor.size)) or any(
            first < 0 or length < 0 or first + length > whole
            for first, length, whole in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
        ):
            return f"{shown} has a part outside of it"
    if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
        return f"{shown} is not whole"
    return None


def _are_shapes(*values: object) -> bool:
    return all(isinstance(value, torch.Size) for value in values)


def _are_sizes(*values: object) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
