"""A verdict in words, as JSON and as CSV. Every sentence is computed from the measurements."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.measure.names import in_layer, layer_of
from mup_megatron.check.verdict.comparison import Compared, Finding, Mismatch
from mup_megatron.check.verdict.verdict import CheckOutcome, Section, Verdict
from mup_megatron.json_io import finite

TOLD = 5
"""Findings that are told of one section; the rest is counted and in a file."""


def text(verdict: Verdict, *, title: str, files: Sequence[Path]) -> str:
    """Returns the verdict for a terminal.

    The first line says PASS, FAIL or NO VERDICT, and of what or because of what; then what each section found; then the
    likely causes, best first, with their share of the deviation; then where the files are.

    Args:
        verdict: what to tell.
        title: what was checked, as its user calls it.
        files: what else was written of it.
    """
    lines = [headline(verdict, title=title), conditions(verdict)]
    for section in verdict.sections:
        lines += ["", f"{section.name}: {section.outcome}", *(f"  {line}" for line in section.lines)]
        lines += [f"  {line}" for line in _told(section)]
    if verdict.causes:
        lines += ["", "Likely causes, and how much of the deviation each explains:"]
        for rank, cause in enumerate(verdict.causes, 1):
            what = cause.sentence if cause.sentence.startswith(cause.culprit) else f"{cause.culprit}: {cause.sentence}"
            lines.append(f"  {rank}. {cause.share:.0%}  {what}")
    if verdict.remarks:
        lines += ["", *verdict.remarks]
    if files:
        lines += ["", *map(str, files)]
    return "\n".join(lines) + "\n"


def headline(verdict: Verdict, *, title: str) -> str:
    """Returns the first line."""
    if verdict.outcome is CheckOutcome.PASS:
        return f"PASS {title}"
    if verdict.outcome is CheckOutcome.FAIL:
        return f"FAIL {title}: {verdict.culprit}"
    return f"NO VERDICT {title}: {why_none(verdict)}"


def why_none(verdict: Verdict) -> str:
    """Returns the reason that kept the check from a conclusion."""
    said = [
        line for section in verdict.sections if section.outcome is CheckOutcome.NO_VERDICT for line in section.lines
    ]
    return said[-1] if said else "nothing was measured"


def conditions(verdict: Verdict) -> str:
    """Says on what it was measured."""
    widths = ", ".join(map(str, verdict.widths))
    return (
        f"level {verdict.level}, recipe {verdict.fingerprint[:12]}, widths {widths}, "
        f"{_counted(verdict.seeds, 'seed')} each, {verdict.seconds:.0f} s"
    )


# ---- findings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alike:
    """Findings of one quantity of one parameter or activation, of whichever layers and steps."""

    findings: tuple[Finding, ...]

    @property
    def shown(self) -> Finding:
        """The one that is told: of the earliest step, the one that is furthest off."""
        first = min(finding.key.step for finding in self.findings)
        return max((f for f in self.findings if f.key.step == first), key=lambda f: f.size)

    @property
    def name(self) -> str:
        """Names it with all the layers, as `layers.0-3`, where the finding is in several."""
        layers = sorted({layer for f in self.findings if (layer := layer_of(f.key.name)) is not None})
        return in_layer(self.shown.key.name, _ranges(layers))

    @property
    def later(self) -> list[int]:
        """The further steps at which it was found."""
        return sorted({f.key.step for f in self.findings} - {self.shown.key.step})


def alike(findings: Iterable[Finding]) -> list[Alike]:
    """Returns findings, those that are alike in several layers and steps put together, in the order of the first."""
    groups: dict[tuple[Quantity, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.key.quantity, in_layer(finding.key.name, "")), []).append(finding)
    return [Alike(tuple(group)) for group in groups.values()]


def sentence(group: Alike) -> str:
    """One line: where, when, what was expected, what was found, by slope or factor and by value."""
    told = group.shown.sentence.replace(group.shown.key.name, group.name, 1)
    return f"{told} (also after {_enumerated(group.later)})" if group.later else told


def _told(section: Section) -> list[str]:
    groups = alike(section.findings)
    lines = [sentence(group) for group in groups[:TOLD]]
    if len(groups) > TOLD:
        lines.append(f"… and {len(groups) - TOLD} more, which mostly follow from these")
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 → 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _enumerated(steps: Sequence[int]) -> str:
    *most, last = map(str, steps)
    return f"{', '.join(most)} and {last} steps" if most else f"{last} step{'' if last == '1' else 's'}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# ---- files ---------------------------------------------------------------------------------------------------------


def verdict_json(verdict: Verdict, *, title: str) -> str:
    """Everything that was concluded, as JSON; the single measurements are in the CSV."""
    return json.dumps(finite({"target": title, **verdict.to_json()}), indent=1, allow_nan=False) + "\n"


def measurements_csv(verdict: Verdict) -> str:
    """Every number of every run, one row each."""
    sides = {"subject": verdict.subject, "reference": verdict.reference, "control": verdict.control}
    rows = [
        [side, run.width, run.seed, key.quantity.value, key.name, key.step, repr(value)]
        for side, measured in sides.items()
        for run in measured.runs
        for key, value in sorted(run.values.items())
    ]
    return _csv(["side", "width", "seed", "quantity", "name", "step", "value"], rows)


def comparison_csv(verdict: Verdict) -> str:
    """Subject against reference, one row for each quantity of each parameter or activation at each step.

    Slopes are of log(value) over log(width) with the half width of their 95% interval. `off` says in which way a row is
    off by more than seeds and tolerance allow. `ratio_W` is subject/reference at width W.
    """
    off = {finding.key: finding.kind for section in verdict.sections for finding in section.findings}
    compared = {**verdict.comparison, **{f.key: f.compared for s in verdict.sections for f in s.findings}}
    titles = "quantity name step slope slope_interval expected_slope expected_slope_interval factor control_slope off"
    rows = []
    for key, c in sorted(compared.items()):
        control = verdict.control_comparison.get(key)
        rows.append(
            [
                *(key.quantity.value, key.name, key.step),
                *(c.subject.value, c.subject.half_width, c.reference.value, c.reference.half_width, c.factor),
                None if control is None else control.subject.value,
                off.get(key),
                *(_ratio(c, width) for width in verdict.widths),
            ]
        )
    return _csv([*titles.split(), *(f"ratio_{width}" for width in verdict.widths)], rows)


def _ratio(compared: Compared, width: int) -> float | None:
    """None where it was not measured, or is held against no reference."""
    if width not in compared.deviations or compared.off is Mismatch.BOUND:
        return None
    return math.exp(compared.deviations[width])


def section_csv(section: Section) -> str:
    """Returns the table of a section that has one."""
    titles = list(dict.fromkeys(title for row in section.rows for title in row))
    return _csv(titles, [[row.get(title) for title in titles] for row in section.rows])


def _csv(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows(rows)
    return stream.getvalue()
