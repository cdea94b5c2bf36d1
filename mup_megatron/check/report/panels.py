"""The panels of a verdict's picture: which measurement each shows, and how."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mup_megatron.architectures.measured import Kind, Measured
from mup_megatron.check.entries import is_any, is_embedding, is_readout, is_vector
from mup_megatron.check.measure.measurements import Key, Measurements, Quantity
from mup_megatron.check.measure.names import layer_of
from mup_megatron.check.verdict.comparison import ORDER, TOLERANCES, Compared, Finding, Mismatch, t_quantile
from mup_megatron.check.verdict.verdict import CheckOutcome, Verdict
from mup_megatron.theory import PlanEntry

FAULT, CALM, GREY, BAND, PASSED, UNDECIDED = "#c0271c", "#3f5468", "#8a929b", "#bfd3e6", "#2e7d4f", "#9a6a00"
_LEAST_RANGE = 6.0
"""Times by which a logarithmic axis ranges at least: noise must not look like a slope."""
_NAME = 44
"""Characters of a name that a panel is wide enough for."""
SPREAD = 6
"""Panels for the activations of a model that does not say which it has measured."""
_ROLES: Mapping[str, tuple[str, float, Callable[[PlanEntry], bool]]] = {
    "embedding": ("o", 10, is_embedding),
    "readout": ("D", 5, is_readout),
    "norms and biases": ("^", 4, is_vector),
    "hidden matrices": ("s", 7.5, is_any),
}
"""Role → marker, its size, and its parameters: those that it fits and none before it."""
SETTINGS = {
    Quantity.INITIAL: "Initial weights",
    Quantity.LEARNING_RATE: "Learning rate that acted",
    Quantity.EPS: "eps that acted",
    Quantity.WEIGHT_DECAY: "Weight decay that acted",
}
"""Quantity → its panel's title."""
_FOLLOWS = {
    Quantity.GRADIENT: ("gradients", "o", 9),
    Quantity.SPECTRAL: ("spectral norm of updates", "s", 6.5),
    Quantity.OVERLAP: ("overlap with initial weights", "^", 4.5),
    Quantity.UNEXPLAINED: ("unexplained movement", "D", 4.5),
    Quantity.DEAD: ("rows without gradient", "v", 4.5),
}
"""Quantity → its name, marker and the marker's size."""


class ShownVerdict:
    """A verdict, and which of its measurements are at fault."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        found = [f for section in verdict.sections for f in section.findings if f.key.quantity in ORDER]
        self.findings = sorted(found, key=lambda finding: ORDER.index(finding.key.quantity))
        self.compared: Mapping[Key, Compared] = {**verdict.comparison, **{f.key: f.compared for f in found}}
        """With those of long runs in which something was found."""
        first = [f for f in self.findings if f.key.quantity is self.findings[0].key.quantity]
        of_culprit = [f for f in first if _module(f.key.name) == _module(verdict.culprit or "")]
        self.at_fault = {f.key for f in of_culprit or first}
        """Of the earliest quantity in the causal order: the culprit's, or all if it is none of them."""

    def shown(self, found: Sequence[Finding]) -> Finding | None:
        """Returns the one of a panel's findings to tell: at fault, else the earliest; the largest of those."""
        fault = [f for f in found if f.key in self.at_fault]
        first = fault or [f for f in found if f.key.step == min(g.key.step for g in found)]
        return max(first, key=lambda finding: finding.size, default=None)

    def role(self, key: Key) -> str | None:
        """Returns the role of a parameter; None for what is none of the plan's."""
        entry = self.verdict.entries.get(key.name)
        return None if entry is None else next(role for role, (_, _, fits) in _ROLES.items() if fits(entry))

    def frame(self, axes: Any, found: Sequence[Finding]) -> None:
        """Marks a panel in which something was found."""
        if found:
            _frame(axes, fault=any(f.key in self.at_fault for f in found))


def _frame(axes: Any, *, fault: bool) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, color=FAULT, linewidth=3.5 if fault else 1.0)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _told(finding: Finding) -> str:
    """Slope or factor, as it stands in a panel; of what is 0 somewhere, values."""
    c = finding.compared
    if finding.key.quantity is Quantity.UNEXPLAINED:
        return f"{finding.compared.largest:.0%} of a step is unexplained"
    if c.floored:
        return str(c.shown)
    if finding.kind is Mismatch.SLOPE:
        return f"slope {c.subject.value:+.2f}, expected {c.reference}"
    return f"{c.factor:.3g} × what is expected, at every width"


def _folded(name: str) -> str:
    """Returns a name on lines that a panel is wide enough for."""
    if len(name) <= _NAME:
        return name
    cut = name.rindex(".", 0, _NAME)
    return f"{name[:cut]}\n  {name[cut:]}"


@dataclass(frozen=True)
class _Ratio:
    """A line of found / expected over width."""

    label: str
    marker: str
    size: float
    deviations: Mapping[int, float]
    """Width → log(found / expected)."""
    off: bool


def settings_panel(axes: Any, picture: ShownVerdict, quantity: Quantity) -> None:
    """Draws, of each role, the parameter that is furthest off."""
    found = [f for f in picture.findings if f.key.quantity is quantity]
    off = {f.key for f in found}
    _heading(axes, SETTINGS[quantity])
    ratios = []
    for role, (marker, points, _) in _ROLES.items():
        of_role = [c for c in picture.compared.values() if c.key.quantity is quantity and picture.role(c.key) == role]
        worst = max([c for c in of_role if c.key in off] or of_role, key=_furthest, default=None)
        if worst is not None:
            ratios.append(_Ratio(role, marker, points, worst.deviations, worst.key in off))
    _ratios(axes, picture, ratios, found, TOLERANCES[quantity].level)


def consequences_panel(axes: Any, picture: ShownVerdict) -> None:
    """Draws of each quantity what is furthest off, or the mean over all parameters where nothing is."""
    found = [f for f in picture.findings if f.key.quantity in _FOLLOWS]
    _heading(axes, "Gradients and weights: found / expected")
    ratios = []
    for quantity, (name, marker, points) in _FOLLOWS.items():
        of_it = [c for c in picture.compared.values() if c.key.quantity is quantity]
        worst = max((f.compared for f in found if f.key.quantity is quantity), key=_furthest, default=None)
        if worst is not None:
            ratios.append(_Ratio(name, marker, points, worst.deviations, off=True))
        elif of_it and quantity not in (Quantity.UNEXPLAINED, Quantity.DEAD):  # of which there is none, on both sides
            widths = set.intersection(*(set(c.deviations) for c in of_it))
            mean = {width: fmean(c.deviations[width] for c in of_it) for width in sorted(widths)}
            ratios.append(_Ratio(f"{name}, mean", marker, points, mean, off=False))
    _ratios(axes, picture, ratios, found, TOLERANCES[Quantity.GRADIENT].level)


def _furthest(c: Compared) -> float:
    return max((abs(deviation) for deviation in c.deviations.values()), default=0.0)


def _ratios(
    axes: Any, picture: ShownVerdict, ratios: Sequence[_Ratio], found: Sequence[Finding], tolerance: float
) -> None:
    if not ratios:
        _absent(axes, "not measured")
        return
    axes.axhspan(math.exp(-tolerance), math.exp(tolerance), color=BAND, alpha=0.6, linewidth=0)
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    for ratio, shade in zip(ratios, ("#3f5468", "#6f8599", "#9aaabb", "#55606b", "#7f8c96"), strict=False):
        values = [math.exp(deviation) for deviation in ratio.deviations.values()]
        color = FAULT if ratio.off else shade
        axes.plot(
            list(ratio.deviations), values, color=color, marker=ratio.marker, markersize=ratio.size, linewidth=1.2,
            label=ratio.label,
        )  # fmt: skip
    _scales(axes, picture.verdict.widths)
    _widen(axes, 1.0)
    axes.legend(fontsize=7.5, frameon=False, loc="best", labelcolor="linecolor")
    shown = picture.shown(found)
    if shown is not None:
        _note(axes, f"{_folded(shown.key.name)}\n{_told(shown)}", off=True)
    picture.frame(axes, found)


@dataclass(frozen=True)
class ActivationPanel:
    """A panel that shows one of several activations: what is at fault, or one of those that lead."""

    title: str
    leading: frozenset[str]
    others: tuple[str, ...] = ()
    """What is shown where nothing leads, the first that there is."""

    def has(self, key: Key) -> bool:
        """Returns whether a measurement is of one of its activations."""
        activation = key.quantity in (Quantity.ACTIVATION, Quantity.UPDATE)
        return activation and (key.name in self.leading or key.name in self.others)

    def usual(self, compared: Sequence[Compared]) -> Key | None:
        """Returns the update after the most steps in the last layer of what leads, or else of the others."""
        updates = [c.key for c in compared if c.key.quantity is Quantity.UPDATE]
        for names in (self.leading, *({name} for name in self.others)):
            fit = [key for key in updates if key.name in names]
            if fit:
                return max(fit, key=lambda key: (key.step, layer_of(key.name) or 0))
        return None


def activation_panel(axes: Any, picture: ShownVerdict, panel: ActivationPanel) -> None:
    """Draws the size of activations over width, of all of a panel's the one to look at."""
    name = panel.title
    of_panel = [c for c in picture.compared.values() if panel.has(c.key)]
    found = [f for f in picture.findings if panel.has(f.key)]
    named = [f for f in found if f.key in picture.at_fault or f.key.name in panel.leading]
    shown = picture.shown(named or found)
    key = shown.key if shown is not None else panel.usual(of_panel)
    if key is None:
        _heading(axes, name)
        _absent(axes, "not in this model" if picture.compared else "not measured")
        return
    layer = layer_of(key.name)
    _heading(axes, name if layer is None else f"{name}, layer {layer}")
    verdict, off = picture.verdict, shown is not None
    when = "size before training" if key.quantity is Quantity.ACTIVATION else f"size of its change in {key.step} steps"
    axes.set_ylabel(f"{when} (RMS)", fontsize=8)
    if key in verdict.comparison:
        _band(axes, verdict.reference, key, verdict.widths)
        dashed = [(w, v) for w in verdict.widths if (v := verdict.control.typical(key, w))]
        axes.plot(*zip(*dashed, strict=True), color=GREY, linestyle="--", linewidth=1.3) if dashed else None
        for run in verdict.subject.runs:
            if run.values.get(key, 0.0) > 0:
                axes.plot([run.width], [run.values[key]], "o", color=FAULT if off else CALM, markersize=5, alpha=0.8)
    else:  # of a long run, of which only the comparison is kept
        deviations = picture.compared[key].deviations
        axes.axhline(1.0, color=GREY, linewidth=0.8)
        axes.plot(list(deviations), [math.exp(d) for d in deviations.values()], "o-", color=FAULT)
        axes.set_ylabel(f"found / expected after {key.step} steps", fontsize=8)
    _scales(axes, verdict.widths)
    _widen(axes)
    c = picture.compared[key]
    what = "" if key.name in panel.leading else f"{_folded(key.name)}\n"
    told = _told(shown) if shown is not None else f"slope {c.subject.value:+.2f}, expected {c.reference}"
    _note(axes, f"{what}{told}" if off else told, off=off)
    picture.frame(axes, found)


def loss_panel(axes: Any, picture: ShownVerdict) -> None:
    """Draws the loss of each width over the steps."""
    verdict = picture.verdict
    _heading(axes, "Training loss by width")
    for index, width in enumerate(verdict.widths):
        shade = 0.25 + 0.75 * (index + 1) / len(verdict.widths)
        for measured, style in ((verdict.reference, ":"), (verdict.subject, "-")):
            curve = _mean_losses(measured, width)
            label = f"width {width}" if style == "-" else None
            axes.plot(range(1, len(curve) + 1), curve, style, color=CALM, alpha=shade, linewidth=1.6, label=label)
    axes.set_xlabel("step")
    axes.legend(fontsize=7.5, frameon=False, title="dotted: reference", title_fontsize=7.5)
    found = [f for f in picture.findings if f.key.quantity is Quantity.LOSS]
    failed = [
        section
        for section in verdict.sections
        if section.outcome is CheckOutcome.FAIL and not section.findings and section.name != "coordinates"
    ]
    if failed and failed[0].lines:
        _note(axes, textwrap.fill(failed[0].lines[0], 48), off=True)
    if failed:
        _frame(axes, fault=not picture.findings)
    picture.frame(axes, found)


def _band(axes: Any, reference: Measurements, key: Key, widths: Sequence[int]) -> None:
    """Draws where 95% of single seeds of the reference fall, with the spread of all widths."""
    logs = {w: [math.log(run.values[key]) for run in reference.at(w) if run.values.get(key, 0.0) > 0] for w in widths}
    logs = {w: values for w, values in logs.items() if values}
    freedom = max(1, sum(len(values) - 1 for values in logs.values()))
    spread = math.sqrt(sum((v - fmean(values)) ** 2 for values in logs.values() for v in values) / freedom)
    # At least a line's width.
    half = {w: max(0.02, t_quantile(0.975, freedom) * spread * math.sqrt(1 + 1 / len(logs[w]))) for w in logs}
    low, high = ([math.exp(fmean(logs[w]) + sign * half[w]) for w in logs] for sign in (-1, 1))
    axes.fill_between(list(logs), low, high, color=BAND, linewidth=0)


def _mean_losses(measured: Measurements, width: int) -> list[float]:
    runs = [run.losses for run in measured.at(width)]
    length = min((len(losses) for losses in runs), default=0)
    return [fmean(losses[step] for losses in runs) for step in range(length)]


def activation_panels(picture: ShownVerdict) -> list[ActivationPanel]:
    """Returns the panels of what an architecture has measured: embedding and residual stream, those of its families of
    layers, the readout. Of any other model, activations that lie apart, those that are off first.
    """
    measured = picture.verdict.measured
    if measured:
        edges = {each.kind: each.panel for each in measured}
        first = [edges[kind] for kind in (Kind.TABLE, Kind.STREAM) if kind in edges]
        titles = dict.fromkeys([*first, *(each.panel for each in measured)])
        return [_of_title(title, [each for each in measured if each.panel == title]) for title in titles]
    names = list(dict.fromkeys(key.name for key in picture.compared if key.quantity is Quantity.UPDATE))
    off = [f.key.name for f in picture.findings if f.key.name in names]
    spread = [names[round(i * (len(names) - 1) / (SPREAD - 1))] for i in range(SPREAD)] if names else []
    return [ActivationPanel(name, frozenset({name})) for name in list(dict.fromkeys([*off, *spread]))[:SPREAD]]


def _of_title(title: str, measured: Sequence[Measured]) -> ActivationPanel:
    # What is computed last says most.
    others = tuple(each.module for each in reversed(measured) if not each.leads)
    return ActivationPanel(title, frozenset(each.module for each in measured if each.leads), others)


def _heading(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left", fontweight="bold", color="#222222", pad=8)


def _scales(axes: Any, widths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_xlim(widths[0] / 1.2, widths[-1] * 1.2)
    axes.minorticks_off()
    axes.set_xlabel("width")


def _widen(axes: Any, centre: float | None = None) -> None:
    """An axis over a range that noise does not fill, with room above for words; ticks at 1, 2 and 5."""
    low, high = axes.get_ylim()
    if centre is not None:
        low, high = min(low, centre), max(high, centre)
    middle, half = math.sqrt(low * high), max(math.sqrt(high / low), math.sqrt(_LEAST_RANGE))
    low, high = middle / half, middle * half
    axes.set_ylim(low, high * (high / low) ** 0.35)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [t for d in decades for step in steps if low <= (t := step * 10.0**d) <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _note(axes: Any, text: str, *, off: bool) -> None:
    axes.text(
        0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=8.5 if off else 8, linespacing=1.4,
        color=FAULT if off else GREY, fontweight="bold" if off else "normal",
    )  # fmt: skip


def _absent(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])
