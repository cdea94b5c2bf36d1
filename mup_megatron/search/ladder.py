"""A search over fidelities: which trials are cheap and which are whole, and who goes on from one to the next. Pure.

A **rung** is one way of running a trial: its settings, what it costs, and how many trials there are of it. On the
lowest are all **candidates**, drawn as in any search; on each further one the best of the rung below, with their
hyperparameters. Only trials of the last rung, the whole ones, are compared for the answer.

A candidate goes on as soon as it is *certain* to be among the best of its rung, whatever those that still run come to.
So workers seldom wait for each other, and which trials are run depends neither on their number nor on the order of
results. A trial that diverged, or was given up, is the worst.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mup_megatron.errors import InputError

MOST_TRIALS = 1_000_000
"""Of a study, with a ladder or without. Every look at it goes through all of them."""


@dataclass(frozen=True)
class Fidelity:
    """One way of running a trial."""

    settings: Mapping[str, Any]
    """In what it differs from a whole trial, and whatever tells it from others, as JSON would hold it."""
    cost: float
    """Of one trial, in the budget's unit."""


@dataclass(frozen=True)
class Rung:
    """A fidelity with the number of trials that are run at it."""

    fidelity: Fidelity
    trials: int

    @property
    def cost(self) -> float:
        """The cost of all its trials."""
        return self.trials * self.fidelity.cost


@dataclass(frozen=True)
class Ladder:
    """The rungs of a search, the cheapest first. A slot of its study is a candidate on a rung."""

    budget: float
    """What it was made for: at least its cost."""
    rungs: tuple[Rung, ...]

    @property
    def candidates(self) -> int:
        """The number of trials on the lowest rung."""
        return self.rungs[0].trials

    @property
    def trials(self) -> int:
        """The number of trials on all rungs, of which there are fewer where many diverge."""
        return sum(rung.trials for rung in self.rungs)

    @property
    def cost(self) -> float:
        """The cost of all trials."""
        return sum(rung.cost for rung in self.rungs)

    @property
    def slots(self) -> int:
        """One more than the highest slot."""
        return self.candidates * len(self.rungs)

    def place(self, slot: int) -> tuple[int, int]:
        """Returns rung and candidate of a slot."""
        return divmod(slot, self.candidates)

    def wanted(self, results: Mapping[int, float], begun: Collection[int]) -> list[int]:
        """Lists the slots that are to be run as far as that is certain, in the order in which they are to begin.

        If all of them have a result, the search is over.

        Args:
            results: slot → loss of those that have ended; infinite without a loss.
            begun: the slots that have trials. None of them is ever taken back.
        """
        on_rung = list(range(self.candidates))
        found, expected = [*on_rung], self.candidates
        for number, rung in enumerate(self.rungs[1:], start=1):
            ended = [slot for slot in on_rung if slot in results]
            ranked = sorted((slot for slot in ended if math.isfinite(results[slot])), key=lambda s: (results[s], s))
            pending = expected - len(ended)
            expected = rung.trials if pending else min(rung.trials, len(ranked))
            certain = [slot + self.candidates for slot in ranked[: max(0, rung.trials - pending)]]
            before = sorted(slot for slot in begun if self.place(slot)[0] == number)
            on_rung = [*before, *(slot for slot in certain if slot not in begun)][: rung.trials]
            found += on_rung
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "budget": self.budget,
            "rungs": [
                {"settings": dict(rung.fidelity.settings), "cost": rung.fidelity.cost, "trials": rung.trials}
                for rung in self.rungs
            ],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Ladder":
        """Inverts `to_json`."""
        rungs = (Rung(Fidelity(each["settings"], each["cost"]), each["trials"]) for each in content["rungs"])
        return cls(content["budget"], tuple(rungs))


FROM_THE_LOWEST, FROM_ANOTHER = 8, 3
"""One of so many candidates goes on from the lowest rung, and from each rung above it."""
LEAST_TRIALS, LEAST_WHOLE = 5, 3
"""On a rung above the lowest, and on the last: the seeds of two trials can exchange them, so there is more than one."""
LEAST_CANDIDATES = 10
"""With fewer a random search of whole trials does as well."""


def choose_ladder(fidelities: Sequence[Fidelity], budget: float) -> Ladder:
    """Returns the ladder with the most candidates that a budget is enough for.

    Args:
        fidelities: one for each rung, the last one that of whole trials; costs rise.
        budget: what all trials may cost.

    Raises:
        InputError: it is too small for a ladder, or enough for more trials than a study can have.
    """
    low, high = 0, 1
    while high <= MOST_TRIALS and ladder_of(fidelities, high, budget).cost <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ladder_of(fidelities, middle, budget).cost <= budget else (low, middle)
    if low < LEAST_CANDIDATES:
        # So much more that its digits in the message are enough.
        needed = 1.01 * ladder_of(fidelities, LEAST_CANDIDATES, budget).cost
        raise InputError(
            f"--budget {budget:g}: too small, the least ladder of this proxy costs {needed:.3g} and one whole trial "
            f"{fidelities[-1].cost:.3g} FLOPs. Raise it, or tune with fewer --train-iters."
        )
    chosen = ladder_of(fidelities, low, budget)
    if chosen.trials > MOST_TRIALS:
        raise InputError(
            f"--budget {budget:g}: enough for more than the {MOST_TRIALS} trials that a study may have. A whole trial "
            f"costs {fidelities[-1].cost:.3g} FLOPs. Lower it."
        )
    return chosen


def ladder_of(fidelities: Sequence[Fidelity], candidates: int, budget: float) -> Ladder:
    """Returns the ladder of so many candidates, whatever it costs."""
    last = len(fidelities) - 1
    counts = [candidates]
    for number in range(1, len(fidelities)):
        share = FROM_THE_LOWEST * FROM_ANOTHER ** (number - 1)
        least = LEAST_WHOLE if number == last else LEAST_TRIALS
        counts.append(min(candidates, max(least, math.ceil(candidates / share))))
    return Ladder(budget, tuple(Rung(each, count) for each, count in zip(fidelities, counts, strict=True)))
