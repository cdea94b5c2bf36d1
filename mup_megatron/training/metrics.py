"""The measurements of a run: `metrics.csv`, one row per iteration, `validation.csv`, and if the run diverged.

Knows neither torch nor Megatron.
"""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.validation import brief

DIVERGED_ABOVE = 1.0
"""Nats above the first iteration's loss at which a run counts as lost, if it stays there …"""
DIVERGED_ITERATIONS = 20
"""… for so many iterations on end. A bump during warm-up is shorter or lower."""

LAST_SHARE = 0.1
"""A run's training loss is the mean over this last share of its iterations."""


class TrainingRow(NamedTuple):
    """One iteration of training: a line of `metrics.csv`."""

    iteration: int
    """From 1."""
    loss: float
    """Mean over the global batch, before the update."""
    lr: float
    """The base's in this update; every parameter's own is in its plan's ratio to it."""
    grad_norm: float
    """Before clipping, over the whole model."""


class ValidationRow(NamedTuple):
    """One validation: a line of `validation.csv`."""

    iteration: int
    """After this many iterations."""
    loss: float


RowT = TypeVar("RowT", TrainingRow, ValidationRow)


def to_csv(kind: type[RowT], rows: Iterable[RowT], *, header: bool = True) -> str:
    """Returns rows as CSV text. Every number reads back as the same bits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(kind._fields)
    for row in rows:
        writer.writerow([repr(value) for value in row])
    return text.getvalue()


def from_csv(kind: type[RowT], text: str, *, source: str) -> list[RowT]:
    """Reads the rows that `to_csv` wrote.

    Raises:
        InputError: it is something else, or truncated; `source` names it.
    """
    reader = csv.reader(io.StringIO(text))
    try:
        if tuple(next(reader, ())) != kind._fields:
            raise ValueError("the first line is not " + ",".join(kind._fields))
        rows = [kind(int(line[0]), *map(float, line[1:])) for line in reader]
        if not all(math.isfinite(value) for row in rows for value in row):
            raise ValueError("a value is not a finite number")
        if any(after.iteration <= before.iteration for before, after in itertools.pairwise(rows)):
            raise ValueError("its iterations do not rise")
    except (ValueError, TypeError, IndexError, OverflowError, csv.Error) as error:
        raise InputError(
            f"{source}: not the measurements of a run ({brief(error)}). Restore it, or remove it."
        ) from None
    return rows


class RowFile(Generic[RowT]):
    """A CSV file as it grows. A row has left this process when `append` returns, so a killed run loses none."""

    def __init__(self, path: Path, kind: type[RowT], rows: Sequence[RowT]) -> None:
        """Makes the file hold `rows` and nothing else: what a run that is gone on with had measured.

        Raises:
            InputError: the folder cannot be written or the disk is full.
        """
        self.path = path
        self._kind: type[RowT] = kind
        write_atomically(path, to_csv(kind, rows))
        # Without a buffer, or closing it would try again to write what could not be written.
        self._file = path.open("ab", buffering=0)

    def append(self, row: RowT) -> None:
        """Adds a row.

        Raises:
            InputError: the disk is full.
        """
        try:
            left = to_csv(self._kind, [row], header=False).encode()
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}). Free some space, then go on with --load."
            ) from None

    def close(self) -> None:
        """No rows follow."""
        self._file.close()


def divergence(rows: Sequence[TrainingRow]) -> str | None:
    """Says why the run is lost as of its last row; None while it is not.

    It is lost when loss or gradient norm is not a finite number, or when the loss of each of the last
    DIVERGED_ITERATIONS iterations was more than DIVERGED_ABOVE above the first iteration's.
    """
    last = rows[-1]
    if not math.isfinite(last.loss):
        return f"the loss of iteration {last.iteration} is {last.loss}"
    if not math.isfinite(last.grad_norm):
        return f"the gradient norm of iteration {last.iteration} is {last.grad_norm}"
    limit = rows[0].loss + DIVERGED_ABOVE
    recent = rows[-DIVERGED_ITERATIONS:]
    if len(recent) == DIVERGED_ITERATIONS and all(row.loss > limit for row in recent):
        return (
            f"the loss was more than {DIVERGED_ABOVE:g} above the first iteration's {rows[0].loss:.4g} for "
            f"{DIVERGED_ITERATIONS} iterations up to {last.iteration}, where it is {last.loss:.4g}"
        )
    return None


def train_loss(rows: Sequence[TrainingRow]) -> float:
    """Returns the mean loss over the last LAST_SHARE of the iterations, at least one."""
    count = max(1, round(LAST_SHARE * len(rows)))
    return math.fsum(row.loss for row in rows[-count:]) / count
