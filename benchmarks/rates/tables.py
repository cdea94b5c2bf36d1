"""The tables of `check_rates.py`: what was caught and how it was named, false alarms, times."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from mup_megatron.check.mutants import MUTANTS

PARTS = ("tune", "quick-correct", "quick-mutants", "standard-mutants", "standard-correct")
CHANGED = 1e-5
"""What some weight differs by after 20 steps, relative to the largest of its tensor: more than rounding."""


def of_part(results: Iterable[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """Returns the results of a part."""
    return [result for result in results if result["job"]["part"] == part]


def counted(results: Iterable[dict[str, Any]], mutant: str) -> list[dict[str, Any]]:
    """Returns those of a mistake where it changed anything."""
    return [r for r in results if r["job"]["mutant"] == mutant and r["change"] > CHANGED]


def caught(result: dict[str, Any]) -> bool:
    """Returns whether the check failed."""
    return bool(result["outcome"] == "fail")


def _named_rightly(result: dict[str, Any]) -> bool:
    return bool(result["causes"]) and result["causes"][0][0] in MUTANTS[result["job"]["mutant"]].cause


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Returns all that came out, as Markdown."""
    parts = {part: of_part(results, part) for part in PARTS}
    return "\n".join([*_mutants(parts), "", *_totals(parts), "", *_false_alarms(parts), "", *_times(results)])


def _mutants(parts: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| mistake | what it is | caught by quick | by standard | first seen in | cause named most often | right |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in MUTANTS:
        quick, standard = (counted(parts[part], name) for part in ("quick-mutants", "standard-mutants"))
        found = [result for result in quick + standard if caught(result)]
        cells = [
            f"`{name}`",
            MUTANTS[name].what,
            share(sum(map(caught, quick)), len(quick)),
            share(sum(map(caught, standard)), len(standard)),
            commonest(result["quantity"] for result in found),
            commonest(result["causes"][0][0] if result["causes"] else None for result in found),
            share(sum(map(_named_rightly, found)), len(found)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _totals(parts: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["| level | mistakes | checks | caught | cause right, of those caught |", "|---|---|---|---|---|"]
    for level in ("quick", "standard"):
        of_level = [result for name in MUTANTS for result in counted(parts[f"{level}-mutants"], name)]
        found = [result for result in of_level if caught(result)]
        kinds = len({result["job"]["mutant"] for result in of_level})
        right = share(sum(map(_named_rightly, found)), len(found))
        lines.append(f"| {level} | {kinds} | {len(of_level)} | {share(len(found), len(of_level))} | {right} |")
    without = sum(r["change"] <= CHANGED for part in ("quick-mutants", "standard-mutants") for r in parts[part])
    return [*lines, "", f"{without} checks of a mistake that changed nothing are not counted."]


def _false_alarms(parts: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["| correct models | checks | fail | no verdict | what |", "|---|---|---|---|---|"]
    for part in ("tune", "quick-correct", "standard-correct"):
        failed = [result for result in parts[part] if caught(result)]
        none = sum(result["outcome"] == "no verdict" for result in parts[part])
        what = "; ".join(f"{r['job']['architecture']}: {r['first'] or ', '.join(r['failed'])}" for r in failed)
        lines.append(f"| {part} | {len(parts[part])} | {len(failed)} | {none} | {what} |")
    return lines


def _times(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| level | checks | median | longest |", "|---|---|---|---|"]
    for level in ("quick", "standard"):
        seconds = [result["seconds"] for result in results if result["job"]["level"] == level]
        if seconds:
            lines.append(f"| {level} | {len(seconds)} | {median(seconds):.0f} s | {max(seconds):.0f} s |")
    return lines


def share(count: int, of: int) -> str:
    """So many of so many; nothing of none."""
    return f"{count}/{of}" if of else ""


def commonest(values: Iterable[str | None]) -> str:
    """The value that comes up most often."""
    known = [value for value in values if value is not None]
    return max(known, key=known.count) if known else ""
