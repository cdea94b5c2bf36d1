"""A verdict as one picture, made for those who have never seen one.

The first row is what initialisation and optimizer did, as found / expected: 1 is right. The others are what that does
to the model as it grows, beside the correct reference and beside standard parametrization. What is at fault has a thick
red frame, and what follows from it a thin one.
"""

import textwrap
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mup_megatron.check.report.panels import (
    BAND,
    CALM,
    FAULT,
    GREY,
    PASSED,
    SETTINGS,
    UNDECIDED,
    ShownVerdict,
    activation_panel,
    activation_panels,
    consequences_panel,
    loss_panel,
    settings_panel,
)
from mup_megatron.check.report.report import conditions, headline, why_none
from mup_megatron.check.verdict.verdict import CheckOutcome, Verdict

_FIRST_ROW = (
    "What each weight got, read from its draw and from how it moved: found / expected. 1 is right, at every width. Of "
    "each role the parameter that is furthest off."
)
_OTHER_ROWS = (
    "What that does as the model grows. Points belong into the band, whatever its slope: at small widths μP's own "
    "slopes are not quite 0."
)
_HEIGHT, _ROW = 12.4, 3.3
"""Inches: of a picture with two rows of what follows, and of each row more."""


def png(verdict: Verdict, *, title: str) -> bytes:
    """Returns the picture.

    Args:
        verdict: what to show.
        title: what was checked, as its user calls it.
    """
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}):
        # A canvas of its own: no display is needed, and a user's pyplot state is left alone.
        picture = ShownVerdict(verdict)
        activations = activation_panels(picture)
        rows = max(2, -(-(len(activations) + 2) // 4))
        figure = Figure(figsize=(16, _HEIGHT + (rows - 2) * _ROW))
        FigureCanvasAgg(figure)
        sides = {"left": 0.045, "right": 0.985, "wspace": 0.24}
        upper = figure.add_gridspec(1, 4, top=_below(figure, 0.850), bottom=_below(figure, 0.655), **sides)
        lower = figure.add_gridspec(
            rows, 4, top=_below(figure, 0.565), bottom=_above(figure, 0.105), hspace=0.36, **sides
        )
        settings, others = ([figure.add_subplot(cell) for cell in _cells(grid)] for grid in (upper, lower))
        for axes, quantity in zip(settings, SETTINGS, strict=True):
            settings_panel(axes, picture, quantity)
        for axes, panel in zip(others, activations, strict=False):
            activation_panel(axes, picture, panel)
        for axes in others[len(activations) : -2]:
            axes.set_axis_off()
        consequences_panel(others[-2], picture)
        loss_panel(others[-1], picture)
        _words(figure, verdict, title)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return file.getvalue()


def _below(figure: Figure, share: float) -> float:
    """Returns the place as far below the top as in a picture of two rows, whatever further rows there are."""
    return 1 - (1 - share) * _HEIGHT / figure.get_figheight()


def _above(figure: Figure, share: float) -> float:
    """Returns the place as far above the bottom."""
    return share * _HEIGHT / figure.get_figheight()


def _cells(grid: GridSpec) -> list[SubplotSpec]:
    return [grid[i, j] for i in range(grid.nrows) for j in range(grid.ncols)]


def _words(figure: Figure, verdict: Verdict, title: str) -> None:
    color = {CheckOutcome.PASS: PASSED, CheckOutcome.FAIL: FAULT}.get(verdict.outcome, UNDECIDED)
    head = f"NO VERDICT {title}" if verdict.outcome is CheckOutcome.NO_VERDICT else headline(verdict, title=title)
    head = textwrap.fill(head, 88)
    figure.text(0.012, _below(figure, 0.985), head, fontsize=17, fontweight="bold", color=color, va="top")
    lines = textwrap.wrap(_because(verdict), 190)[:3]
    under = _below(figure, 0.955 - 0.02 * head.count("\n"))
    figure.text(0.012, under, "\n".join(lines), fontsize=10.5, va="top", linespacing=1.4)
    about = f"{conditions(verdict)}. {' '.join(verdict.remarks)}"
    about = textwrap.shorten(about, 260, placeholder=" …")
    figure.text(0.012, _above(figure, 0.012), about, fontsize=8, color=GREY, va="bottom")
    heading: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "color": CALM}
    figure.text(0.012, _below(figure, 0.888), _FIRST_ROW, **heading)
    figure.text(0.012, _below(figure, 0.603), _OTHER_ROWS, **heading)
    anchor = (0.5, _above(figure, 0.027))
    figure.legend(handles=_legend(), loc="lower center", bbox_to_anchor=anchor, ncols=6, frameon=False, fontsize=9)


def _because(verdict: Verdict) -> str:
    """Returns why the verdict is what it is, in one or two sentences."""
    if verdict.outcome is CheckOutcome.PASS:
        return (
            "At every width the live model starts, moves and is updated as the correct reference, within what seeds "
            "explain; standard parametrization of the same shape is told apart."
        )
    if verdict.outcome is CheckOutcome.NO_VERDICT:
        return f"Nothing can be concluded: {why_none(verdict)}"
    if verdict.causes:
        cause = verdict.causes[0]
        return f"Most likely cause, with which {cause.share:.0%} of the deviation is explained: {cause.sentence}"
    failed = next(section for section in verdict.sections if section.outcome is CheckOutcome.FAIL)
    told = [finding.sentence for finding in failed.findings[:1]] or list(failed.lines)
    return f"{failed.name}: {' '.join(told)}"


def _legend() -> list[Any]:
    return [
        Line2D([], [], color=CALM, marker="o", linestyle="", label="this target, one point a seed"),
        Patch(color=BAND, label="correct reference, where 95% of seeds fall"),
        Line2D([], [], color=GREY, linestyle="--", label="standard parametrization"),
        Line2D([], [], color=FAULT, marker="o", linestyle="", label="off"),
        Patch(facecolor="white", edgecolor=FAULT, linewidth=3, label="at fault"),
        Patch(facecolor="white", edgecolor=FAULT, linewidth=1, label="follows from it"),
    ]
