"""What benchmarks that train many models share: processes, finished runs on disk, sweeps of rates, pictures."""

import gzip
import json
import math
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mup_megatron.training.train import TrainingResult


def start_worker(log: Path) -> None:
    """Imports once for many runs; what Megatron has to say goes to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from mup_megatron.training import ranks

    ranks.preload()
    import torch

    torch.set_num_threads(1)


@contextmanager
def forked_workers(number: int, log: Path) -> Iterator[ProcessPoolExecutor]:
    """A pool in which each run has a process of its own, forked from one that has imported everything."""
    # Its server knows no other folders than those of the environment.
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with ProcessPoolExecutor(
        number, mp_context=context, initializer=start_worker, initargs=(log,), max_tasks_per_child=1
    ) as pool:
        yield pool


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; what is given is told how many more there are of about `total`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number: progress.advance(task, number)


Loss = TypeVar("Loss")


def read_runs(file: Path) -> list[dict[str, Any]]:
    """Returns the lines of `KeptRuns`, from its file or from one that was packed with gzip.

    Raises:
        SystemExit: the file is missing or damaged; names the line.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = content.decode().splitlines()
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise SystemExit(f"{file}: no file of runs ({error}).") from None
    return [_run(line, source=f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def _run(line: str, *, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (RecursionError, ValueError):
        row = None
    if not (isinstance(row, dict) and isinstance(row.get("key"), list)):
        raise SystemExit(f"{source}: no run, as where one was stopped while it was written. Take the line out.")
    return row


class KeptRuns:
    """Finished runs, in a file of JSON lines: what has been trained is not trained again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = {_as_text(row["key"]): row for row in (read_runs(file) if file.exists() else [])}

    def found(self, key: Sequence[Any]) -> dict[str, Any] | None:
        """Returns the line of a run; None if it is not there. `key` is all that the run follows from."""
        return self._known.get(_as_text(key))

    def add(self, key: Sequence[Any], **told: Any) -> dict[str, Any]:
        """Writes the line of a run, and returns it."""
        # As it reads back, so that a run is the same whether it was found or trained.
        line = json.dumps({**told, "key": key})
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        row: dict[str, Any] = json.loads(line)
        self._known[_as_text(key)] = row
        return row

    def loss(self, key: Sequence[Any], train: "Callable[[], TrainingResult]", **told: object) -> float:
        """Returns the mean training loss of a run's last tenth; infinite if it diverges.

        Args:
            key: what the run follows from.
            train: trains, if the file does not have the run.
            told: what else its line says.
        """
        row = self.found(key)
        if row is None:
            result = train()
            loss = result.train_loss if result.status == "complete" and math.isfinite(result.train_loss) else None
            row = self.add(key, **told, loss=loss, seconds=round(result.seconds, 1))
        return math.inf if row["loss"] is None else float(row["loss"])


def bracketed(
    train: Callable[[float], Loss], rates: Sequence[float], *, most: int, mean: Callable[[Loss], float]
) -> dict[float, Loss]:
    """Returns learning rate → loss, at as many rates as it takes for the best to have one on either side.

    Args:
        train: a learning rate → its loss, or those of its seeds.
        rates: that are tried first; further ones follow by factors of 2.
        most: no further rate follows once there are so many.
        mean: what two rates are compared by.
    """
    losses: dict[float, Loss] = {}
    todo = list(rates)
    while todo and len(losses) < most:
        losses |= {lr: train(lr) for lr in todo}
        best = min(losses, key=lambda lr: mean(losses[lr]))
        todo = [lr for lr in (best / 2, best * 2) if lr not in losses]
    return losses


MOST_COLUMNS = 4
"""Panels beside each other in a picture."""


def basin_panels(
    panels: Mapping[str, Mapping[str, tuple[Mapping[float, Sequence[float]], float]]], *, what: str = "loss at the end"
) -> bytes:
    """Returns a PNG: a panel for each title, and in it a line for each label: mean loss over log2(learning rate).

    Args:
        panels: title → label → (learning rate → the losses of its seeds, log2 of the optimum).
        what: the losses are.
    """
    import io

    import matplotlib.figure

    columns = min(len(panels), MOST_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure = matplotlib.figure.Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for label, (losses, optimum) in lines.items():
            finite = {lr: fmean(v) for lr, v in sorted(losses.items()) if math.isfinite(fmean(v))}
            [line] = axis.plot([math.log2(lr) for lr in finite], [*finite.values()], marker="o", label=label)
            axis.axvline(optimum, color=line.get_color(), linestyle=":")
        axis.set_title(title)
        axis.set_xlabel("log2 of the learning rate")
        axis.tick_params(labelbottom=True)  # the last row may have fewer panels
        axis.legend()
    for axis in axes[:, 0]:
        axis.set_ylabel(what)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _as_text(key: Sequence[Any]) -> str:
    return json.dumps(key, sort_keys=True)
