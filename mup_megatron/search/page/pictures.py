"""The pictures of a report. Each shows one thing, and is bytes of a PNG."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mup_megatron.search.fit import Fit
from mup_megatron.search.page.analysis import Agreement, Importance, compared, ended
from mup_megatron.search.space import SearchRange
from mup_megatron.search.standing import Standing
from mup_megatron.search.study import StudyRecord, Trial
from mup_megatron.validation import shortened

WHOLE, SHORTEST, NEAREST, GREY = "#c8442b", "#b7c7d8", "#3f5d7c", "#888888"
"""Trials of the last rung, and from which color to which those below are."""
COLORS = "viridis"
"""The better, the darker."""
PLACES = 101
"""On a curve."""
GRID = 41
LEVELS = 10
HIGHEST = 3.0
"""What is shown of losses: from the best to so many times as far above it as the median of the lowest rung."""
_DPI = 110


@dataclass(frozen=True)
class Shown:
    """A study, with the words for it."""

    record: StudyRecord
    rungs: Sequence[str]
    fit: Fit | None

    @property
    def names(self) -> list[str]:
        """The hyperparameters."""
        return list(self.record.spec.space.ranges)

    def color(self, rung: int) -> Any:
        """Returns that of a rung."""
        below = len(self.rungs) - 1
        if rung == below:
            return WHOLE
        first, last = (np.array(mpl.colors.to_rgb(color)) for color in (SHORTEST, NEAREST))
        return tuple(first + (last - first) * (rung / max(1, below - 1)))

    def highest(self) -> float:
        """Returns the loss above which losses are drawn at the edge."""
        losses = [loss for rung in range(len(self.rungs)) for _, loss in ended(self.record, rung)]
        finite = [loss for loss in losses if math.isfinite(loss)]
        low = [loss for _, loss in ended(self.record, 0) if math.isfinite(loss)]
        best, middle = min(finite), float(np.median(low))
        return max(middle, min(best + HIGHEST * (middle - best), max(finite)))


def plain(text: str, length: int = 40) -> str:
    """Returns a name as matplotlib shows it as it is: neither a formula nor longer than there is room for."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shortened(shown, length).replace("$", r"\$") or "?"


def hyperparameters(shown: Shown) -> bytes:
    """Each hyperparameter against the loss, by rung, with the fit, its optimum and how sure that is."""
    columns = min(3, len(shown.names))
    rows = -(-len(shown.names) // columns)
    with _figure(4.3 * columns, 3.1 * rows + 0.6) as (figure, png):
        all_axes = np.atleast_1d(figure.subplots(rows, columns, sharey=True, squeeze=False)).ravel()
        for axes in all_axes[len(shown.names) :]:
            axes.set_axis_off()
        top = shown.highest()
        for index, name in enumerate(shown.names):
            _against_loss(all_axes[index], shown, name, top)
            if index % columns == 0:
                all_axes[index].set_ylabel("loss")
        marks: list[Any] = [Line2D([], [], color=shown.color(i), marker="o", linestyle="", label=plain(each))
                 for i, each in enumerate(shown.rungs)]  # fmt: skip
        if shown.fit is not None:
            marks.append(Line2D([], [], color=GREY, label="fit of a rung, the others at their optima"))
            marks.append(Patch(color=WHOLE, alpha=0.15, label="the optimum, in nine of ten cases"))
        if any(math.isinf(loss) for i in range(len(shown.rungs)) for _, loss in ended(shown.record, i)):
            marks.append(Line2D([], [], color=GREY, marker="x", linestyle="", label="diverged"))
        figure.legend(handles=marks, loc="outside upper center", ncols=min(6, len(marks)), frameon=False)
        return png()


def _against_loss(axes: Any, shown: Shown, name: str, top: float) -> None:
    bounds = shown.record.spec.space.ranges[name]
    if shown.fit is not None:
        axes.axvspan(*shown.fit.basins[name].interval, color=WHOLE, alpha=0.15, linewidth=0)
        axes.axvline(shown.fit.basins[name].optimum, color=WHOLE, linewidth=1.5, clip_on=False)
    for rung in range(len(shown.rungs)):
        _points(axes, shown, rung, lambda trial: trial.parameters[name], top)
        if shown.fit is not None and rung in shown.fit.surface.rungs:
            fractions = np.linspace(*shown.fit.surface.reach(name), PLACES)
            losses = [shown.fit.surface.loss(rung, {name: fraction}) for fraction in fractions]
            seen = [loss if loss <= top else math.nan for loss in losses]
            axes.plot([bounds.at(fraction) for fraction in fractions], seen, color=shown.color(rung), linewidth=1)
    _scale(axes, bounds)
    axes.set_xlabel(plain(name))


def _points(axes: Any, shown: Shown, rung: int, place: Callable[[Trial], float], top: float) -> None:
    """Draws the trials of a rung: what is higher than the picture at its edge, what diverged above it."""
    trials = ended(shown.record, rung)
    at = {"color": shown.color(rung), "zorder": 2 + rung, "s": 14 if rung < len(shown.rungs) - 1 else 22}
    inside = [(place(trial), loss) for trial, loss in trials if loss <= top]
    above = [place(trial) for trial, loss in trials if top < loss < math.inf]
    diverged = [place(trial) for trial, loss in trials if math.isinf(loss)]
    axes.scatter([x for x, _ in inside], [y for _, y in inside], **at)
    transform = axes.get_xaxis_transform()
    axes.scatter(above, [0.97] * len(above), marker="^", transform=transform, **at)
    axes.scatter(diverged, [0.97] * len(diverged), marker="x", s=16, color=GREY, transform=transform)


def _scale(axes: Any, bounds: SearchRange) -> None:
    axes.set_xlim(bounds.low, bounds.high)
    if bounds.log:
        axes.set_xscale("log")
        if bounds.high / bounds.low < 100:  # where whole powers of ten are too few
            _ticks(axes.xaxis, bounds)


def _ticks(axis: Any, bounds: SearchRange, count: int = 5) -> None:
    places = [bounds.at(i / (count - 1)) for i in range(count)]
    axis.set_ticks(places, [f"{place:.2g}" for place in places])
    axis.set_minor_locator(mpl.ticker.NullLocator())


def parallel(shown: Shown) -> bytes:
    """One line for each candidate, through its hyperparameters to its loss on the lowest rung; the best ones dark."""
    trials = ended(shown.record, 0)
    further = {} if shown.record.spec.ladder is None else _furthest(shown.record)
    losses = [loss for _, loss in trials]
    finite = [loss for loss in losses if math.isfinite(loss)]
    top, best = shown.highest(), min(finite)
    ranges = [shown.record.spec.space.ranges[name] for name in shown.names]
    with _figure(1.7 * (len(ranges) + 1) + 1.0, 4.4) as (figure, png):
        axes = figure.subplots()
        order = sorted(range(len(trials)), key=lambda i: -losses[i])
        for place, i in enumerate(order):
            trial, loss = trials[i]
            line = [bounds.fraction(trial.parameters[name]) for name, bounds in zip(shown.names, ranges, strict=True)]
            height = 1.06 if math.isinf(loss) else min(1.0, (loss - best) / ((top - best) or 1.0))
            look: dict[str, Any] = {"color": _faded(1 - place / max(1, len(order) - 1))}
            if math.isinf(loss):
                look = {"color": "#dddddd", "linestyle": ":"}
            width = 1.8 if trial.slot in further else 0.8
            axes.plot(range(len(ranges) + 1), [*line, height], linewidth=width, antialiased=width > 1, **look)
        for index, bounds in enumerate(ranges):
            axes.axvline(index, color="black", linewidth=0.8)
            for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
                axes.text(index + 0.02, fraction, f"{bounds.at(fraction):.2g}", fontsize=7, va="center", color="black")
        axes.axvline(len(ranges), color="black", linewidth=0.8)
        for fraction in (0.0, 0.5, 1.0):
            text = f"{best + fraction * (top - best):.3g}" + (" or more" if fraction == 1 and max(finite) > top else "")
            axes.text(len(ranges) + 0.02, fraction, text, fontsize=7, va="center")
        if len(finite) < len(losses):
            axes.text(len(ranges) + 0.02, 1.06, "diverged", fontsize=7, va="center", color=GREY)
        axes.set_xticks(range(len(ranges) + 1), [*(plain(name, 22) for name in shown.names), "loss"])
        axes.set_yticks([])
        axes.set_xlim(-0.05, len(ranges) + 0.45)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        return png()


def _faded(rank: float) -> tuple[float, ...]:
    """Returns the color of a line, from the best at 0 to the worst at 1. Opaque: blended ones make large files."""
    strength = 0.2 + 0.8 * (1 - rank) ** 3
    return tuple(1 - strength * (1 - channel) for channel in mpl.colormaps[COLORS](rank)[:3])


def _furthest(record: StudyRecord) -> set[int]:
    """Returns the candidates that have a trial beyond the lowest rung."""
    assert record.spec.ladder is not None
    places = [record.spec.ladder.place(trial.slot) for trial in record.trials]
    return {candidate for rung, candidate in places if rung > 0}


def importance(found: dict[str, Importance]) -> bytes:
    """Bars, with what chance alone would give."""
    with _figure(7.0, 0.42 * len(found) + 1.3) as (figure, png):
        axes = figure.subplots()
        names = list(reversed(found))
        axes.barh(range(len(names)), [found[name].share for name in names], color=NEAREST, height=0.6)
        chance = [found[name].by_chance for name in names]
        axes.scatter(chance, range(len(names)), marker="|", s=260, color=WHOLE, linewidths=2, zorder=3)
        axes.set_yticks(range(len(names)), [plain(name) for name in names])
        axes.set_xlabel("share of importance")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        label = "as much in one of ten cases if losses had nothing to do with it"
        mark = Line2D([], [], color=WHOLE, marker="|", linestyle="", markersize=12, label=label)
        figure.legend(handles=[mark], frameon=False, loc="outside upper center")
        return png()


def interactions(shown: Shown, first: str) -> bytes:
    """One hyperparameter beside each other one: trials of the lowest rung by their losses, and contours of the fit."""
    others = [name for name in shown.names if name != first]
    columns = min(3, len(others))
    rows = -(-len(others) // columns)
    trials = [(trial, loss) for trial, loss in ended(shown.record, 0) if math.isfinite(loss)]
    best, top = min(loss for _, loss in trials), shown.highest()
    norm = Normalize(best, max(top, best + 1e-9))
    with _figure(4.3 * columns + 0.8, 3.2 * rows + 0.4) as (figure, png):
        all_axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axes in all_axes[len(others) :]:
            axes.set_axis_off()
        for index, name in enumerate(others):
            axes = all_axes[index]
            bounds, own = shown.record.spec.space.ranges[name], shown.record.spec.space.ranges[first]
            if shown.fit is not None:
                _contours(axes, shown.fit, (name, bounds), (first, own), len(shown.rungs) - 1)
            axes.scatter(
                [trial.parameters[name] for trial, _ in trials], [trial.parameters[first] for trial, _ in trials],
                c=[loss for _, loss in trials], norm=norm, cmap=COLORS, s=14,
            )  # fmt: skip
            _scale(axes, bounds)
            axes.set_ylim(own.low, own.high)
            if own.log:
                axes.set_yscale("log")
            axes.set_xlabel(plain(name))
            if index % columns == 0:
                axes.set_ylabel(plain(first))
        scale = mpl.cm.ScalarMappable(norm, COLORS)
        figure.colorbar(scale, ax=list(all_axes), label="loss" if len(shown.rungs) == 1 else "loss on the lowest rung")
        return png()


def _contours(axes: Any, fit: Fit, across: tuple[str, SearchRange], up: tuple[str, SearchRange], whole: int) -> None:
    rung = whole if whole in fit.surface.rungs else fit.surface.rungs[-1]
    fractions = np.linspace(0, 1, GRID)
    losses = np.array([[fit.surface.loss(rung, {across[0]: x, up[0]: y}) for x in fractions] for y in fractions])
    x, y = ([bounds.at(fraction) for fraction in fractions] for _, bounds in (across, up))
    lowest = float(losses.min())
    # Closer together near the optimum, where it matters.
    steps = lowest + (float(losses.max()) - lowest) * np.linspace(0, 1, LEVELS)[1:] ** 2
    axes.contour(x, y, losses, levels=np.unique(steps), colors=GREY, linewidths=0.8)
    axes.plot([fit.basins[across[0]].optimum], [fit.basins[up[0]].optimum], "+", color=WHOLE, markersize=12, zorder=4)


def rungs(shown: Shown, found: Sequence[Agreement]) -> bytes:
    """The losses on two rungs of the candidates that are complete on both, for each two rungs."""
    with _figure(3.7 * len(found) + 0.3, 3.7) as (figure, png):
        for axes, each in zip(figure.subplots(1, len(found), squeeze=False).ravel(), found, strict=True):
            pairs = compared(shown.record, each.lower, each.upper)
            axes.scatter([x for x, _ in pairs], [y for _, y in pairs], color=shown.color(each.upper), s=22)
            axes.set_xlabel(f"loss at {plain(shown.rungs[each.lower])}")
            axes.set_ylabel(f"loss at {plain(shown.rungs[each.upper])}")
            low, high = each.interval
            title = f"rank correlation {each.correlation:.2f}\n{low:.2f} to {high:.2f}, {each.candidates} candidates"
            axes.set_title(title, fontsize=9)
        return png()


def cost(found: Standing, names: Sequence[str], unit: str) -> bytes:
    """Spent and left on each rung."""
    with _figure(7.4, 0.5 * len(names) + 1.5) as (figure, png):
        axes = figure.subplots()
        spent = [rung.finished if rung.spent is None else rung.spent for rung in found.rungs]
        ahead = [rung.left if rung.ahead is None else rung.ahead for rung in found.rungs]
        at = list(reversed(range(len(names))))
        axes.barh(at, spent, color=NEAREST, height=0.6, label="spent")
        axes.barh(at, ahead, left=spent, color=SHORTEST, height=0.6, label="left")
        for place, rung, end in zip(at, found.rungs, np.add(spent, ahead), strict=True):
            done = rung.finished + rung.failed
            axes.text(end, place, f"  {done} of {done + rung.left} trials", va="center", fontsize=8)
        axes.set_yticks(at, [plain(name) for name in names])
        axes.set_xlim(0, 1.3 * max(1e-9, *np.add(spent, ahead)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(unit)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return png()


def history(shown: Shown) -> bytes:
    """Losses in the order of the trials, with the best so far of each rung."""
    with _figure(8.4, 3.6) as (figure, png):
        axes = figure.subplots()
        top = shown.highest()
        for rung, name in enumerate(shown.rungs):
            _points(axes, shown, rung, lambda trial: float(trial.number), top)
            trials = [(trial.number, loss) for trial, loss in ended(shown.record, rung) if math.isfinite(loss)]
            if trials:
                best = np.minimum.accumulate([loss for _, loss in trials])
                numbers = [number for number, _ in trials]
                axes.step([*numbers, len(shown.record.trials)], np.minimum([*best, best[-1]], top), where="post",
                          color=shown.color(rung), label=f"best at {plain(name)}", linewidth=1.5)  # fmt: skip
        axes.set_xlabel("trial")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=min(4, len(shown.rungs)), frameon=False)
        return png()


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Callable[[], bytes]]]:
    """Yields a figure of so many inches, and what makes a PNG of it."""
    with (
        mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.usetex": False}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of letters that the font does not have
        # A canvas of its own: no display is needed, and a user's pyplot state is left alone.
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)

        def png() -> bytes:
            file = BytesIO()
            # Without the time and the version in it: the same study is the same file.
            figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
            return file.getvalue()

        yield figure, png
