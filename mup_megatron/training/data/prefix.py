"""The four files at a PREFIX: what they are called, what their metadata say, and how they take each other's place.

PREFIX.bin, PREFIX.idx     Megatron's indexed format, written by Megatron's own builder
PREFIX.tokenizer.json      the tokenizer
PREFIX.json                `DataMeta`: vocabulary, end of document, counts, where the data come from
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import Field

from mup_megatron.errors import InputError
from mup_megatron.validation import Strict

SUFFIXES = (".bin", ".idx", ".tokenizer.json", ".json")
"""The files at a PREFIX; metadata come last, because they say that the others are whole."""


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


def at(prefix: Path, suffix: str) -> Path:
    """Returns `prefix` with a suffix added; not `with_suffix`, which would eat a part of "v1.0"."""
    return prefix.parent / (prefix.name + suffix)


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


def copy_data(source: Path, prefix: Path, *, force: bool = False) -> None:
    """Copies the files of one PREFIX to another; what was there stays until the new ones are whole.

    Raises:
        InputError: there are data already, or the disk is full.
    """
    refuse_existing(prefix, force=force)
    with staging(prefix.parent) as folder:
        for suffix in SUFFIXES:
            shutil.copyfile(at(source, suffix), at(folder / prefix.name, suffix))
        move(folder / prefix.name, prefix)


def move(staged: Path, prefix: Path) -> None:
    """Puts the files of `staged` in the place of `prefix`'s.

    Each is replaced whole. The old metadata go first: a process that is killed in between leaves data that
    `check_prefix` refuses, not old metadata beside new tokens.
    """
    at(prefix, SUFFIXES[-1]).unlink(missing_ok=True)
    for suffix in SUFFIXES:
        at(staged, suffix).replace(at(prefix, suffix))


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """Makes a new, hidden folder within `parent`, for files that are renamed once whole. It is gone at the end.

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


def publish(folder: Path, home: Path) -> None:
    """Renames a folder that is whole; where another process was faster, its files are the same and stay.

    Raises:
        OSError: it cannot be renamed for any other reason.
    """
    try:
        os.rename(folder, home)
    except OSError:
        if not home.is_dir():
            raise


def remove_damaged(home: Path) -> None:
    """Removes a folder that somebody damaged: first out of the way, since others may look at this moment."""
    with staging(home.parent) as folder, suppress(FileNotFoundError):
        os.rename(home, folder / "damaged")
