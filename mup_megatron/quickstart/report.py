"""The findings of the experiment: where each optimum is, what the transferred rate loses, in numbers and in words.

Every sentence is computed from the data, also the one that says that it did not work.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mup_megatron.quickstart.experiment import Experiment

MOVED = 0.5
"""Octaves by which an optimum has to move to be called moved: half of the grid's step."""


@dataclass(frozen=True)
class GridOptimum:
    """The best learning rate of a curve."""

    lr: float
    """The vertex of the parabola over log(lr) through the best point and its neighbours, where there are both."""
    loss: float
    """The lowest measured."""
    at_edge: bool
    """Whether the best point is the first or last of the grid, so that the optimum may be beyond it."""


@dataclass(frozen=True)
class Comparison:
    """One rule at the wide model, against the proxy."""

    rule: str
    transferred: float | None
    """Loss at the tuned learning rate; None if it diverged."""
    optimum: GridOptimum | None
    """None if every run diverged."""
    shift: float | None
    """Octaves from the proxy's optimum to this one; None if there is none."""

    @property
    def regret(self) -> float | None:
        """The loss of the tuned learning rate above the best of the grid; None if it diverged."""
        if self.transferred is None or self.optimum is None:
            return None
        return self.transferred - self.optimum.loss

    @property
    def moved(self) -> bool:
        """True if the optimum is somewhere else, or nowhere."""
        return self.shift is None or abs(self.shift) > MOVED


def optimum(curve: Mapping[float, float], learning_rates: Sequence[float]) -> GridOptimum | None:
    """Returns where a curve of losses over learning rates is lowest; None if it has no point.

    Args:
        curve: learning rate → loss, of the runs that did not diverge.
        learning_rates: the whole grid; each is twice the one before.
    """
    if not curve:
        return None
    grid = sorted(learning_rates)
    best = min(grid, key=lambda lr: curve.get(lr, math.inf))
    index = grid.index(best)
    at_edge = index in (0, len(grid) - 1)
    if at_edge or grid[index - 1] not in curve or grid[index + 1] not in curve:
        return GridOptimum(best, curve[best], at_edge)
    left, right = curve[grid[index - 1]] - curve[best], curve[grid[index + 1]] - curve[best]
    octaves = (left - right) / (2 * (left + right)) if left + right else 0.0
    return GridOptimum(best * 2.0**octaves, curve[best], at_edge)


def proxy_optimum(experiment: Experiment) -> GridOptimum:
    """Returns the proxy's optimum, which there always is: without one there was nothing to transfer."""
    settings = experiment.settings
    found = optimum(experiment.curve(settings.width, "mup"), settings.learning_rates)
    assert found is not None
    return found


def compare(experiment: Experiment, rule: str) -> Comparison:
    """Compares the wide model under a rule with the proxy."""
    settings = experiment.settings
    wide = experiment.curve(settings.wide, rule)
    best = optimum(wide, settings.learning_rates)
    shift = None if best is None else math.log2(best.lr / proxy_optimum(experiment).lr)
    return Comparison(rule, wide.get(experiment.lr), best, shift)


def sentences(experiment: Experiment) -> tuple[str, ...]:
    """Says what the picture shows, computed from it: first what was done, then each rule."""
    settings = experiment.settings
    edge = ", at the edge of the grid" if proxy_optimum(experiment).at_edge else ""
    first = (
        f"Tuned at width {settings.width} (learning rate {experiment.lr:.2g}{edge}), "
        f"used unchanged at width {settings.wide}."
    )
    return first, *(_sentence(compare(experiment, rule)) for rule in ("mup", "standard"))


def caption(experiment: Experiment) -> str:
    """Returns the sentences as one text."""
    return " ".join(sentences(experiment))


def _sentence(found: Comparison) -> str:
    name = {"mup": "μP", "standard": "Standard parametrization"}[found.rule]
    if found.optimum is None:
        return f"{name}: every learning rate of the grid diverges, the transferred one too."
    edge = ", to the edge of the grid or beyond" if found.optimum.at_edge else ""
    where = (
        f"the best learning rate moved by {found.shift:+.1f} octaves{edge}"
        if found.moved
        else f"the best learning rate stayed where it was ({found.shift:+.1f} octaves)"
    )
    what = (
        "the transferred one diverges"
        if found.regret is None
        else "the transferred one is the best of the grid"
        if found.regret == 0
        else f"the transferred one loses {found.regret:.3f} to the best of the grid"
    )
    return f"{name}: {where}, and {what}."


def summary(experiment: Experiment) -> dict[str, Any]:
    """Returns the results as plain values. What there is none of because runs diverged is None."""
    from mup_megatron.megatron.versions import installed

    settings = experiment.settings
    rules = {rule: compare(experiment, rule) for rule in ("mup", "standard")}
    return {
        "fingerprint": experiment.recipe.fingerprint,
        "seed": settings.seed,
        "lr": experiment.lr,
        "hyperparameters": experiment.recipe.hyperparameters.model_dump(),
        "proxy": {
            "width": settings.width,
            "loss": experiment.curve(settings.width, "mup").get(experiment.lr),
            "best": proxy_optimum(experiment).loss,
        },
        "target": {
            rule: {
                "width": settings.wide,
                "transferred": found.transferred,
                "best": None if found.optimum is None else found.optimum.loss,
                "regret": found.regret,
                "shift_octaves": found.shift,
                "optimum_at_edge": None if found.optimum is None else found.optimum.at_edge,
                "all_diverged": found.optimum is None,
            }
            for rule, found in rules.items()
        },
        "grid": [result.row() for result in experiment.results],
        "caption": caption(experiment),
        "versions": installed(),
    }


def grid_csv(experiment: Experiment) -> str:
    """Returns every run of the grid as CSV, one row each. Numbers in full precision."""
    stream = io.StringIO()
    rows = [result.row() for result in experiment.results]
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def table(experiment: Experiment) -> Table:
    """Returns the results as a table for a terminal."""
    settings = experiment.settings
    lr = experiment.lr
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "width", "lr", "validation loss", "best of grid", "at about", "optimum moved"):
        shown.add_column(title, justify="right" if title else "left")
    tuned = experiment.curve(settings.width, "mup").get(lr)
    base = proxy_optimum(experiment)
    shown.add_row("proxy, tuned", str(settings.width), f"{lr:.3g}", _loss(tuned), _loss(base.loss), f"{base.lr:.2g}")
    for rule, name in (("mup", "μP, transferred"), ("standard", "standard, same hyperparameters")):
        found = compare(experiment, rule)
        shown.add_row(name, str(settings.wide), f"{lr:.3g}", _loss(found.transferred), *_best_columns(found))
    return shown


def _best_columns(found: Comparison) -> tuple[str, str, str]:
    if found.optimum is None:
        return "all diverged", "", ""
    edge = " (grid's edge)" if found.optimum.at_edge else ""
    return _loss(found.optimum.loss), f"{found.optimum.lr:.2g}", f"{found.shift:+.1f} octaves{edge}"


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"
