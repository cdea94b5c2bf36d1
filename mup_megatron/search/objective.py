"""Objectives, which run trials, and the outcomes of these. Knows nothing of processes, studies or Optuna."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

ReportFn: TypeAlias = Callable[[int, float], None]
"""`report(step, loss)`: an intermediate value. Each costs a write to the storage: report tens, not thousands."""


@dataclass(frozen=True)
class TrialOutcome:
    """The outcome of a trial."""

    loss: float | None
    """What the search minimises. None, NaN or infinite: the trial diverged."""
    diverged: bool = False
    """Whether the trial says that it diverged. Its loss is not used then."""
    reason: str | None = None
    """Why it diverged, for people."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, as JSON would hold it."""

    def checked(self) -> "TrialOutcome":
        """Returns the same outcome, diverged if its loss is no finite number, and with a reason if it diverged."""
        if self.diverged:
            return TrialOutcome(None, True, self.reason or "diverged", self.metrics)
        if self.loss is None or not math.isfinite(self.loss):
            return TrialOutcome(None, True, self.reason or f"the loss is {self.loss}", self.metrics)
        return self


Objective: TypeAlias = Callable[[Mapping[str, float], ReportFn], TrialOutcome]
"""Runs one trial with the given hyperparameters. A forked trial may be any callable; a spawned one must pickle."""

Objectives: TypeAlias = Objective | Sequence[Objective]
"""An objective for every trial, or one for each rung of a ladder."""


@dataclass(frozen=True)
class Interruption:
    """Tells a trial that can go on elsewhere which one it is, where to keep its state, and when to leave."""

    number: int
    """The trial's in its study."""
    folder: Path
    """Where it keeps its state; it need not exist. What is in it was left by this trial."""
    requested: Callable[[], bool]
    """True from the moment on that the trial is to keep its state and leave."""


@runtime_checkable
class Resumable(Protocol):
    """An objective whose trials can be stopped and go on in another process, also on another machine."""

    def resume(
        self, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
    ) -> TrialOutcome | None:
        """Runs a trial, from the state in the folder if there is one; returns None once it has stopped as requested."""


def can_resume(objective: Objectives) -> bool:
    """Says if trials can be stopped and go on elsewhere."""
    return all(isinstance(each, Resumable) for each in ([objective] if callable(objective) else objective))
