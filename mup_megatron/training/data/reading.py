"""The data at a PREFIX, read and checked: index, metadata and tokens belong together and are what a model can take.

Data made by Megatron's own tools need only a PREFIX.json with `vocab_size` and `eod` to be used here.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mup_megatron.errors import InputError
from mup_megatron.files import require_ordinary
from mup_megatron.readback import read_json
from mup_megatron.training.data.prefix import DataMeta, at
from mup_megatron.validation import validated

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16
}  # fmt: skip
_FLOATS = {6, 7}
"""Types that Megatron's format has and tokens cannot be of."""
_CHUNK = 1 << 24
_SCANNED = 1 << 34
"""Bytes of tokens that are looked at when the indices of a run are made: it takes seconds."""


@dataclass(frozen=True)
class Index:
    """The content of an `.idx` file."""

    dtype: np.dtype[Any]
    sequence_lengths: npt.NDArray[np.int32]
    document_indices: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """The number of tokens that the `.bin` file must hold."""
        return int(self.sequence_lengths.sum(dtype=np.int64))


def check_prefix(prefix: Path) -> DataMeta:
    """Returns the metadata of the data at `prefix`, once all files are there, whole, and belong together.

    Costs a pass over the index, not over the tokens.

    Raises:
        InputError: a file is missing, truncated or corrupt, or they are not of one making; names it.
    """
    for suffix in (".bin", ".idx"):
        if not at(prefix, suffix).is_file():
            hint = ""
            if prefix.suffix in (".bin", ".idx", ".json") and prefix.is_file():
                hint = f" Leave the suffix away: {prefix.with_suffix('')}."
            raise InputError(
                f"{at(prefix, suffix)}: no such file, so there are no data.{hint} Make them with mup-megatron data, "
                "and give the prefix that stands behind its -o."
            )
    index = read_index(prefix)
    meta = read_meta(prefix)
    expected = index.tokens * index.dtype.itemsize
    found = at(prefix, ".bin").stat().st_size
    if found != expected:
        raise InputError(
            f"{at(prefix, '.bin')}: truncated or of another making: it has {found} bytes, and {at(prefix, '.idx')} "
            f"speaks of {expected}. {_again(prefix)}"
        )
    counts = {
        "tokens": (meta.tokens, index.tokens),
        "sequences": (meta.sequences, len(index.sequence_lengths)),
        "documents": (meta.documents, len(index.document_indices) - 1),
    }
    for key, (said, counted) in counts.items():
        if said is not None and said != counted:
            raise InputError(
                f"{at(prefix, '.json')}: {key} is {said}, but the index next to it has {counted}: "
                f"the files are not of one making. {_again(prefix)}"
            )
    if meta.eod >= meta.vocab_size:
        raise InputError(f"{at(prefix, '.json')}: eod is {meta.eod}, but ids end at {meta.vocab_size - 1}. Correct it.")
    return meta


def read_meta(prefix: Path) -> DataMeta:
    """Reads PREFIX.json.

    Raises:
        InputError: it is missing, truncated, or has keys or values that it cannot have.
    """
    path = at(prefix, ".json")
    if not path.exists():
        raise InputError(
            f"{path}: no such file. Make the data again with mup-megatron data, or, if another tool made them, "
            'write there {"vocab_size": …, "eod": …} as their tokenizer has them.'
        )
    content = read_json(path, remedy=_again(prefix))
    if not isinstance(content, dict):
        raise InputError(f"{path}: does not describe data. {_again(prefix)}")
    return validated(DataMeta, content, source=str(path))


def read_index(prefix: Path) -> Index:
    """Reads PREFIX.idx, and checks it against its own size.

    Raises:
        InputError: it is not Megatron's index, is truncated, or its numbers cannot be.
    """
    path = at(prefix, ".idx")
    try:
        require_ordinary(path)
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise InputError(f"{path}: not an index in Megatron's format, or truncated. {_again(prefix)}")
            _, format_version, code, sequences, entries = _HEADER.unpack(header)
            if code in _FLOATS:
                raise InputError(f"{path}: says that tokens are floating-point numbers. {_again(prefix)}")
            if format_version != 1 or code not in _DTYPES:
                raise InputError(f"{path}: corrupt: version {format_version}, type {code}. {_again(prefix)}")
            if size < _HEADER.size + 12 * sequences + 8 * entries:
                raise InputError(
                    f"{path}: truncated: it has {size} bytes and speaks of {sequences} sequences. {_again(prefix)}"
                )
            lengths = np.fromfile(stream, dtype=np.int32, count=sequences)
            pointers = np.fromfile(stream, dtype=np.int64, count=sequences)
            documents = np.fromfile(stream, dtype=np.int64, count=entries)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the file and its permissions.") from None
    dtype = np.dtype(_DTYPES[code])
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    sound = (
        sequences > 0
        and entries > 1
        and bool((lengths >= 0).all())
        and np.array_equal(pointers, starts)
        and documents[0] == 0
        and documents[-1] == sequences
        and bool((np.diff(documents) >= 0).all())
    )
    if not sound:
        raise InputError(f"{path}: corrupt: its lengths, offsets and documents contradict each other. {_again(prefix)}")
    return Index(dtype, lengths, documents)


def require_known_tokens(prefix: Path, meta: DataMeta) -> None:
    """Reads all tokens once, up to _SCANNED bytes of them.

    Raises:
        InputError: one is negative, or beyond the vocabulary that the metadata give; names the file and the token.
    """
    path = at(prefix, ".bin")
    dtype = read_index(prefix).dtype
    try:
        require_ordinary(path)
        with path.open("rb") as stream:
            for start in range(0, _SCANNED, _CHUNK):
                tokens = np.frombuffer(stream.read(_CHUNK), dtype=dtype)
                if not len(tokens):
                    return
                if tokens.max() >= meta.vocab_size or tokens.min() < 0:
                    first = int(np.argmax((tokens >= meta.vocab_size) | (tokens < 0)))
                    raise InputError(
                        f"{path}: token {start // dtype.itemsize + first} is id {tokens[first]}, and the vocabulary in "
                        f"{at(prefix, '.json')} has {meta.vocab_size}. Correct vocab_size there. {_again(prefix)}"
                    )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the file and its permissions.") from None


def require_vocab(meta: DataMeta, vocab_size: int, *, data: Path | str, model: Path | str) -> None:
    """Refuses a model whose vocabulary is smaller than the data's.

    Raises:
        InputError: names both and what to change.
    """
    if vocab_size < meta.vocab_size:
        raise InputError(
            f"{model}: vocab_size is {vocab_size}, but the data {data} have token ids up to {meta.vocab_size - 1}. "
            f"Set vocab_size: {meta.vocab_size} or tokenize the text again with a smaller vocabulary (--tokenizer)."
        )


def small_vocabulary_warning(data_vocab_size: int, vocab_size: int, *, data: Path | str) -> str | None:
    """Returns a warning for who trains a model on data of another tokenizer, if it looks so."""
    if 2 * data_vocab_size >= vocab_size:
        return None
    return (
        f"Warning: {data} has a vocabulary of {data_vocab_size}, the model one of {vocab_size}. If the data are to be "
        "the model's, make them with its tokenizer: mup-megatron data --tokenizer tokenizer.json …"
    )


def _again(prefix: Path) -> str:
    return f"Make the data again: mup-megatron data FILES… -o {prefix} --force"
