"""The names that docs/watching.md has in its tables."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "watching.md"
STANDS_FOR = {"ROLE": r"(input|hidden|output|scalar)( ×[\d.e+-]+)?", "NNN": r"\d{3}"}
"""What a name of the page leaves open → what may stand there."""


def names(heading: str, column: str = "name") -> list[str]:
    """The names of a column of the first table under a heading, in its order; a cell may have several."""
    after = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    (table,) = re.findall(r"(?:^\|.*\n)+", after.split("\n## ")[0], re.MULTILINE)[:1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    place = rows[0].index(column)
    return [name for row in rows[2:] for name in re.findall("`([^`]+)`", row[place])]


def matching(name: str) -> re.Pattern[str]:
    """The names that are logged of one that the page has."""
    pattern = re.escape(name)
    for word, what in STANDS_FOR.items():
        pattern = pattern.replace(word, what)
    return re.compile(pattern)


def require_same(told: list[str], logged: set[str]) -> None:
    """Every name that is logged is told, and every name that is told is logged."""
    untold = {name for name in logged if not any(matching(each).fullmatch(name) for each in told)}
    assert not untold, f"not on the page: {sorted(untold)}"
    unlogged = [each for each in told if not any(matching(each).fullmatch(name) for name in logged)]
    assert not unlogged, f"on the page, and not logged: {unlogged}"
