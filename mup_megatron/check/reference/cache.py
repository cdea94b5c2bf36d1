"""References and controls, kept on disk: they depend on architecture and recipe alone, and are the slower half."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mup_megatron.check.measure.measurements import Measured
from mup_megatron.files import write_atomically

FOLDER = Path("results/check/references")
_WHAT_COUNTS = (
    "batches",
    "levels",
    "measurements",
    "measuring",
    "module_reference",
    "plain_gpt",
    "reference",
    "replay",
    "run",
)


def cached(folder: Path | None, facts: object, make: Callable[[], Measured]) -> Measured:
    """What `make` gives, or gave before for the same facts; a file that cannot be read is made anew.

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


def _read(text: str) -> Measured:
    """The measurement in a file. Raises ValueError, LookupError, TypeError or RecursionError for one that is damaged.

    Without the hash a file that lacks a number, or has another, would decide a verdict.
    """
    content = json.loads(text)
    if content["sha256"] != _digest(content["runs"]):
        raise ValueError("not what was written")
    return Measured.from_json(content["runs"])


def _digest(runs: object) -> str:
    return hashlib.sha256(json.dumps(runs).encode()).hexdigest()


def has(folder: Path | None, facts: object) -> bool:
    """Whether there is a file for the same facts."""
    return folder is not None and _path(folder, facts).exists()


def _path(folder: Path, facts: object) -> Path:
    content = json.dumps([_code(), version("torch"), facts], sort_keys=True)
    return folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"


@cache
def _code() -> str:
    """Changes whenever the code that measures or that makes plans does."""
    package = Path(__file__).parents[1]
    files = [package / "recipe.py", *(package / "check" / f"{name}.py" for name in _WHAT_COUNTS)]
    files += sorted([*(package / "theory").glob("*.py"), *(package / "models").glob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
