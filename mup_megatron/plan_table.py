"""The table of a plan, for people: one row per parameter, or per run of layers that are alike."""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rich.console import Console

from mup_megatron.theory import BRANCH, Plan, PlanEntry

COLUMNS = (
    "name",
    "role",
    "shape",
    "fan_in",
    "fan_out",
    "width_ratio",
    "init_std",
    "init_value",
    "multiplier",
    "lr",
    "eps",
    "weight_decay",
    "rule",
)
_LAYER = re.compile(r"^([^0-9]*?\.)(\d+)(\..+)$")
"""The first number of a name that has one is its layer."""
_EXPERT = re.compile(r"^(.*?\.experts\.(?:.*?(?=\.\d+\.)\.|.*?(?=\d+$)|))(\d+)(.*)$")
"""The number of an expert is a word of the name behind `experts`, or the end of its last one."""


def print_plan(plan: Plan, *, brief: bool, moved: str | None = None) -> None:
    """Prints a plan's table on standard output.

    Args:
        plan: what to show.
        brief: show layers, and experts of a layer, that follow each other and are alike in everything as one, named
            `layers.FIRST-LAST`.
        moved: how the base's values got to be those that the plan starts from, in a line.
    """
    # Never narrowed: to fit the terminal, a table would lose digits and columns.
    console = Console(width=1000)
    console.print(
        f"recipe {plan.fingerprint}   softmax_scale {plan.softmax_scale:.6g}   "
        f"embedding_multiplier {plan.embedding_multiplier:.6g}   output_multiplier {plan.output_multiplier:.6g}"
        + "".join(
            f"   stack {name}: {stack.layers} layers, {stack.depth} residual branches"
            for name, stack in plan.stacks.items()
        ),
        highlight=False,
    )
    for name, own in plan.deepened.items():
        console.print(
            f"depth of {name}: {own.base_layers} → {own.layers} layers, m_L {own.ratio:.6g}   blocks: branches × "
            f"{own.branch:.6g}, lr × {own.lr:.6g}, eps × {own.eps:.6g}, weight_decay × {own.weight_decay:.6g}",
            highlight=False,
        )
    for factor in sorted({plan.site(place).factor for place in plan.places if place.carries == BRANCH}):
        console.print(f"residual branches are multiplied by {factor:.6g}", highlight=False)
    if moved is not None:
        console.print(moved, highlight=False, markup=False)
    entries = _merged(_merged(plan.entries, _EXPERT), _LAYER) if brief else plan.entries
    rows = [COLUMNS, *(tuple(_cell(entry, column) for column in COLUMNS) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *lines = ("  ".join(map(_aligned, COLUMNS, row, widths)).rstrip() for row in rows)
    console.print(header, style="bold", highlight=False, markup=False)
    # A model with experts has tens of thousands of rows, for which rich's own table takes half a minute.
    console.file.write("\n".join(lines) + "\n")


def _aligned(column: str, cell: str, width: int) -> str:
    return cell.ljust(width) if column in {"name", "role", "rule"} else cell.rjust(width)


def _merged(entries: Iterable[PlanEntry], numbered: re.Pattern[str]) -> Iterator[PlanEntry]:
    """The entries with those as one, named `FIRST-LAST`, that follow each other and differ in their number alone."""

    def number(entry: PlanEntry) -> str | None:
        match = numbered.match(entry.name)
        return match[2] if match else None

    blocks: list[tuple[str | None, list[PlanEntry]]] = []
    for index, group in itertools.groupby(entries, number):
        blocks.append((index, [replace(entry, name=numbered.sub(r"\1{}\3", entry.name)) for entry in group]))
    for content, alike in itertools.groupby(blocks, lambda block: block[1]):
        indices = [index for index, _ in alike]
        label = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
        yield from (replace(entry, name=entry.name.replace("{}", label)) for entry in content)


def _cell(entry: PlanEntry, column: str) -> str:
    value = getattr(entry, column)
    if value is None:
        return ""
    if column == "shape":
        return "×".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
