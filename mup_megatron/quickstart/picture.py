"""The experiment as one picture that explains itself."""

import textwrap
from io import BytesIO
from typing import Any

import matplotlib as mpl

from mup_megatron.quickstart.experiment import Experiment
from mup_megatron.quickstart.report import MOVED, caption, compare, optimum

_NARROW, _WIDE = "#7a8ca3", "#c8442b"


def png(experiment: Experiment) -> bytes:
    """Loss over learning rate at both widths: standard parametrization on the left, μP on the right."""
    # A canvas of its own: no display is needed, and a user's pyplot state is left alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.6, 4.9), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        left.set_ylabel("validation loss")
        for axes, rule in ((left, "standard"), (right, "mup")):
            _panel(axes, experiment, rule)
            axes.set_title(_title(experiment, rule), fontsize=11, fontweight="bold")
        figure.supxlabel("\n".join(textwrap.wrap(caption(experiment), 125)), fontsize=9)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=150)
        return file.getvalue()


def _title(experiment: Experiment, rule: str) -> str:
    found = compare(experiment, rule)
    name = {"mup": "μP", "standard": "Standard parametrization"}[rule]
    return f"{name}: the optimum {'moves' if abs(found.shift) > MOVED else 'stays'}"


def _panel(axes: Any, experiment: Experiment, rule: str) -> None:
    settings = experiment.settings
    lr = experiment.recipe.hyperparameters.lr
    curves = {width: experiment.curve(width, rule) for width in (settings.width, settings.wide)}
    top = max(max(curve.values()) for curve in _all_curves(experiment)) + 0.15
    axes.axvline(lr, color="black", linewidth=1, linestyle=":", zorder=0)
    axes.annotate(
        "transferred\nlearning rate", (lr, 1.0), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8
    )
    for (width, curve), color, label in zip(curves.items(), (_NARROW, _WIDE), ("proxy", "target"), strict=True):
        grid = sorted(curve)
        axes.plot(
            [lr * 2.0**o for o in grid], [curve[o] for o in grid], "o-", color=color, label=f"{label}, width {width}"
        )
        best = optimum(curve)
        axes.plot([lr * 2.0**best.octave], [best.loss], marker="v", markersize=11, color=color, clip_on=False)
        diverged = [lr * 2.0**octave for octave in settings.octaves if octave not in curve]
        axes.plot(diverged, [top] * len(diverged), "x", color=color, clip_on=False)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate")
    axes.legend(loc="lower left", frameon=False, fontsize=9)


def _all_curves(experiment: Experiment) -> list[dict[int, float]]:
    settings = experiment.settings
    return [
        experiment.curve(settings.width, "mup"),
        experiment.curve(settings.wide, "mup"),
        experiment.curve(settings.wide, "standard"),
    ]
