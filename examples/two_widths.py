"""What bert_two_widths.py and resnet_two_widths.py share: which runs are made, the table and the picture. No μP here.

A learning rate is searched at the small width. At the large one, that learning rate and its neighbours are tried under
μP and in the standard parametrization.
"""

import argparse
import csv
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

Losses = Mapping[float, float]
"""Learning rate → loss; NaN where the run diverged."""


@dataclass(frozen=True)
class Experiment:
    """One kind of model at two widths."""

    name: str
    """Of the files that are written."""
    title: str
    small: int
    wide: int
    learning_rates: Sequence[float]
    """The grid of the search."""
    factors: Sequence[float]
    """What is tried at the large width, in units of the learning rate that was found."""
    steps: int
    run: Callable[[int, float, bool, int], float]
    """(width, learning rate, with μP, steps) → loss."""


@dataclass(frozen=True)
class Outcome:
    """What came out."""

    small: Losses
    mup: Losses
    standard: Losses

    @property
    def tuned(self) -> float:
        """The best learning rate of the small model."""
        return best(self.small)


def best(losses: Losses) -> float:
    """The learning rate with the lowest loss."""
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise SystemExit("every run of the small model diverged: lower the learning rates")
    return min(finite, key=lambda lr: finite[lr])


def main(parser: argparse.ArgumentParser, experiment: Experiment) -> None:
    """Makes the runs; prints the table, and writes it and the picture."""
    parser.add_argument("--steps", type=int, default=experiment.steps, help="of each run; the default is %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; the default is %(default)s")
    parser.add_argument("--output", type=Path, default=Path("results/examples"), help="the default is %(default)s")
    args = parser.parse_args()

    with ProcessPoolExecutor(args.workers) as pool:

        def runs(width: int, mup: bool, learning_rates: Sequence[float]) -> dict[float, Any]:
            return {lr: pool.submit(experiment.run, width, lr, mup, args.steps) for lr in learning_rates}

        # At the small width μP and the standard parametrization are the same.
        small = {lr: run.result() for lr, run in runs(experiment.small, False, experiment.learning_rates).items()}
        grid = [factor * best(small) for factor in experiment.factors]
        mup, standard = runs(experiment.wide, True, grid), runs(experiment.wide, False, grid)
        outcome = Outcome(
            small,
            {lr: run.result() for lr, run in mup.items()},
            {lr: run.result() for lr, run in standard.items()},
        )
    table = rows(experiment, outcome)
    for row in table:
        print("  ".join(f"{cell:>20}" for cell in row))
    print(sentence(experiment, outcome))

    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / f"{experiment.name}_two_widths.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    picture(experiment, outcome, args.output / f"{experiment.name}_two_widths.png")
    print(f"{args.output / experiment.name}_two_widths.csv, .png")


def rows(experiment: Experiment, outcome: Outcome) -> list[list[str]]:
    """The losses, one learning rate to a line, under their titles."""

    def cell(losses: Losses, lr: float) -> str:
        if lr not in losses:
            return ""
        return f"{losses[lr]:.3f}" if math.isfinite(losses[lr]) else "diverged"

    columns = (outcome.small, outcome.mup, outcome.standard)
    return [
        [
            "learning rate",
            f"width {experiment.small}",
            f"width {experiment.wide} μP",
            f"width {experiment.wide} standard",
        ],
        *(
            [f"{lr:.3g}{' (tuned)' if lr == outcome.tuned else ''}", *(cell(losses, lr) for losses in columns)]
            for lr in sorted({*outcome.small, *outcome.mup})
        ),
    ]


def sentence(experiment: Experiment, outcome: Outcome) -> str:
    """The result in words, whatever it is."""

    def said(losses: Losses) -> str:
        loss = losses[outcome.tuned]
        if not math.isfinite(loss):
            return "diverges"
        lowest = losses[best(losses)]
        at = "the best that was tried" if loss == lowest else f"the best is {lowest:.3f} at {best(losses):.3g}"
        return f"has a loss of {loss:.3f} ({at})"

    return (
        f"At width {experiment.wide}, with the learning rate {outcome.tuned:.3g} that was best at width "
        f"{experiment.small}, μP {said(outcome.mup)}; the standard parametrization {said(outcome.standard)}."
    )


def picture(experiment: Experiment, outcome: Outcome, path: Path) -> None:
    """Loss over learning rate, with the one that was transferred."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.subplots()
    curves = (
        (outcome.small, f"width {experiment.small}", "#5f7d9c", "o-"),
        (outcome.mup, f"width {experiment.wide}, μP", "#c8442b", "o-"),
        (outcome.standard, f"width {experiment.wide}, standard parametrization", "#8a8a8a", "s--"),
    )
    for height, (losses, label, color, style) in zip((0.97, 0.93, 0.89), curves, strict=True):
        finite = {lr: loss for lr, loss in sorted(losses.items()) if math.isfinite(loss)}
        axes.plot(list(finite), list(finite.values()), style, color=color, label=label)
        # A diverged run has no loss; it is shown above all losses.
        diverged = [lr for lr in losses if lr not in finite]
        if diverged:
            top = axes.get_xaxis_transform()
            axes.plot(diverged, [height] * len(diverged), "x", color=color, transform=top, label=f"{label}: diverged")
    transferred = f"tuned at width {experiment.small}"
    axes.axvline(outcome.tuned, color="black", linestyle=":", linewidth=1, zorder=0, label=transferred)
    axes.set_xscale("log", base=2)
    ticks = sorted({*outcome.small, *outcome.mup})
    axes.set_xticks(ticks, [f"$2^{{{math.log2(lr):.0f}}}$" for lr in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss on unseen data")
    axes.set_title(experiment.title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
