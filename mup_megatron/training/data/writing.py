"""Documents → the four files at a PREFIX, through Megatron's own builder."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mup_megatron import __version__
from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version_text
from mup_megatron.training.data import ProgressFn, silent
from mup_megatron.training.data.documents import Source
from mup_megatron.training.data.prefix import SUFFIXES, DataMeta, Input, at, move, refuse_existing, staging
from mup_megatron.training.data.tokenizer import TextTokenizer

_BATCH_LETTERS = 1 << 20
_PIECES = 200
_INT32_MAX = 2**31 - 1


def write_data(
    prefix: Path,
    texts: Iterable[str],
    tokenizer: TextTokenizer,
    *,
    sources: Sequence[Source],
    spec: str,
    force: bool = False,
    progress: ProgressFn = silent,
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
        move(folder / prefix.name, prefix)
    return meta


def write_files(
    prefix: Path,
    texts: Iterable[str],
    tokenizer: TextTokenizer,
    *,
    sources: Sequence[Source],
    spec: str,
    progress: ProgressFn = silent,
) -> DataMeta:
    """Writes what `write_data` does straight to `prefix`: for a folder nobody reads yet. Raises plain OSErrors."""
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


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups documents: large enough for all threads and small enough for memory."""
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
