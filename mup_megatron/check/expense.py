"""What a check costs, before it begins: arithmetic from the shapes of its models, seconds from what this machine does.

Two things take time: multiplying matrices, and, at widths as small as a check's, calling operations at all.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mup_megatron.check.measurements import Protocol

CALLS_STEP = 160
"""Torch operations for each tensor of a model and step: forward, backward, update, and what is measured of it."""
CALLS_RECORDED = 100
"""Further ones for each tensor where a step is recorded."""
CALLS_BUILT = 600
"""For each tensor: the building of a model, and what is looked at once."""


@dataclass(frozen=True, slots=True)
class Expense:
    """What some runs cost."""

    flops: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Expense") -> "Expense":
        return Expense(self.flops + other.flops, self.calls + other.calls)

    def __mul__(self, times: float) -> "Expense":
        return Expense(self.flops * times, self.calls * times)


def of_run(shapes: Iterable[Sequence[int]], protocol: Protocol, *, tokens: int) -> Expense:
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
    """What this machine does now, in one thread."""

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
        """How long something takes, shared out."""
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


def about(seconds: float) -> str:
    """Seconds in words, as well as they are known."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    return f"about {round(seconds / 60)} min"
