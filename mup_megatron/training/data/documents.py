"""Text files → documents. A plain file is one document; a `.jsonl` file has one per line, under its key "text".

Reads and checks; knows nothing of tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.files import require_ordinary
from mup_megatron.readback import parse_json
from mup_megatron.training.data import ProgressFn, silent


@dataclass(frozen=True)
class Source:
    """One input file, read once from end to end and found to be sound."""

    path: Path
    name: str
    """How metadata call the file: the same on every machine where the file is the same."""
    sha256: str
    bytes: int
    documents: int
    """Documents with any text in them."""
    skipped: int
    """Documents without text (lines of a `.jsonl` file). They are left out."""


def scan(
    paths: Sequence[Path], *, names: Sequence[str] | None = None, progress: ProgressFn = silent
) -> tuple[Source, ...]:
    """Reads every file once, so that whatever is wrong with the last one is said before any work is done.

    Raises:
        InputError: a file is missing, unreadable, empty, not UTF-8, or a line is not `{"text": "…"}`.
    """
    sources = []
    for count, path in enumerate(paths, start=1):
        texts = list(map(bool, _texts(path)))
        if not any(texts):
            raise InputError(f"{path}: there is no text in this file. Leave it out or fill it.")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        sources.append(
            Source(
                path=path,
                name=names[count - 1] if names else str(path),
                sha256=digest,
                bytes=path.stat().st_size,
                documents=sum(texts),
                skipped=len(texts) - sum(texts),
            )
        )
        progress("reading", count, len(paths))
    return tuple(sources)


def documents(sources: Sequence[Source]) -> Iterator[str]:
    """Yields the text of every document that has any, in the order of the files and, within a file, of its lines."""
    for source in sources:
        yield from filter(None, _texts(source.path))


def _texts(path: Path) -> Iterator[str]:
    try:
        require_ordinary(path)
        if path.suffix == ".jsonl":
            yield from _json_lines(path)
        else:
            # Bytes, not text mode: line ends stay what they are, so that tokens decode to the very same file.
            yield _utf8(path.read_bytes(), path, start=0)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Give the path of a text file or of a .jsonl file.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder. Name the files in it, for example {path}/*.txt.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the file and its permissions.") from None


def _json_lines(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = _utf8(line, path, start=offset)
            offset += len(line)
            if not text.strip():
                continue
            where = f"{path}: line {number}"
            content = parse_json(
                text, source=where, remedy='Every line of a .jsonl file is an object like {"text": "…"}.'
            )
            found = content.get("text") if isinstance(content, dict) else None
            if not isinstance(found, str):
                raise InputError(f'{where} has no text under the key "text". Write {{"text": "…"}} on every line.')
            try:
                found.encode()
            except UnicodeEncodeError:
                # JSON can spell half of a surrogate pair ("\ud800"), which is no character.
                raise InputError(f"{where} holds half a surrogate pair, which is no character. Mend it.") from None
            yield found


def _utf8(data: bytes, path: Path, *, start: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {start + error.start}. "
            f"Convert the file, for example: iconv -f latin1 -t utf-8 {path.name} > new.txt"
        ) from None
