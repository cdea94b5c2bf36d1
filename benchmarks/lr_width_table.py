"""What `lr_width.py` concludes from losses: where optima are, what a transferred rate costs, if wider is better."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mup_megatron.check.verdict.basins import BasinOptimum, judge_transfer

Curve = Sequence[float] | None
"""The mean loss of each tenth of a run; None where it diverged."""
Basin = Mapping[float, Sequence[Curve]]
"""Learning rate → the curves of its seeds."""
TENTHS = 10
ARM = "ours"
"""With whose runs those of the others are compared."""
EXACT = ("standard",)
"""Arms that give its digits at the base, whatever the recipe; another library's kernels round otherwise."""
EXACT_AT_POWERS_OF_2 = (*EXACT, "native")
"""Those that do so if multipliers are powers of 2: other products are rounded, and Megatron multiplies elsewhere."""


def tenths(losses: Sequence[float]) -> list[float]:
    """Returns the mean loss of each tenth of a run; of each step, if it has less than ten."""
    parts = min(TENTHS, len(losses))
    ends = [round(part * len(losses) / parts) for part in range(parts + 1)]
    return [fmean(losses[begin:end]) for begin, end in itertools.pairwise(ends)]


def final(curve: Curve) -> float:
    """Returns a run's loss at its end, infinite if it diverged."""
    return math.inf if curve is None else curve[-1]


def mean_final(curves: Iterable[Curve]) -> float:
    """Returns the mean of runs' losses at their end."""
    return fmean(final(curve) for curve in curves)


def best_rate(basin: Basin) -> float:
    """Returns the learning rate, of those that were tried, that is best on the mean of seeds."""
    return min(sorted(basin), key=lambda lr: mean_final(basin[lr]))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What an arm's basins say, from the base's width on."""

    optima: Mapping[int, BasinOptimum]
    least: Mapping[int, float]
    """Of each width, the mean loss at its best rate."""
    shift_interval: tuple[float, float]
    """Of the octaves from the base's optimum to the widest's, at 95 %."""
    regrets: Mapping[int, float]
    """Of each width, the share of its best mean loss that the base's best rate costs there."""
    worst_at_best: float
    """From a width to the next, by what share the mean loss at the best rate changes, where it falls least."""
    worst_by_tenth: tuple[float, ...]
    """Likewise of each tenth of training, at the base's best rate."""

    @property
    def moved(self) -> tuple[int, float]:
        """Returns the width whose optimum is furthest from the base's, and by how many octaves."""
        first = next(iter(self.optima.values())).log2_lr
        moves = {width: optimum.log2_lr - first for width, optimum in self.optima.items()}
        width = max(moves, key=lambda each: abs(moves[each]))
        return width, moves[width]

    @property
    def regret(self) -> tuple[int, float]:
        """Returns the width at which the base's rate costs most, and what share of the loss."""
        width = max(self.regrets, key=self.regrets.__getitem__)
        return width, self.regrets[width]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; None stands for what is not finite."""
        return {
            "log2_lr": {w: [_plain(o.log2_lr), _plain(o.low), _plain(o.high)] for w, o in self.optima.items()},
            "at_an_end": [w for w, o in self.optima.items() if o.edge],
            "loss": {w: _plain(loss) for w, loss in self.least.items()},
            "moved_octaves": _plain(self.moved[1]),
            "shift_interval": [*map(_plain, self.shift_interval)],
            "regret": {w: _plain(regret) for w, regret in self.regrets.items()},
            "worst_change_at_best": _plain(self.worst_at_best),
            "worst_change_by_tenth": [*map(_plain, self.worst_by_tenth)],
        }


def summary(basins: Mapping[int, Basin]) -> Summary:
    """Returns what an arm's basins say.

    Args:
        basins: of three widths or more, the first of them the base's; the base's best rate is in all of them.
    """
    losses = {w: {lr: [*map(final, curves)] for lr, curves in basin.items()} for w, basin in basins.items()}
    judged = judge_transfer(losses)
    transferred = best_rate(next(iter(basins.values())))
    own = {width: best_rate(basin) for width, basin in basins.items()}
    least = {width: mean_final(basins[width][own[width]]) for width in basins}
    at_transferred = [basin[transferred] for basin in basins.values()]
    return Summary(
        optima=judged.optima,
        least=least,
        shift_interval=judged.shift_interval,
        regrets={w: _change(least[w], mean_final(basin[transferred])) for w, basin in basins.items()},
        worst_at_best=worst_change([*least.values()]),
        worst_by_tenth=tuple(
            worst_change([fmean(math.inf if c is None else c[tenth] for c in curves) for curves in at_transferred])
            for tenth in range(_tenths(at_transferred))
        ),
    )


def _tenths(curves: Sequence[Sequence[Curve]]) -> int:
    return max((len(curve) for seeds in curves for curve in seeds if curve is not None), default=0)


def worst_change(losses: Sequence[float]) -> float:
    """Returns the largest change from a loss to the next, as a share of it; negative where all are falls."""
    return max(_change(before, after) for before, after in itertools.pairwise(losses))


def _change(before: float, after: float) -> float:
    if not math.isfinite(after):
        return math.inf
    return (after - before) / before if math.isfinite(before) else -math.inf


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- agreement -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How an arm's runs compare with those of `ARM` at the same rates and seeds."""

    runs: int
    same_start: bool
    """Whether all begin with the same weights, to the last bit."""
    same_digits: bool
    """Whether all losses are the same, to the last bit."""
    furthest: float
    """The largest difference of two runs' losses at their end, as a share."""
    at_first: float
    """Likewise of the first tenth of training."""


def agreement(own: Mapping[Any, Mapping[str, Any]], other: Mapping[Any, Mapping[str, Any]]) -> Agreement:
    """Compares rows of runs by rate and seed, those that both have.

    Args:
        own: of `ARM`: each has `curve` and `start`.
        other: of another arm.
    """
    both = [(own[key], other[key]) for key in own if key in other]

    def furthest(tenth: int) -> float:
        shares = [0.0]
        for a, b in both:
            if a["curve"] is not None and b["curve"] is not None:
                shares.append(abs(b["curve"][tenth] - a["curve"][tenth]) / a["curve"][tenth])
            elif a["curve"] is not b["curve"]:
                shares.append(math.inf)
        return max(shares)

    return Agreement(
        runs=len(both),
        same_start=all(a["start"] == b["start"] for a, b in both),
        same_digits=all(a["curve"] == b["curve"] for a, b in both),
        furthest=furthest(-1),
        at_first=furthest(0),
    )


def agreement_lines(base: int, at_base: Mapping[str, Agreement], beyond: Mapping[str, Agreement]) -> list[str]:
    """Returns what there is to say of how arms agree, in sentences."""
    lines = []
    for arm, found in at_base.items():
        start = "the same" if found.same_start else "OTHER"
        digits = "the same digits" if found.same_digits else f"losses within {found.furthest:.1e} of the loss"
        if not found.same_digits:
            digits += f", {found.at_first:.1e} in the first tenth"
        lines.append(f"{arm} beside {ARM} at {base}, {found.runs} runs: {start} initial weights, {digits}")
    for arm, found in beyond.items():
        if found.runs:
            lines.append(f"{arm} beside {ARM} beyond {base}, {found.runs} runs: losses within {found.furthest:.1e}")
    return lines


def broken(shape: str, base: int, at_base: Mapping[str, Agreement], exact: Sequence[str]) -> list[str]:
    """Returns where arms do not agree at the base that have to: all begin alike, `exact` ones give all digits."""
    problems = [f"{shape}: {arm} begins with other weights at {base}" for arm, a in at_base.items() if not a.same_start]
    return problems + [
        f"{shape}: {arm} gives other digits at {base}"
        for arm, a in at_base.items()
        if arm in exact and not a.same_digits
    ]


# ---- telling -------------------------------------------------------------------------------------------------------


def markdown(arms: Mapping[str, Summary], refused: Mapping[str, str]) -> list[str]:
    """Returns a shape's table: a row for each arm, with nothing at widths that only others were run at."""
    widths = sorted({width for found in arms.values() for width in found.optima})
    head = ["", *map(str, widths), *_CONCLUSIONS]
    lines = _head(head)
    for arm, found in arms.items():
        cells = [_basin_cell(found.optima[w], found.least[w]) if w in found.optima else "" for w in widths]
        lines.append(f"| {arm} | {' | '.join([*cells, *_conclusions(found)])} |")
    return [*lines, *(f"| {arm} | refused: {why} |{' |' * (len(head) - 2)}" for arm, why in refused.items())]


def overview(arm: str, shapes: Mapping[str, Summary]) -> list[str]:
    """Returns a table of an arm: a row for each shape."""
    rows = ([shape, ", ".join(map(str, found.optima)), *_conclusions(found)] for shape, found in shapes.items())
    return [*_head([f"{arm}, by shape", "widths", *_CONCLUSIONS]), *(f"| {' | '.join(row)} |" for row in rows)]


_CONCLUSIONS = ("moved by, octaves", "regret", "wider better", "at the base's rate, in tenths of training")


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def _conclusions(found: Summary) -> list[str]:
    """Returns the cells below `_CONCLUSIONS`."""
    moved_at, moved = found.moved
    low, high = found.shift_interval
    regret_at, regret = found.regret
    worst = found.worst_by_tenth
    wrong = [str(tenth) for tenth, change in enumerate(worst, start=1) if change >= 0]
    which = f"not in {', '.join(wrong)}" if wrong else "in all"
    return [
        f"{moved:+.2f} at {moved_at}; at {[*found.optima][-1]} {low:+.2f} … {high:+.2f}",
        f"{_percent(regret, sign='')} at {regret_at}",
        f"{'yes' if found.worst_at_best < 0 else 'no'} ({_percent(found.worst_at_best)})",
        f"{which} (worst {_percent(max(worst, default=math.nan))})",
    ]


def _basin_cell(optimum: BasinOptimum, least: float) -> str:
    end = {-1: "≤ ", 0: "", 1: "≥ "}[optimum.edge]
    return f"{end}{optimum.log2_lr:.2f} ({optimum.low:.2f} … {optimum.high:.2f}), {least:.3f}"


def _percent(share: float, *, sign: str = "+") -> str:
    return f"{100 * share:{sign}.2f} %" if math.isfinite(share) else "diverges"
