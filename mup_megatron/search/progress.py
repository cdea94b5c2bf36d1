"""The progress that a sweep shows on standard error: a live table on a terminal, lines elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mup_megatron.search.standing import RungStanding, Standing, standing
from mup_megatron.search.study import StudyRecord, Trial

_BAR = 24
"""Characters."""


class SweepProgress:
    """A table of rungs on a terminal, one line for each trial elsewhere; on standard error. Starts no thread."""

    def __init__(self, total: int, called: Sequence[str]) -> None:
        """`total`: how many trials the sweep is to finish; `called`: what its rungs are, if it has a ladder."""
        self._total = total
        self._called = called
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        # A refreshing thread would be one more thread beside processes that fork.
        self._live = Live(console=self._console, auto_refresh=False)
        self._begun = time.monotonic()
        self._over: set[int] = set()
        """Rungs of which it has been said that they are over."""

    @property
    def has_table(self) -> bool:
        """True if standard error is a terminal."""
        return self._console.is_terminal

    def __enter__(self) -> "SweepProgress":
        if self.has_table:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, record: StudyRecord) -> None:
        """Brings the table up to date."""
        self._live.update(progress_table(standing(record), self._called, time.monotonic() - self._begun), refresh=True)

    def ended(self, trial: Trial, record: StudyRecord, settled: int) -> None:
        """Prints that a trial has ended, and its rung if it was the last. On a terminal only trouble gets a line."""
        if self.has_table and trial.state == "complete":
            return
        drawn = " ".join(f"{name}={value:.4g}" for name, value in trial.parameters.items())
        result = f"loss {trial.loss:.6g}" if trial.loss is not None else trial.state
        seconds = f" after {trial.seconds:.1f} s" if trial.seconds is not None else ""
        reason = f": {trial.reason}" if trial.reason is not None else ""
        number = record.rung_of(trial)
        rung = f" on rung {number}" if self._called else ""
        self.say(f"[{settled}/{self._total}] trial {trial.number}{rung}: {result}{seconds}{reason} ({drawn})")
        if self._called and not self.has_table:
            self._say_if_over(number, standing(record))

    def _say_if_over(self, number: int, found: Standing) -> None:
        if number in self._over or any(rung.left for rung in found.rungs[: number + 1]):
            return
        self._over.add(number)
        left = found.seconds_left
        self.say(
            f"rung {number} ({self._called[number]}) is over: best {_best(found.rungs[number])}, {_spent(found)}"
            + (f", about {duration(left)} left" if left else "")
        )

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.print(text, markup=False)


def progress_table(found: Standing, called: Sequence[str], elapsed: float) -> Group:
    """Returns how far a search is, as it is shown while it runs; one row without a ladder."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rung" if called else "")
    table.add_column("")
    for title in ("done", "running", "left", "diverged", "best"):
        table.add_column(title, justify="right")
    for number, rung in enumerate(found.rungs):
        done = rung.finished + rung.failed
        table.add_row(
            Text(called[number] if called else "trials"),
            ProgressBar(total=max(1, done + rung.left), completed=done, width=_BAR),
            *map(str, (done, rung.running, rung.left - rung.running, rung.diverged)),
            _best(rung),
        )
    left = found.seconds_left
    words = [_spent(found), f"{duration(elapsed)} elapsed", f"about {duration(left)} left" if left else ""]
    return Group(table, Text(", ".join(filter(None, words))))


def duration(seconds: float) -> str:
    """Returns a time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _best(rung: RungStanding) -> str:
    return "-" if rung.best is None else f"{rung.best.loss:.4f} (trial {rung.best.number})"


def _spent(found: Standing) -> str:
    return "" if found.budget is None else f"{found.spent or 0.0:.3g} of {found.budget:.3g} FLOPs spent"
