"""Transfer, the purpose of it all: the learning rate that is best for a narrow model is best for a wide one."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np

from mup_megatron.check.measure import levels
from mup_megatron.check.measure.measurements import Report
from mup_megatron.check.measure.trainee import Trainee
from mup_megatron.check.verdict.basins import TransferResult, judge_transfer, mean_losses
from mup_megatron.check.verdict.verdict import Section
from mup_megatron.recipe import Recipe

LAST = 0.1
"""Share of a run's steps, at its end, whose mean loss is its result."""
EXTENSIONS = 6
"""How many learning rates are tried beyond those asked for, on each side, until the basin has both."""


def at_rate(recipe: Recipe, lr: float) -> Recipe:
    """The recipe with another learning rate; the floor keeps its ratio, and weight decay its product with the rate.

    With a product that grew along, the optimum of a run this short would be the weight decay's.
    """
    h = recipe.hyperparameters
    changes = {"lr": lr, "min_lr": h.min_lr * lr / h.lr, "weight_decay": h.weight_decay * h.lr / lr}
    return recipe.model_copy(update={"hyperparameters": h.model_copy(update=changes)})


def learning_rates(centre: float, count: int) -> list[float]:
    """Whole octaves around a learning rate, in rising order."""
    return [centre * 2.0 ** (i - count // 2) for i in range(count)]


def transfer(
    start_with_lr: Callable[[int, int, float], Trainee],
    widths: Sequence[int],
    lrs: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    report: Callable[[str], None] = lambda _line: None,
) -> TransferResult:
    """Trains every width at every learning rate and judges. Collective, as the trainees are.

    Where the best of `lrs` is the lowest or the highest, further ones follow at the same ratio, at that width alone.

    Args:
        start_with_lr: (width, seed, learning rate) → freshly built.
        widths: three or more.
        lrs: evenly spaced on a logarithmic scale.
        seeds: two or more.
        steps: of each run.
        report: is told how far it is.
    """
    losses: dict[int, dict[float, list[float]]] = {}
    for width in sorted(widths):
        basin: dict[float, list[float]] = {}

        def train(lr: float, width: int = width, basin: dict[float, list[float]] = basin) -> None:
            report(f"transfer: width {width}, learning rate {lr:.3g}")
            basin[lr] = [final_loss(start_with_lr(width, seed, lr), steps) for seed in seeds]

        for lr in sorted(lrs):
            train(lr)
        for _ in range(2 * EXTENSIONS):
            beyond = _beyond(basin, sorted(lrs))
            if beyond is None:
                break
            train(beyond)
        losses[width] = basin
    return judge_transfer(losses)


def transfer_section(
    start_with_lr: Callable[[int, int, float], Trainee],
    widths: Sequence[int],
    lr: float,
    first_seed: int,
    report: Report | None,
) -> Section:
    """Returns the basins of three of the widths, around a learning rate, as a part of a verdict. Collective.

    Args:
        start_with_lr: (width, seed, learning rate) → freshly built, for runs of `levels.LATE`.
        widths: of the check, in rising order.
        lr: the recipe's.
        first_seed: the first of `levels.TRANSFER_SEEDS`.
        report: is told how far it is.
    """
    chosen = sorted({widths[0], widths[len(widths) // 2], widths[-1]})
    rates = learning_rates(lr, levels.TRANSFER_RATES)
    seeds = range(first_seed, first_seed + levels.TRANSFER_SEEDS)
    done = 0

    def tell(_line: str) -> None:
        nonlocal done
        done += 1
        if report is not None:
            report("transfer", done, max(done, len(chosen) * len(rates)))

    result = transfer(start_with_lr, chosen, rates, seeds, levels.LATE.steps, report=tell)
    return Section(name="transfer", outcome=result.outcome, lines=result.lines, rows=result.rows)


def _beyond(basin: Mapping[float, Sequence[float]], asked: Sequence[float]) -> float | None:
    """Returns the next learning rate to try; None if the basin has two sides, or its end is too far."""
    tried = sorted(basin)
    ratio = asked[1] / asked[0]
    means = mean_losses(basin)
    best = int(np.argmin(means))
    if best == 0 or not math.isfinite(means[best]):
        return tried[0] / ratio if tried[0] > asked[0] / ratio ** (EXTENSIONS - 0.5) else None
    if best == len(tried) - 1:
        return tried[-1] * ratio if tried[-1] < asked[-1] * ratio ** (EXTENSIONS - 0.5) else None
    return None


def final_loss(trainee: Trainee, steps: int) -> float:
    """Returns the mean loss of a run's last tenth; infinite if it diverges."""
    losses = []
    for step in range(steps):
        losses.append(trainee.step(step))
        if not math.isfinite(losses[-1]):
            return math.inf
    return fmean(losses[-max(1, round(LAST * steps)) :])
