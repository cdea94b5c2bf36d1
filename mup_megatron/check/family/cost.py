"""The cost of a check, before it begins: arithmetic from the shapes of its models, seconds from what this machine does.

Two things take time: multiplying matrices, and, at widths as small as a check's, calling operations at all.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mup_megatron.check.measure import levels
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import RunProtocol
from mup_megatron.errors import InputError
from mup_megatron.theory import Rule

Shapes = Sequence[Sequence[int]]
"""Of a model's parameters."""
BUILT = RunProtocol(steps=0, recorded=(), spectral=False)
"""Of a model that is built and looked at, and not trained."""
USUAL_S = 120
"""A quick check in one process of `COMMON`, at most: where it takes longer, fewer widths are trained."""
LONGEST_S = 600
"""Likewise, beyond which nothing begins unless somebody says at which widths."""
FEWEST_WIDTHS = 3
"""Over a range of 4."""

CALLS_STEP = 160
"""Torch operations for each tensor of a model and step: forward, backward, update, and what is measured of it."""
CALLS_RECORDED = 100
"""Further ones for each tensor where a step is recorded."""
CALLS_BUILT = 600
"""For each tensor: the building of a model, and what is looked at once."""


@dataclass(frozen=True, slots=True)
class Expense:
    """The cost of some runs."""

    flops: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Expense") -> "Expense":
        return Expense(self.flops + other.flops, self.calls + other.calls)

    def __mul__(self, times: float) -> "Expense":
        return Expense(self.flops * times, self.calls * times)


def expense_of_run(shapes: Iterable[Sequence[int]], protocol: RunProtocol, *, tokens: int) -> Expense:
    """One run of a model.

    Args:
        shapes: of its parameters.
        protocol: how it is trained and measured.
        tokens: of a sequence.
    """
    shapes = [tuple(shape) for shape in shapes]
    elements = sum(math.prod(shape) for shape in shapes)
    recorded = len(protocol.recorded)
    # 2 for each weight and token forward, 4 backward; two forward passes at the start, one at each recording.
    passes = 6 * protocol.steps + 2 * (recorded + 2)
    flops = float(passes * elements * tokens * protocol.batch_size)
    if protocol.spectral:
        # In double precision: a Gram matrix and its eigenvalues.
        flops += sum(4.0 * min(s) ** 2 * max(s) + 18.0 * min(s) ** 3 for s in shapes if len(s) == 2)
    calls = len(shapes) * (CALLS_BUILT + CALLS_STEP * protocol.steps + CALLS_RECORDED * recorded)
    return Expense(flops, float(calls))


@dataclass(frozen=True, slots=True)
class Machine:
    """The speed of this machine now, in one thread."""

    flops: float
    """In a second."""
    calls: float
    """In a second."""

    @classmethod
    def measured(cls) -> "Machine":
        """Takes a few hundredths of a second."""
        import torch

        with torch.no_grad():
            x, w = torch.ones(128, 256), torch.ones(256, 1024)
            small = torch.ones(64, 64)
            multiplying = _least(lambda: x @ w, 20)
            calling = _least(lambda: small.mul(1.5), 200)
        return cls(flops=2 * 128 * 256 * 1024 / multiplying, calls=1 / calling)

    def seconds(self, expense: Expense, processes: int) -> float:
        """Returns how long something takes, shared out."""
        return (expense.flops / self.flops + expense.calls / self.calls) / processes


def _least(work: Callable[[], object], times: int) -> float:
    """Seconds of one call, where nothing came between: the least of three means."""
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(times):
            work()
        found.append((time.perf_counter() - begun) / times)
    return min(found)


COMMON = Machine(flops=3e10, calls=2e5)
"""A core, so that what is trained does not depend on where."""


def affordable(widths: Sequence[int], shapes: Callable[[int], Shapes], *, tokens: int) -> tuple[list[int], list[str]]:
    """The widths of a check that nobody has chosen, fewer where a quick one would take far longer than usual; and what
    is to be said of that.

    Args:
        widths: each twice the one before.
        shapes: width → of the parameters.
        tokens: of a sequence.

    Raises:
        InputError: it would take too long even so.
    """

    def seconds(some: Sequence[int]) -> float:
        count = levels.SEEDS + levels.correct_seeds(Rule.MUP) + levels.correct_seeds(Rule.STANDARD)
        runs = (expense_of_run(shapes(width), levels.EARLY, tokens=tokens) * count for width in some)
        return COMMON.seconds(sum(runs, Expense()), 1)

    if seconds(widths) <= USUAL_S:
        return [*widths], []
    fewer = [*widths[:FEWEST_WIDTHS]]
    left = seconds(fewer)
    told = ", ".join(map(str, fewer))
    if left > LONGEST_S:
        raise InputError(
            f"models of the target's kind cannot be built smaller than at widths {told}, which take a core "
            f"{rounded_duration(left)}. Give --widths {told.replace(' ', '')} if they shall train all the same, or a "
            "target with smaller heads or common factors."
        )
    long = "" if left <= USUAL_S else f" Even so it takes a core {rounded_duration(left)}."
    return fewer, [
        f"{FEWEST_WIDTHS} widths, {told}, and not {len(widths)}: models of the target's kind cannot be built narrower, "
        f"and wider ones take long.{long}"
    ]


def prediction(
    shapes: Mapping[int, Shapes],
    *,
    tokens: int,
    level: Level,
    seeds: int,
    processes: int,
    kept: Callable[[RunProtocol, Rule], bool],
    once: Sequence[tuple[Shapes, RunProtocol]],
    layers: str = "",
) -> str:
    """Returns how many models there will be, and how long they take.

    Args:
        shapes: width → of the parameters.
        tokens: of a sequence.
        level: how much is looked at.
        seeds: of the subject, at each width.
        processes: that share the runs.
        kept: whether the correct runs under some rules are there already.
        once: what runs once besides: shapes, and how long.
        layers: what is told of them.
    """
    ahead, own, correct = Expense(), 0, 0
    for protocol in [levels.EARLY, *([] if level is Level.QUICK else [levels.LATE])]:
        rules = [rule for rule in (Rule if protocol is levels.EARLY else [Rule.MUP]) if not kept(protocol, rule)]
        count = sum(levels.correct_seeds(rule) for rule in rules)
        own += seeds * len(shapes)
        correct += count * len(shapes)
        for of_width in shapes.values():
            ahead += expense_of_run(of_width, protocol, tokens=tokens) * (seeds + count)
    machine = Machine.measured()
    seconds = machine.seconds(ahead, processes)
    seconds += sum(machine.seconds(expense_of_run(of_one, protocol, tokens=tokens), 1) for of_one, protocol in once)
    more = "" if level is not Level.FULL else " and then the learning rates of transfer, longer than all of it"
    return (
        f"{own} + {correct} models{layers}, widths {', '.join(map(str, shapes))}, in {processes} "
        f"process{'es' if processes > 1 else ''}: {rounded_duration(seconds)} on this machine{more}"
    )


def rounded_duration(seconds: float) -> str:
    """Seconds in words, as well as they are known."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    return f"about {round(seconds / 60)} min"
