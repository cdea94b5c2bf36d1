"""Tensors → files in the safetensors format, one tensor in memory at a time, with an index where there are several.

A file is the length of its header (8 bytes), the header in JSON, and the tensors one after the other.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ALIGNED = 8
TYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""What the format calls the types that weights have."""


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def split(tensors: Sequence[Written], largest: int) -> Sequence[Sequence[Written]]:
    """Returns the tensors of each file, in order, with at most so many bytes; a larger one is alone in its own."""
    shards: list[list[Written]] = []
    room = 0
    for tensor in tensors:
        if tensor.size > room or not shards:
            shards.append([])
            room = largest
        shards[-1].append(tensor)
        room -= tensor.size
    return shards


def write(folder: Path, shards: Sequence[Sequence[Written]], read: Callable[[str], torch.Tensor]) -> Sequence[str]:
    """Writes all files and the index, brought to the disk, and returns the names of those with tensors.

    Args:
        folder: where they go.
        shards: the tensors of each.
        read: returns a tensor, of the shape and type that was said of it.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for name, tensors in zip(names, shards, strict=True):
        _write_file(folder / name, tensors, read)
        _require_written(folder / name, tensors)
    if count > 1:
        of_file = {tensor.name: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        total = sum(tensor.size for tensors in shards for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": of_file}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _require_written(path: Path, tensors: Sequence[Written]) -> None:
    """Raises OSError unless a file is as long as its header says, and says what it should."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        told = stream.read(length)
    size = 8 + length + sum(each.size for each in tensors)
    if told != _header(tensors) or path.stat().st_size != size:
        raise OSError(errno.EIO, f"{path.name} is not what was written")


def _header(tensors: Sequence[Written]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in tensors:
        start, end = end, end + each.size
        header[each.name] = {"dtype": TYPES[each.dtype], "shape": list(each.shape), "data_offsets": [start, end]}
    told = json.dumps(header, separators=(",", ":")).encode()
    return told + b" " * (-len(told) % _ALIGNED)


def _write_file(path: Path, tensors: Sequence[Written], read: Callable[[str], torch.Tensor]) -> None:
    told = _header(tensors)
    with path.open("wb") as stream:
        stream.write(len(told).to_bytes(8, "little"))
        stream.write(told)
        for each in tensors:
            tensor = read(each.name)
            assert (tuple(tensor.shape), tensor.dtype) == (each.shape, each.dtype), each.name
            stream.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
        stream.flush()
        os.fsync(stream.fileno())
