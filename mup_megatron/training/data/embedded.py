"""The corpus that needs no download: the source of the Python standard library on this machine, tokenized once.

It lies in a cache whose folders appear whole or not at all, so several processes may ask for it at the same moment.
"""

import hashlib
import json
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.files import read_text
from mup_megatron.megatron.versions import core_version_text
from mup_megatron.training.data import CACHE, ProgressFn, silent
from mup_megatron.training.data.documents import Source, documents, scan
from mup_megatron.training.data.prefix import DataMeta, publish, remove_damaged, staging
from mup_megatron.training.data.reading import check_prefix
from mup_megatron.training.data.tokenizer import DEFAULT_TOKENIZER, TokenizerSpec, make_tokenizer, parse_tokenizer
from mup_megatron.training.data.writing import write_files

_FORMAT = 1
"""Counted up when the same sources and settings begin to give other files."""

_NAME = "stdlib"
_LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__"),  # not the standard library's
    *("test", "tests", "idlelib", "idle_test", "turtledemo", "ensurepip", "lib2to3"),  # missing on many systems
    "encodings",  # a million letters of character tables
}
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"


def embedded_data(
    cache_dir: Path = CACHE,
    *,
    tokenizer: str = DEFAULT_TOKENIZER,
    eod_token: str | None = None,
    progress: ProgressFn = silent,
) -> Path:
    """Returns the PREFIX of the embedded corpus, which is made at the first call.

    A folder of the cache is named after the Python version and a hash of the sources, the tokenizer and the versions of
    what writes it. Takes about 10 s the first time, later as long as reading 9 MB takes.

    Args:
        cache_dir: the cache; `embedded/` within it is used.
        tokenizer: as in `--tokenizer`.
        eod_token: see `make_tokenizer`.
        progress: told how far the work is.

    Raises:
        InputError: this Python has no sources of its library, the tokenizer is not one, or the disk is full.
    """
    spec = parse_tokenizer(tokenizer)
    sources = embedded_sources(progress=progress)
    home = cache_dir / "embedded" / f"python-{_PYTHON}-{_key(sources, spec, eod_token)}"
    prefix = home / _NAME
    if home.exists():
        try:
            check_prefix(prefix)
        except InputError:
            remove_damaged(home)
        else:
            return prefix
    with staging(home.parent) as folder:
        _write(folder / _NAME, sources, spec, eod_token, progress)
        publish(folder, home)
    return prefix


def embedded_sources(*, progress: ProgressFn = silent) -> tuple[Source, ...]:
    """Returns the files of the corpus, in an order that has nothing to do with their subjects.

    Megatron validates on the last documents. In alphabetical order that would be `xml`, `zipfile` and `zoneinfo`.

    Raises:
        InputError: this Python comes without the sources of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for path in library.rglob("*.py"):
        within = path.relative_to(library)
        # _sysconfigdata_….py holds the paths of the machine that built this Python.
        if not (_LEFT_OUT & set(within.parts) or within.name.startswith("_sysconfigdata")) and _is_text(path):
            found[within.as_posix()] = path
    if not found:
        raise InputError(f"{library}: this Python lacks the sources of its library. Give text: data FILES… -o PREFIX")
    names = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    return scan([found[name] for name in names], names=names, progress=progress)


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError):
        return False


def _key(sources: tuple[Source, ...], spec: TokenizerSpec, eod_token: str | None) -> str:
    tokenizer = read_text(Path(spec.text), remedy="Give a tokenizer.json.") if spec.kind == "file" else spec.text
    settings = {
        "format": _FORMAT,
        "python": _PYTHON,
        "corpus": [(source.name, source.sha256) for source in sources],
        "tokenizer": [tokenizer, eod_token],
        "versions": [version("tokenizers"), core_version_text()],
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _write(
    prefix: Path, sources: tuple[Source, ...], spec: TokenizerSpec, eod_token: str | None, progress: ProgressFn
) -> DataMeta:
    progress("preparing the tokenizer", 0, 1)
    made = make_tokenizer(spec, lambda: documents(sources), eod_token=eod_token)
    progress("preparing the tokenizer", 1, 1)
    return write_files(prefix, documents(sources), made, sources=sources, spec=spec.text, progress=progress)
