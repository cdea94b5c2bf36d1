"""The standing of a search: trials, cost and time, on each rung. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mup_megatron.search.study import StudyRecord, Trial


@dataclass(frozen=True)
class RungStanding:
    """The standing of one rung; of a search without a ladder, of all of it."""

    complete: int
    diverged: int
    failed: int
    """Slots that were given up: they have no result."""
    running: int
    left: int
    """Slots that are still to have a result, the running ones among them."""
    best: Trial | None
    """The complete trial with the lowest loss."""
    seconds: float | None
    """What a trial with a result took, on average."""
    cost: float | None
    """Of one trial, in the budget's unit."""

    @property
    def finished(self) -> int:
        """The number of trials with a result."""
        return self.complete + self.diverged

    @property
    def spent(self) -> float | None:
        """The cost of the trials with a result."""
        return None if self.cost is None else self.finished * self.cost

    @property
    def ahead(self) -> float | None:
        """The cost of the trials that are left."""
        return None if self.cost is None else self.left * self.cost


@dataclass(frozen=True)
class Standing:
    """The standing of a search."""

    rungs: tuple[RungStanding, ...]
    budget: float | None
    """What the ladder was made for."""

    @property
    def running(self) -> int:
        """The number of trials that run."""
        return sum(rung.running for rung in self.rungs)

    @property
    def spent(self) -> float | None:
        """The cost of all trials with a result."""
        costs = [rung.spent for rung in self.rungs]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    @property
    def seconds_left(self) -> float | None:
        """About how long the search still takes, with as many trials at a time as now; None if nothing says.

        A rung without a result takes as much longer than one that has some as it costs more. A running trial counts as
        half done.
        """
        timed = [rung for rung in self.rungs if rung.seconds is not None]
        left = [rung.left - rung.running / 2 for rung in self.rungs]
        if not timed or (self.running == 0 and any(left)):
            return None
        total = sum(count * _seconds(rung, timed) for count, rung in zip(left, self.rungs, strict=True))
        return total / max(1, self.running)


def _seconds(rung: RungStanding, timed: Sequence[RungStanding]) -> float:
    """Returns what a trial of a rung takes, of `timed` ones as its own have, or else as the dearest of those."""
    like = rung if rung in timed else timed[-1]
    assert like.seconds is not None
    return like.seconds if rung.cost is None or like.cost is None else like.seconds * rung.cost / like.cost


def standing(record: StudyRecord, *, cost: float | None = None) -> Standing:
    """Returns how far a search is.

    Args:
        record: the study.
        cost: of a trial, in a study without a ladder.
    """
    ladder = record.spec.ladder
    if ladder is None:
        return Standing((_rung(record.trials, record.size, cost),), None)
    rungs: list[RungStanding] = []
    for number, rung in enumerate(ladder.rungs):
        trials = [trial for trial in record.trials if record.rung_of(trial) == number]
        wanted = rung.trials
        if rungs and not rungs[-1].left:
            wanted = min(wanted, rungs[-1].complete)
        rungs.append(_rung(trials, wanted, rung.fidelity.cost))
    return Standing(tuple(rungs), ladder.budget)


def _rung(trials: Sequence[Trial], wanted: int, cost: float | None) -> RungStanding:
    slots: dict[int, list[str]] = {}
    for trial in trials:
        slots.setdefault(trial.slot, []).append(trial.state)
    states = ["diverged" if "diverged" in found else "complete" for found in slots.values() if _has_result(found)]
    failed = sum(all(state == "failed" for state in found) for found in slots.values())
    seconds = [trial.seconds for trial in trials if trial.finished and trial.seconds is not None]
    return RungStanding(
        complete=states.count("complete"),
        diverged=states.count("diverged"),
        failed=failed,
        running=sum("running" in found and not _has_result(found) for found in slots.values()),
        left=max(0, wanted - len(states) - failed),
        best=min((trial for trial in trials if trial.loss is not None), key=_loss, default=None),
        seconds=sum(seconds) / len(seconds) if seconds else None,
        cost=cost,
    )


def _has_result(states: Sequence[str]) -> bool:
    return "complete" in states or "diverged" in states


def _loss(trial: Trial) -> float:
    return math.inf if trial.loss is None else trial.loss
