"""A checkpoint in torch's distributed format, written once more with some of its tensors and objects changed.

One part of one tensor is in memory at a time, and every part stays in the file and at the rank that it was in.
"""

import copy
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from mup_megatron.megatron import stored

Part = Callable[[ChunkStorageMetadata, torch.Tensor], torch.Tensor]
"""Returns a part of a tensor as it is to be, of the shape and type that it has."""
Object = Callable[[Any], Any]
"""Returns an object as it is to be."""


def write_again(
    folder: Path,
    metadata: Metadata,
    to: Path,
    *,
    parts: Mapping[str, Part],
    objects: Mapping[str, Object],
    without: Callable[[str], bool],
    remedy: str,
) -> None:
    """Writes the files that `.metadata` speaks of, and `.metadata`, brought to the disk.

    Args:
        folder: the checkpoint's.
        metadata: as `stored.read_metadata` returned it.
        to: where they go.
        parts: what becomes of tensors, by key; all others stay.
        objects: what becomes of objects, by key.
        without: whether a key is left out.
        remedy: what to do about a damaged checkpoint, as a sentence.

    Raises:
        InputError: a part is damaged, or holds what may run code.
        OSError: the disk is full, or cannot be written.
    """
    by_file: dict[str, list[tuple[MetadataIndex, Any]]] = {}
    for key, info in metadata.storage_data.items():
        if key.fqn in metadata.state_dict_metadata and not without(key.fqn):
            by_file.setdefault(info.relative_path, []).append((key, info))
    places = {}
    for name, found in by_file.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        with (to / name).open("wb") as stream:
            for key, info in sorted(found, key=lambda each: int(each[1].offset)):
                start = stream.tell()
                if key.fqn in parts or key.fqn in objects:
                    _write_changed(stream, folder, metadata, key, parts, objects, remedy=remedy)
                else:
                    _require_readable(folder, metadata, key, remedy=remedy)
                    with (folder / name).open("rb") as whole:
                        whole.seek(info.offset)
                        stream.write(whole.read(info.length))
                places[key] = replace(info, offset=start, length=stream.tell() - start)
            stream.flush()
            os.fsync(stream.fileno())
    own = copy.copy(metadata)
    own.storage_data = places
    own.state_dict_metadata = {key: each for key, each in metadata.state_dict_metadata.items() if not without(key)}
    if len(own.state_dict_metadata) < len(metadata.state_dict_metadata):
        # What Megatron keeps of the plans by which all of it was written.
        vars(own).pop("all_local_plans", None)
    with (to / stored.METADATA).open("wb") as stream:
        pickle.dump(own, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _require_readable(folder: Path, metadata: Metadata, key: MetadataIndex, *, remedy: str) -> None:
    """Raises InputError unless a part is what `.metadata` says: as it is, it goes to software that may run it."""
    entry = metadata.state_dict_metadata[key.fqn]
    if isinstance(entry, BytesStorageMetadata):
        stored.read_object(folder, metadata, key.fqn, remedy=remedy)
    else:
        stored.read_part(folder, metadata, key.fqn, _chunk(entry, key), remedy=remedy)


def _write_changed(
    stream: IO[bytes],
    folder: Path,
    metadata: Metadata,
    key: MetadataIndex,
    parts: Mapping[str, Part],
    objects: Mapping[str, Object],
    *,
    remedy: str,
) -> None:
    entry = metadata.state_dict_metadata[key.fqn]
    if isinstance(entry, BytesStorageMetadata):
        found = stored.read_object(folder, metadata, key.fqn, remedy=remedy)
        save_torch(objects[key.fqn](found), stream)
        return
    chunk = _chunk(entry, key)
    part = stored.read_part(folder, metadata, key.fqn, chunk, remedy=remedy)
    save_torch(parts[key.fqn](chunk, part).clone(), stream)


def _chunk(entry: TensorStorageMetadata, key: MetadataIndex) -> ChunkStorageMetadata:
    return next(each for each in entry.chunks if each.offsets == key.offset)


def save_torch(content: Any, stream: IO[bytes]) -> None:
    """Writes as torch does. Raises OSError if the disk is full, of which torch's writer makes another error."""
    try:
        torch.save(content, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
