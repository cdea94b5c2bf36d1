"""The experiment as one picture that explains itself."""

import textwrap
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mup_megatron.quickstart.experiment import Experiment
from mup_megatron.quickstart.report import MOVED, caption, compare, optimum

_PROXY, _TARGET = "#5f7d9c", "#c8442b"


def png(experiment: Experiment) -> bytes:
    """Loss over learning rate at both widths: standard parametrization on the left, μP on the right."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        # A canvas of its own: no display is needed, and a user's pyplot state is left alone.
        figure = Figure(figsize=(9.6, 5.4))
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(left=0.07, right=0.98, top=0.82, bottom=0.25, wspace=0.08)
        left.set_ylabel("validation loss")
        for axes, rule in ((left, "standard"), (right, "mup")):
            _panel(axes, experiment, rule)
            axes.set_title(_title(experiment, rule), fontsize=11, fontweight="bold")
        figure.legend(
            handles=_legend(experiment),
            loc="upper center",
            ncols=5,
            frameon=False,
            fontsize=9,
            bbox_to_anchor=(0.5, 0.98),
        )
        figure.text(0.5, 0.03, textwrap.fill(caption(experiment), 125), ha="center", va="bottom", fontsize=9)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=150)
        return file.getvalue()


def _title(experiment: Experiment, rule: str) -> str:
    found = compare(experiment, rule)
    name = {"mup": "μP", "standard": "Standard parametrization"}[rule]
    return f"{name}: the best learning rate {'moves' if abs(found.shift) > MOVED else 'stays'}"


def _panel(axes: Any, experiment: Experiment, rule: str) -> None:
    settings = experiment.settings
    axes.axvline(experiment.lr, color="black", linewidth=1, linestyle=":", zorder=0)
    for width, color in ((settings.width, _PROXY), (settings.wide, _TARGET)):
        curve = experiment.curve(width, rule)
        grid = sorted(curve)
        axes.plot(grid, [curve[lr] for lr in grid], "o-", color=color)
        best = optimum(curve)
        axes.plot([best.lr], [best.loss], "v", markersize=12, color=color, markeredgecolor="white")
        # A diverged run has no loss: it is shown at the upper edge.
        diverged = [lr for lr in settings.learning_rates if lr not in curve]
        axes.plot(diverged, [0.97] * len(diverged), "x", color=color, transform=axes.get_xaxis_transform())
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings.learning_rates, [f"{lr:.2g}" for lr in settings.learning_rates], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("learning rate")


def _legend(experiment: Experiment) -> list[Line2D]:
    settings = experiment.settings
    return [
        Line2D([], [], color=_PROXY, marker="o", label=f"proxy, width {settings.width}"),
        Line2D([], [], color=_TARGET, marker="o", label=f"target, width {settings.wide}"),
        Line2D([], [], color="black", linestyle=":", label="tuned on the proxy"),
        Line2D([], [], color="gray", linestyle="", marker="v", markersize=9, label="best"),
        Line2D([], [], color="gray", linestyle="", marker="x", label="diverged"),
    ]
