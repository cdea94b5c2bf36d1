"""Documents → four files at a PREFIX, and the check of what lies there.

    PREFIX.bin, PREFIX.idx     Megatron's indexed format, written by Megatron's own builder
    PREFIX.tokenizer.json      the tokenizer
    PREFIX.json                `DataMeta`: vocabulary, end of document, counts, where the data come from

Data made by Megatron's own tools need only a PREFIX.json with `vocab_size` and `eod` to be used here.
"""

import hashlib
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mup_megatron import __version__
from mup_megatron.errors import InputError
from mup_megatron.files import require_ordinary
from mup_megatron.megatron.versions import core_version_text
from mup_megatron.readback import read_json
from mup_megatron.training.data import Progress, silent
from mup_megatron.training.data.documents import Source
from mup_megatron.training.data.tokenizer import TextTokenizer
from mup_megatron.validation import Strict, validated

SUFFIXES = (".bin", ".idx", ".tokenizer.json", ".json")
"""The files at a PREFIX; metadata come last, because they say that the others are whole."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16
}  # fmt: skip
_FLOATS = {6, 7}
"""Types that Megatron's format has and tokens cannot be of."""
_BATCH_LETTERS = 1 << 20
_PIECES = 200
_INT32_MAX = 2**31 - 1
_CHUNK = 1 << 24
_SCANNED = 1 << 34
"""Bytes of tokens that are looked at when the indices of a run are made: it takes seconds."""


class Input(Strict):
    """One file that the data were made from."""

    name: str
    sha256: str
    bytes: int
    documents: int


class DataMeta(Strict):
    """The content of PREFIX.json. The same input gives the same content: no dates, no folders of this machine."""

    vocab_size: int = Field(ge=1)
    """A model's `vocab_size` must be at least this."""
    eod: int = Field(ge=0)
    """The token that ends a document."""
    documents: int | None = None
    sequences: int | None = None
    """Entries of the index. A long document has several, see `cut`."""
    tokens: int | None = None
    """Ends of documents included."""
    skipped_documents: int = 0
    """Documents without text, left out."""
    tokenizer: str | None = None
    """As asked for with `--tokenizer`."""
    tokenizer_sha256: str | None = None
    bin_sha256: str | None = None
    inputs: tuple[Input, ...] = Field(default=(), strict=False)
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Index:
    """What an `.idx` file says."""

    dtype: np.dtype[Any]
    sequence_lengths: npt.NDArray[np.int32]
    document_indices: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """How many tokens the `.bin` file must hold."""
        return int(self.sequence_lengths.sum(dtype=np.int64))


def write_data(
    prefix: Path,
    texts: Iterable[str],
    tokenizer: TextTokenizer,
    *,
    sources: Sequence[Source],
    spec: str,
    force: bool = False,
    progress: Progress = silent,
) -> DataMeta:
    """Tokenizes the documents and puts the four files at `prefix`; what was there stays until the new ones are whole.

    Args:
        prefix: folder and name of the files, without suffix.
        texts: the documents of `sources`, in order.
        tokenizer: turns text into ids.
        sources: where the documents come from.
        spec: the tokenizer as the user asked for it.
        force: replace what lies at `prefix`.
        progress: told how many documents are done.

    Raises:
        InputError: there are data already, Megatron-Core is missing, or the disk is full.
    """
    refuse_existing(prefix, force=force)
    with staging(prefix.parent) as folder:
        meta = write_files(folder / prefix.name, texts, tokenizer, sources=sources, spec=spec, progress=progress)
        _move(folder / prefix.name, prefix)
    return meta


def copy_data(source: Path, prefix: Path, *, force: bool = False) -> None:
    """Copies the files of one PREFIX to another; what was there stays until the new ones are whole.

    Raises:
        InputError: there are data already, or the disk is full.
    """
    refuse_existing(prefix, force=force)
    with staging(prefix.parent) as folder:
        for suffix in SUFFIXES:
            shutil.copyfile(at(source, suffix), at(folder / prefix.name, suffix))
        _move(folder / prefix.name, prefix)


def write_files(
    prefix: Path,
    texts: Iterable[str],
    tokenizer: TextTokenizer,
    *,
    sources: Sequence[Source],
    spec: str,
    progress: Progress = silent,
) -> DataMeta:
    """The work of `write_data`, straight to `prefix`: for a folder that nobody reads yet. Raises plain OSErrors."""
    try:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    except ImportError as error:
        raise InputError(
            f"writing Megatron's format needs Megatron-Core, which cannot be imported ({error}). "
            "Install it: pip install 'mup-megatron[megatron]'"
        ) from None
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(at(prefix, ".bin")), dtype=dtype)
    try:
        lengths: list[int] = []
        total = sum(source.documents for source in sources)
        for batch in _batches(texts):
            for ids in tokenizer.encode(batch):
                ids.append(tokenizer.eod)
                builder.add_document(np.array(ids, dtype=dtype), [len(ids)])
                lengths.append(len(ids))
            progress("tokenizing", len(lengths), total)
        # The .bin file is one stream of tokens; where the index cuts it is free until the index is written.
        builder.sequence_lengths, builder.document_indices = cut(lengths)
        builder.finalize(str(at(prefix, ".idx")))
    except BaseException:
        with suppress(OSError):
            builder.data_file.close()
        raise
    tokenizer_json = tokenizer.to_json().encode()
    at(prefix, ".tokenizer.json").write_bytes(tokenizer_json)
    meta = DataMeta(
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        documents=len(lengths),
        sequences=len(builder.sequence_lengths),
        tokens=sum(lengths),
        skipped_documents=sum(source.skipped for source in sources),
        tokenizer=spec,
        tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
        bin_sha256=_sha256(at(prefix, ".bin")),
        inputs=tuple(Input(name=s.name, sha256=s.sha256, bytes=s.bytes, documents=s.documents) for s in sources),
        versions={
            "mup-megatron": __version__,
            "megatron-core": core_version_text(),
            "tokenizers": version("tokenizers"),
        },
    )
    at(prefix, ".json").write_text(meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for suffix in SUFFIXES:
        with at(prefix, suffix).open("rb") as stream:
            os.fsync(stream.fileno())
    return meta


def cut(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Documents → sequences: no sequence holds more than a 200th of all tokens.

    Megatron splits training from validation, and shuffles, by whole sequences. With one sequence per document, as its
    own tool writes them, a single text file would have nothing to validate on. At most about 200 cuts are made in the
    whole corpus, however large, and none of them adds or drops a token.

    Args:
        lengths: tokens per document, end included.

    Returns:
        Tokens per sequence; and after how many sequences each document ends, starting with 0.
    """
    limit = min(max(1, -(-sum(lengths) // _PIECES)), _INT32_MAX)
    sequences: list[int] = []
    ends = [0]
    for length in lengths:
        whole, rest = divmod(length, limit)
        sequences += [limit] * whole + ([rest] if rest else [])
        ends.append(len(sequences))
    return sequences, ends


def check_prefix(prefix: Path) -> DataMeta:
    """The metadata of the data at `prefix`, once all files are there, whole, and belong together.

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
    """PREFIX.json.

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
    """PREFIX.idx, checked against its own size.

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
    """A sentence for who trains a model on data of another tokenizer, if it looks so."""
    if 2 * data_vocab_size >= vocab_size:
        return None
    return (
        f"Warning: {data} has a vocabulary of {data_vocab_size}, the model one of {vocab_size}. If the data are to be "
        "the model's, make them with its tokenizer: mup-megatron data --tokenizer tokenizer.json …"
    )


def refuse_existing(prefix: Path, *, force: bool) -> None:
    """Refuses a `prefix` that is a folder, or at which files lie that nobody asked to replace.

    Raises:
        InputError: names the first such file.
    """
    if prefix.is_dir() or not prefix.name:
        raise InputError(f"-o {prefix}: this is a folder. Add a name for the data, for example {prefix / 'text'}.")
    there = [at(prefix, suffix) for suffix in SUFFIXES if at(prefix, suffix).exists()]
    if there and not force:
        raise InputError(f"{there[0]}: there are data already. Choose another -o PREFIX, or replace them with --force.")


def at(prefix: Path, suffix: str) -> Path:
    """`prefix` with a suffix added; not `with_suffix`, which would eat a part of "v1.0"."""
    return prefix.parent / (prefix.name + suffix)


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A new, hidden folder within `parent`, for files that are renamed once whole. It is gone at the end.

    A process that is killed leaves it behind, where nothing looks.

    Raises:
        InputError: in place of any OSError inside.
    """
    folder = parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise InputError(
            f"{error.filename or parent}: cannot be written ({error.strerror or error}); "
            "what was there before is unchanged. Free some space or choose another place."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(staged: Path, prefix: Path) -> None:
    """Puts the files of `staged` in the place of `prefix`'s.

    Each is replaced whole. The old metadata go first: a process that is killed in between leaves data that
    `check_prefix` refuses, not old metadata beside new tokens.
    """
    at(prefix, SUFFIXES[-1]).unlink(missing_ok=True)
    for suffix in SUFFIXES:
        at(staged, suffix).replace(at(prefix, suffix))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents in groups large enough for all threads and small enough for memory."""
    batch: list[str] = []
    letters = 0
    for text in texts:
        batch.append(text)
        letters += len(text)
        if letters >= _BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _again(prefix: Path) -> str:
    return f"Make the data again: mup-megatron data FILES… -o {prefix} --force"
