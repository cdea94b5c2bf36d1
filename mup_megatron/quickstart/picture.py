"""The experiment as one picture that explains itself."""

import math
import textwrap
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mup_megatron.quickstart.experiment import Experiment
from mup_megatron.quickstart.report import compare, optimum, sentences

_PROXY, _TARGET = "#5f7d9c", "#c8442b"


def png(experiment: Experiment) -> bytes:
    """Loss over learning rate at both widths: standard parametrization on the left, μP on the right."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        # A canvas of its own: no display is needed, and a user's pyplot state is left alone.
        figure = Figure(figsize=(9.6, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.03)  # type: ignore[union-attr, call-arg]
        left, right = figure.subplots(1, 2, sharey=True)
        left.set_ylabel("validation loss")
        for axes, rule in ((left, "standard"), (right, "mup")):
            _panel(axes, experiment, rule)
            axes.set_title(_title(experiment, rule), fontsize=10, fontweight="bold")
        figure.legend(handles=_legend(experiment), loc="outside upper center", ncols=5, frameon=False, fontsize=9)
        lines = [textwrap.fill(sentence, 138) for sentence in sentences(experiment)]
        figure.supxlabel("\n".join(lines), fontsize=9, linespacing=1.4)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=150)
        return file.getvalue()


def _title(experiment: Experiment, rule: str) -> str:
    found = compare(experiment, rule)
    name = {"mup": "μP", "standard": "Standard parametrization"}[rule]
    if found.optimum is None:
        return f"{name}: every wide run diverges"
    return f"{name}: the best learning rate {'moves' if found.moved else 'stays'}"


def _panel(axes: Any, experiment: Experiment, rule: str) -> None:
    settings = experiment.settings
    axes.axvline(experiment.lr, color="black", linewidth=1, linestyle=":", zorder=0)
    # A diverged run has no loss: it is shown above all losses, the two widths beside each other.
    for width, color, height in ((settings.width, _PROXY, 0.98), (settings.wide, _TARGET, 0.94)):
        curve = experiment.curve(width, rule)
        grid = sorted(curve)
        axes.plot(grid, [curve[lr] for lr in grid], "o-", color=color)
        best = optimum(curve, settings.learning_rates)
        if best is not None:
            axes.plot([best.lr], [best.loss], "v", markersize=12, color=color, markeredgecolor="white")
        diverged = [lr for lr in settings.learning_rates if lr not in curve]
        axes.plot(diverged, [height] * len(diverged), "x", color=color, transform=axes.get_xaxis_transform())
    axes.margins(y=0.12)
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings.learning_rates, [_power(lr) for lr in settings.learning_rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")


def _power(lr: float) -> str:
    """Returns a learning rate as a power of two, if it is one: decimals of the whole grid would touch each other."""
    exponent = math.log2(lr)
    return f"$2^{{{exponent:.0f}}}$" if exponent.is_integer() else f"{lr:.2g}"


def _legend(experiment: Experiment) -> list[Line2D]:
    settings = experiment.settings
    tuned = f"tuned on the proxy: {_power(experiment.lr)} = {experiment.lr:.2g}"
    return [
        Line2D([], [], color=_PROXY, marker="o", label=f"proxy, width {settings.width}"),
        Line2D([], [], color=_TARGET, marker="o", label=f"target, width {settings.wide}"),
        Line2D([], [], color="black", linestyle=":", label=tuned),
        Line2D([], [], color="gray", linestyle="", marker="v", markersize=9, label="best"),
        Line2D([], [], color="gray", linestyle="", marker="x", label="diverged"),
    ]
