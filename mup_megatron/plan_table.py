"""The table of a plan, for people: one row per parameter, or per run of layers that are alike."""

import itertools
import re
from collections.abc import Iterator
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


def print_plan(plan: Plan, *, brief: bool) -> None:
    """Prints a plan's table on standard output.

    Args:
        plan: what to show.
        brief: show layers that follow each other and are alike in everything as one, named `layers.FIRST-LAST`.
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
    entries = _brief(plan.entries) if brief else plan.entries
    rows = [COLUMNS, *(tuple(_cell(entry, column) for column in COLUMNS) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *lines = ("  ".join(map(_aligned, COLUMNS, row, widths)).rstrip() for row in rows)
    console.print(header, style="bold", highlight=False, markup=False)
    # A model with experts has tens of thousands of rows, for which rich's own table takes half a minute.
    console.file.write("\n".join(lines) + "\n")


def _aligned(column: str, cell: str, width: int) -> str:
    return cell.ljust(width) if column in {"name", "role", "rule"} else cell.rjust(width)


def _brief(entries: tuple[PlanEntry, ...]) -> Iterator[PlanEntry]:
    """The entries with layers that follow each other and are alike in everything as one, named `layers.FIRST-LAST`."""
    layers: list[tuple[str | None, list[PlanEntry]]] = []
    for index, group in itertools.groupby(entries, lambda entry: _layer(entry.name)):
        layers.append((index, [replace(entry, name=_LAYER.sub(r"\1{}\3", entry.name)) for entry in group]))
    for content, alike in itertools.groupby(layers, lambda layer: layer[1]):
        indices = [index for index, _ in alike]
        label = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
        yield from (replace(entry, name=entry.name.replace("{}", label)) for entry in content)


def _layer(name: str) -> str | None:
    match = _LAYER.match(name)
    return match[2] if match else None


def _cell(entry: PlanEntry, column: str) -> str:
    value = getattr(entry, column)
    if value is None:
        return ""
    if column == "shape":
        return "×".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
