"""`explain`: one row per parameter of the target. Allocates no weights."""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
from rich.table import Table

from mup_megatron.cli.options import answer_console, load_planned, recipe_option, target_argument
from mup_megatron.theory import Plan, PlanEntry

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
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")


@click.command()
@target_argument
@recipe_option
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--brief", is_flag=True, help="The table shows layers that are alike as one.")
def command(target: Path, recipe_path: Path, form: str, brief: bool) -> None:
    """What every parameter of TARGET gets from a recipe: role, init std, multiplier, LR, eps, weight decay."""
    _, _, plan = load_planned(target, recipe_path)
    match form:
        case "json":
            click.echo(json.dumps(plan.to_json(), indent=2))
        case "csv":
            click.echo(_csv(plan), nl=False)
        case _:
            _print_table(plan, brief=brief)


def _cell(entry: PlanEntry, column: str) -> str:
    value = getattr(entry, column)
    if value is None:
        return ""
    if column == "shape":
        return "×".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _csv(plan: Plan) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in plan.entries:
        values = (getattr(entry, column) for column in COLUMNS)
        writer.writerow(["x".join(map(str, v)) if isinstance(v, tuple) else v for v in values])
    return text.getvalue()


def _print_table(plan: Plan, *, brief: bool) -> None:
    console = answer_console()
    console.print(
        f"recipe {plan.fingerprint}   softmax_scale {plan.softmax_scale:.6g}   "
        f"embedding_multiplier {plan.embedding_multiplier:.6g}   output_multiplier {plan.output_multiplier:.6g}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        numeric = column not in {"name", "role", "rule"}
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for entry in _brief(plan.entries) if brief else plan.entries:
        table.add_row(*(_cell(entry, column) for column in COLUMNS))
    console.print(table)


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
