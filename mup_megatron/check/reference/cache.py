"""References and controls, kept on disk: they depend on architecture and recipe alone, and are the slower half."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mup_megatron.check.measure.measurements import Measurements
from mup_megatron.files import write_atomically

FOLDER = Path("results/check/references")
_PACKAGE = Path(__file__).parents[2]
_WHAT_COUNTS = (
    *("recipe.py", "theory", "architectures", "training/samples.py"),
    *("check/entries.py", "check/gpt_family.py", "check/measure", "check/reference"),
)
"""Files and folders of the package whose code a reference follows from, beside its facts."""


def cached(folder: Path | None, facts: object, make: Callable[[], Measurements]) -> Measurements:
    """Returns what `make` gives, or gave before for the same facts; a file that cannot be read is made anew.

    Args:
        folder: None keeps nothing.
        facts: plain values, everything that the measurement follows from but this package's code and torch.
        make: measures.
    """
    if folder is None:
        return make()
    path = _path(folder, facts)
    try:
        return _read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        measured = make()
        folder.mkdir(parents=True, exist_ok=True)
        runs = measured.to_json()
        write_atomically(path, json.dumps({"sha256": _digest(runs), "runs": runs}))
        return measured


def _read(text: str) -> Measurements:
    """The measurement in a file. Raises ValueError, LookupError, TypeError or RecursionError for one that is damaged.

    Without the hash a file that lacks a number, or has another, would decide a verdict.
    """
    content = json.loads(text)
    if content["sha256"] != _digest(content["runs"]):
        raise ValueError("not what was written")
    return Measurements.from_json(content["runs"])


def _digest(runs: object) -> str:
    return hashlib.sha256(json.dumps(runs).encode()).hexdigest()


def has(folder: Path | None, facts: object) -> bool:
    """Returns whether there is a file for the same facts."""
    return folder is not None and _path(folder, facts).exists()


def _path(folder: Path, facts: object) -> Path:
    content = json.dumps([_code(), version("torch"), facts], sort_keys=True)
    return folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"


@cache
def _code() -> str:
    """Changes whenever the code that measures or that makes plans does."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files_that_count())).hexdigest()


def files_that_count() -> list[Path]:
    """Returns the files whose code a reference follows from."""
    found = []
    for path in (_PACKAGE / name for name in _WHAT_COUNTS):
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return found
