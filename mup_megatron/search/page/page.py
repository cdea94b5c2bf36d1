"""The page of a report: one HTML file that needs no other, with its pictures as files beside it too.

What a study says of itself (its name, those of its hyperparameters) is text and is escaped; the page has no scripts.
"""

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

from mup_megatron.search.fit import fitted, least_for_fit
from mup_megatron.search.page import pictures
from mup_megatron.search.page.analysis import (
    LEAST_FOR_CORRELATION,
    LEAST_FOR_IMPORTANCE,
    agreements,
    ended,
    importances,
)
from mup_megatron.search.page.pictures import Shown
from mup_megatron.search.progress import duration
from mup_megatron.search.standing import Standing, standing
from mup_megatron.search.study import StudyRecord, Trial

PAGE = "index.html"
PICTURES = frozenset({"hyperparameters", "importance", "interactions", "parallel", "rungs", "cost", "history"})
"""The files that a page may have beside it, without their ending."""
LEAST = 4
"""Complete trials, for pictures of them."""
BEST = 10
"""Trials in the table."""


@dataclass(frozen=True)
class Wording:
    """The words and costs of trials that the search itself does not know."""

    rungs: Sequence[str]
    """What each is called; one where there is no ladder."""
    unit: str
    """Of costs."""
    cost: float | None = None
    """Of a trial, where there is no ladder."""
    first: str | None = None
    """The hyperparameter that is drawn beside all others."""


@dataclass(frozen=True)
class _Section:
    """One question, and its answer."""

    title: str
    lines: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    """The first row is its head."""
    picture: tuple[str, bytes] | None = None
    missing: str | None = None
    """Why there is no answer yet."""


def report_files(record: StudyRecord, wording: Wording) -> dict[str, str | bytes]:
    """Returns the page and the pictures of a study, by their files' names. The same study gives the same files."""
    shown = Shown(record, wording.rungs, fitted(record))
    found = standing(record, cost=wording.cost)
    answers = [
        _best(shown),
        _optimum(shown),
        _hyperparameters(shown),
        _importance(shown),
        _interactions(shown, wording.first),
        _parallel(shown),
        _rungs(shown),
        _cost(found, wording),
        _history(shown),
    ]
    sections = [section for section in answers if section is not None]
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(f"Search {record.spec.name}"),
        summary=html.escape(_summary(record, found, wording)),
        sections="\n".join(map(_html, sections)),
    )
    drawn = [section.picture for section in sections if section.picture is not None]
    assert {name for name, _ in drawn} <= PICTURES
    return {PAGE: page, **{f"{name}.png": content for name, content in drawn}}


def _summary(record: StudyRecord, found: Standing, wording: Wording) -> str:
    done = sum(rung.finished for rung in found.rungs)
    words = [f"{done} trials have a result"]
    for name in ("diverged", "failed"):
        if count := sum(getattr(rung, name) for rung in found.rungs):
            words.append(f"{count} {name}")
    if left := sum(rung.left for rung in found.rungs):
        words.append(f"{found.running} running, {left - found.running} to come")
    if found.spent is not None:
        of = "" if found.budget is None else f" of {found.budget:.3g}"
        words.append(f"{found.spent:.3g}{of} {wording.unit} spent")
    if seconds := found.seconds_left:
        words.append(f"about {duration(seconds)} left")
    best = "" if record.best is None else f" Best: {_loss(record.best)} (trial {record.best.number})."
    return f"{', '.join(words)}.{best}"


def _best(shown: Shown) -> _Section:
    title = "Best trials"
    trials = _by_loss(shown, len(shown.rungs) - 1)[:BEST]
    if not trials:
        return _Section(title, missing=f"No {_whole(shown)}trial is complete yet.")
    lines = []
    if shown.fit is not None:
        near = sum((trial.loss or 0.0) - (trials[0].loss or 0.0) <= shown.fit.residual for trial in trials)
        lines.append(
            f"Trials scatter around the fit by {shown.fit.residual:.2g}, so a smaller difference says little"
            + (f": {near} of these are as good as the best." if near > 1 else ".")
        )
    rows = [
        (str(trial.number), _loss(trial), f"{(trial.loss or 0.0) - (trials[0].loss or 0.0):.4f}",
         *(f"{trial.parameters[name]:.4g}" for name in shown.names))
        for trial in trials
    ]  # fmt: skip
    return _Section(title, lines, [("trial", "loss", "above the best", *shown.names), *rows])


def _optimum(shown: Shown) -> _Section:
    title = "Where the optimum is"
    if shown.fit is None:
        needed, there = least_for_fit(shown.record.spec.space), len(_by_loss(shown, 0))
        if there >= needed and shown.record.best is not None:
            return _Section(title, missing="No fit: some of the best losses are no sensible numbers.")
        and_whole = "" if len(shown.rungs) == 1 else " and a whole one"
        missing = f"A fit needs {needed} complete trials{_lowest(shown)}{and_whole}. There are {there}."
        return _Section(title, missing=missing)
    head = ("", "best trial", "optimum", "in nine of ten cases", "loss at most 1 % higher", "")
    best = shown.record.best
    rows: list[tuple[str, ...]] = [head]
    for name, basin in shown.fit.basins.items():
        edge = shown.fit.at_edges.get(name)
        rows.append(
            (
                name,
                "" if best is None else f"{best.parameters[name]:.4g}",
                f"{basin.optimum:.4g}",
                _between(basin.interval),
                _between(basin.basin),
                "" if edge is None else f"falls to the {('lower', 'upper')[edge]} edge",
            )
        )
    lines = [
        f"A quadratic fit over {shown.fit.trials} trials, the best third of the candidates and all of higher rungs: "
        f"its least loss is {shown.fit.loss:.4f}."
    ]
    if shown.fit.at_edges:
        lines.append("The loss still falls towards an edge of the space: search again with wider bounds.")
    return _Section(title, lines, rows)


def _hyperparameters(shown: Shown) -> _Section:
    title = "Each hyperparameter"
    if missing := _too_few(shown):
        return _Section(title, missing=missing)
    lines = ["Every trial by its rung. Triangles are losses above the picture."]
    if shown.fit is not None:
        lines.append(
            "Lines are the fit at each rung, the other hyperparameters at their optima: no trial need be on one."
        )
    return _Section(title, lines, picture=("hyperparameters", pictures.hyperparameters(shown)))


def _importance(shown: Shown) -> _Section:
    title = "What matters"
    found = importances(shown.record)
    if not found:
        there = len(ended(shown.record, 0))
        return _Section(title, missing=f"Importance needs {LEAST_FOR_IMPORTANCE} trials with a result{_lowest(shown)}, "
                                       f"one of them complete. There are {there}.")  # fmt: skip
    lines = [
        f"How much each hyperparameter decides whether a trial is among the best tenth{_lowest(shown)} (PED-ANOVA; "
        "diverged trials are the worst). It is of this space: a narrower range matters less."
    ]
    return _Section(title, lines, picture=("importance", pictures.importance(found)))


def _interactions(shown: Shown, first: str | None) -> _Section | None:
    if len(shown.names) < 2:
        return None
    first = first if first in shown.names else shown.names[0]
    title = f"{first} beside the others"
    if missing := _too_few(shown):
        return _Section(title, missing=missing)
    lines = ["The darker, the lower the loss."]
    if shown.fit is not None:
        lines.append(
            "Contours are the fitted loss, the others at their optima, and the cross is the optimum. Where they lie "
            f"askew, {first} and the other have to be chosen together."
        )
    return _Section(title, lines, picture=("interactions", pictures.interactions(shown, first)))


def _parallel(shown: Shown) -> _Section:
    title = "All candidates"
    if missing := _too_few(shown):
        return _Section(title, missing=missing)
    lines = [f"One line for each, to its loss{_lowest(shown)}; the darker, the lower."]
    if len(shown.rungs) > 1:
        lines.append("Thick lines have gone on to further rungs.")
    return _Section(title, lines, picture=("parallel", pictures.parallel(shown)))


def _rungs(shown: Shown) -> _Section | None:
    if len(shown.rungs) == 1:
        return None
    title = "Do the rungs agree?"
    found = agreements(shown.record)
    if not found:
        return _Section(title, missing=f"No two rungs have {LEAST_FOR_CORRELATION} candidates in common yet.")
    lines = [
        "Rank correlation of losses on two rungs, and an interval that holds it in nine of ten cases. Only the best go "
        "on, and among them ranks agree less than among all candidates."
    ]
    return _Section(title, lines, picture=("rungs", pictures.rungs(shown, found)))


def _cost(found: Standing, wording: Wording) -> _Section:
    unit = "trials" if found.spent is None else wording.unit
    rows: list[tuple[str, ...]] = [
        ("", "trials", "running", "left", "diverged", "failed", f"{unit} spent", f"{unit} left")
    ]
    for name, rung in zip(wording.rungs, found.rungs, strict=True):
        spent, ahead = (rung.finished, rung.left) if rung.spent is None else (rung.spent, rung.ahead)
        counts = (rung.finished, rung.running, rung.left, rung.diverged, rung.failed)
        rows.append((name, *map(str, counts), f"{spent:.3g}", f"{ahead:.3g}"))
    lines = []
    whole, low = found.rungs[-1].cost, found.rungs[0]
    if len(found.rungs) > 1 and whole is not None and found.spent is not None:
        all_whole = (low.finished + low.failed + low.left) * whole
        lines.append(
            f"All candidates as whole trials would cost {all_whole:.3g} {wording.unit}; spent is "
            f"{found.spent / all_whole:.1%} of that."
        )
    return _Section("Cost", lines, rows, ("cost", pictures.cost(found, wording.rungs, unit)))


def _history(shown: Shown) -> _Section:
    title = "History"
    if missing := _too_few(shown):
        return _Section(title, missing=missing)
    return _Section(title, picture=("history", pictures.history(shown)))


def _by_loss(shown: Shown, rung: int) -> list[Trial]:
    """Lists the complete trials of a rung, the best first."""
    trials = [(loss, trial.number, trial) for trial, loss in ended(shown.record, rung) if math.isfinite(loss)]
    return [trial for _, _, trial in sorted(trials, key=lambda each: each[:2])]


def _too_few(shown: Shown) -> str | None:
    there = len(_by_loss(shown, 0))
    return f"This needs {LEAST} complete trials{_lowest(shown)}. There are {there}." if there < LEAST else None


def _lowest(shown: Shown) -> str:
    return "" if len(shown.rungs) == 1 else " on the lowest rung"


def _whole(shown: Shown) -> str:
    return "" if len(shown.rungs) == 1 else "whole "


def _loss(trial: Trial) -> str:
    return "" if trial.loss is None else f"{trial.loss:.5g}"


def _between(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.3g} to {bounds[1]:.3g}"


def _html(section: _Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.missing is not None:
        parts.append(f'<p class="missing">{html.escape(section.missing)}</p>')
    parts += [f"<p>{html.escape(line)}</p>" for line in section.lines]
    if section.table:
        rows = [
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
            for tag, row in zip(["th", *["td"] * (len(section.table) - 1)], section.table, strict=True)
        ]
        parts.append('<div class="wide"><table>\n' + "\n".join(rows) + "\n</table></div>")
    if section.picture is not None:
        data = base64.b64encode(section.picture[1]).decode()
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    return "\n".join(parts)
