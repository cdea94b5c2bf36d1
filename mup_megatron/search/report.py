"""The progress that a sweep shows, and the files that it leaves beside its study. Reads trials, runs none."""

import csv
import io
import json
from collections import Counter
from pathlib import Path
from types import TracebackType

import sqlalchemy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mup_megatron.files import write_atomically
from mup_megatron.json_io import finite
from mup_megatron.search.study import StudyRecord, Trial


def trials_csv(record: StudyRecord) -> str:
    """Returns all trials as CSV, one row each, hyperparameters last. Numbers in full precision.

    On a ladder, `rung` and `candidate` say where each is. Where they are the best of another study, `source_trial` and
    `source_loss` say which each is, and what it came to.
    """
    names = list(record.spec.space.ranges)
    selection = record.spec.selection
    source = [] if selection is None else ["source_trial", "source_loss"]
    ladder = record.spec.ladder
    place = [] if ladder is None else ["rung", "candidate"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["number", "slot", "state", "loss", "seconds", "reason", *place, *source, *names])
    for trial in record.trials:
        of: list[object] = []
        if selection is not None:
            candidate = selection.at(trial.slot)
            of = [None, None] if candidate is None else [candidate.trial, candidate.loss]
        at = [] if ladder is None else ladder.place(trial.slot)
        drawn = [trial.parameters.get(name) for name in names]
        writer.writerow(
            [trial.number, trial.slot, trial.state, trial.loss, trial.seconds, trial.reason, *at, *of, *drawn]
        )
    return stream.getvalue()


def best_json(record: StudyRecord) -> str:
    """Returns the best trial, and the study that it is the best of, as JSON. `trial` is null if none is complete."""
    best = record.best
    content = {
        "study": record.spec.name,
        "storage": sqlalchemy.make_url(record.spec.storage).render_as_string(hide_password=True),
        **record.spec.recorded(),
        "trials": dict(sorted(Counter(trial.state for trial in record.trials).items())),
        "trial": None
        if best is None
        else {
            "number": best.number,
            "slot": best.slot,
            "loss": best.loss,
            "parameters": dict(best.parameters),
            "seconds": best.seconds,
            "metrics": finite(best.metrics),
        },
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_results(record: StudyRecord, csv_file: Path | None, best_file: Path | None) -> None:
    """Writes the files that are asked for, each whole or not at all.

    Raises:
        InputError: a file cannot be written; what was there before is unchanged.
    """
    if csv_file is not None:
        write_atomically(csv_file, trials_csv(record))
    if best_file is not None:
        write_atomically(best_file, best_json(record))


class SweepProgress:
    """A bar on a terminal, one line per trial elsewhere; on standard error. Starts no thread."""

    def __init__(self, total: int) -> None:
        """`total`: the number of trials that the sweep is to finish."""
        self._total = total
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            # A refreshing thread would be one more thread beside processes that fork.
            auto_refresh=False,
            disable=not self.has_bar,
        )
        self._task = self._bar.add_task("", total=total)

    @property
    def has_bar(self) -> bool:
        """True if standard error is a terminal."""
        return self._console.is_terminal

    def __enter__(self) -> "SweepProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, settled: int, running: int, best: Trial | None) -> None:
        """Brings the bar up to date."""
        text = f"{running} running"
        if best is not None:
            text += f", best {best.loss:.4f} (trial {best.number})"
        self._bar.update(self._task, completed=settled, description=text)
        self._bar.refresh()

    def ended(self, trial: Trial, settled: int) -> None:
        """Prints that a trial has ended. On a terminal only trouble gets a line of its own."""
        if self.has_bar and trial.state == "complete":
            return
        drawn = " ".join(f"{name}={value:.4g}" for name, value in trial.parameters.items())
        result = f"loss {trial.loss:.6g}" if trial.loss is not None else trial.state
        seconds = f" after {trial.seconds:.1f} s" if trial.seconds is not None else ""
        reason = f": {trial.reason}" if trial.reason is not None else ""
        self.say(f"[{settled}/{self._total}] trial {trial.number}: {result}{seconds}{reason} ({drawn})")

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self._bar.console.print(text, markup=False)
