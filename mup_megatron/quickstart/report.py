"""What the experiment says: where each optimum is, what the transferred rate loses, in numbers and in words.

Every sentence is computed from the data, also the one that says that it did not work.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mup_megatron.quickstart.experiment import Experiment
from mup_megatron.tuning import versions

MOVED = 0.5
"""Octaves by which an optimum has to move to be called moved: half of the grid's step."""


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of a curve."""

    lr: float
    """The vertex of the parabola over log(lr) through the best point and its neighbours; at the edge the best point."""
    loss: float
    """The lowest measured."""
    at_edge: bool


@dataclass(frozen=True)
class Comparison:
    """One rule at the wide model, against the proxy."""

    rule: str
    transferred: float | None
    """Loss at the tuned learning rate; None if it diverged."""
    optimum: Optimum
    shift: float
    """Octaves from the proxy's optimum to this one."""

    @property
    def regret(self) -> float | None:
        """What the tuned learning rate loses to the best of the grid."""
        return None if self.transferred is None else self.transferred - self.optimum.loss


def optimum(curve: Mapping[float, float]) -> Optimum:
    """Where a curve of losses over learning rates, each twice the one before, is lowest."""
    assert curve
    grid = sorted(curve)
    index = min(range(len(grid)), key=lambda i: curve[grid[i]])
    best = grid[index]
    if index in (0, len(grid) - 1):
        return Optimum(best, curve[best], at_edge=True)
    left, right = curve[grid[index - 1]] - curve[best], curve[grid[index + 1]] - curve[best]
    return Optimum(best * 2.0 ** ((left - right) / (2 * (left + right))), curve[best], at_edge=False)


def compare(experiment: Experiment, rule: str) -> Comparison:
    """The wide model under a rule. At least one of its runs has to have a loss."""
    settings = experiment.settings
    wide = experiment.curve(settings.wide, rule)
    base, best = optimum(experiment.curve(settings.width, rule)), optimum(wide)
    return Comparison(rule, wide.get(experiment.lr), best, math.log2(best.lr / base.lr))


def caption(experiment: Experiment) -> str:
    """What the picture shows, in sentences computed from it."""
    settings = experiment.settings
    first = (
        f"Tuned at width {settings.width} (learning rate {experiment.lr:.2g}), used unchanged at width {settings.wide}."
    )
    return " ".join([first, *(_sentence(compare(experiment, rule)) for rule in ("mup", "standard"))])


def _sentence(found: Comparison) -> str:
    name = {"mup": "μP", "standard": "Standard parametrization"}[found.rule]
    edge = " or more (it is at the edge of the grid)" if found.optimum.at_edge else ""
    where = (
        f"the best learning rate moved by {found.shift:+.1f} octaves{edge}"
        if abs(found.shift) > MOVED
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
    """The results as plain values."""
    settings = experiment.settings
    base = optimum(experiment.curve(settings.width, "mup"))
    rules = {rule: compare(experiment, rule) for rule in ("mup", "standard")}
    return {
        "fingerprint": experiment.recipe.fingerprint,
        "seed": settings.seed,
        "lr": experiment.lr,
        "hyperparameters": experiment.recipe.hyperparameters.model_dump(),
        "proxy": {
            "width": settings.width,
            "loss": experiment.curve(settings.width, "mup").get(experiment.lr),
            "best": base.loss,
        },
        "target": {
            rule: {
                "width": settings.wide,
                "transferred": found.transferred,
                "best": found.optimum.loss,
                "regret": found.regret,
                "shift_octaves": found.shift,
                "optimum_at_edge": found.optimum.at_edge,
            }
            for rule, found in rules.items()
        },
        "caption": caption(experiment),
        "versions": versions(),
    }


def table(experiment: Experiment) -> Table:
    """The results for a terminal."""
    settings = experiment.settings
    lr = experiment.lr
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "width", "lr", "validation loss", "best of grid", "at about", "optimum moved"):
        shown.add_column(title, justify="right" if title else "left")
    tuned = experiment.curve(settings.width, "mup").get(lr)
    base = optimum(experiment.curve(settings.width, "mup"))
    shown.add_row("proxy, tuned", str(settings.width), f"{lr:.3g}", _loss(tuned), _loss(base.loss), f"{base.lr:.2g}")
    for rule, name in (("mup", "μP, transferred"), ("standard", "standard, same hyperparameters")):
        found = compare(experiment, rule)
        shown.add_row(
            name,
            str(settings.wide),
            f"{lr:.3g}",
            _loss(found.transferred),
            _loss(found.optimum.loss),
            f"{found.optimum.lr:.2g}",
            f"{found.shift:+.1f} octaves" + (" (grid's edge)" if found.optimum.at_edge else ""),
        )
    return shown


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"
