"""Text → tokens → Megatron's `.bin/.idx` → micro-batches.

    documents.py   files → documents (text)
    tokenizer.py   text → token ids
    prefix.py      the four files at a PREFIX: .bin, .idx, .tokenizer.json, .json
    writing.py     documents → these files
    reading.py     these files, checked
    embedded.py    the corpus that needs no download: the Python standard library's own source, cached
    dataset.py     PREFIX → Megatron's GPTDataset → the micro-batches of an iteration

Importing any of these imports neither torch nor Megatron: they are loaded by the functions that need them.
"""

from pathlib import Path
from typing import Protocol

CACHE = Path("results/cache")
"""Where what can be made again is kept, unless told otherwise: the embedded corpus and Megatron's sample indices."""


class ProgressFn(Protocol):
    """Told after every step of a long work how far it is; `stage` is a short phrase such as "tokenizing"."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """`done` of `total` steps of `stage` are over."""


def silent(stage: str, done: int, total: int, /) -> None:
    """A `ProgressFn` that shows nothing."""
