"""The outcome of the experiment as a table, summary.json and summary.csv. Reads what the stages left; runs nothing."""

import csv
import io
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.recipe import load_recipe
from mup_megatron.search import StudyRecord, default_storage, find_study

VALIDATION = re.compile(r"validation loss at iteration \d+ on validation set \| lm loss value: (\S+) \|")
"""What Megatron-LM prints at the end of a run, among the iterations' lines."""


@dataclass(frozen=True)
class Row:
    """What came of one stage. None: not there yet, or no such thing."""

    stage: str
    trials: int | None = None
    complete: int | None = None
    diverged: int | None = None
    failed: int | None = None
    unfinished: int | None = None
    best_trial: int | None = None
    loss: float | None = None
    """The best trial's, or the target's."""
    recipe: str | None = None
    """The fingerprint of the recipe that the target has."""


def of_study(name: str, record: StudyRecord | None) -> Row:
    """A stage of the search."""
    if record is None:
        return Row(name)
    # A trial that failed and was run again counts as what it came to then.
    states = Counter({trial.slot: trial.state for trial in sorted(record.trials, key=lambda t: t.finished)}.values())
    best = record.best
    return Row(
        stage=name,
        trials=record.size,
        complete=states["complete"],
        diverged=states["diverged"],
        failed=states["failed"],
        unfinished=sum(record.unfinished.values()) - states["failed"],
        best_trial=None if best is None else best.number,
        loss=None if best is None else best.loss,
    )


def last_number(text: str) -> float | None:
    """The last line, if it is a number."""
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    try:
        return float(lines[-1]) if lines else None
    except ValueError:
        return None


def target_loss(evaluation: Path, log: Path) -> float | None:
    """The loss that the evaluation printed; without one, that of the last validation in the log of the run."""
    if evaluation.exists() and (found := last_number(evaluation.read_text(encoding="utf-8"))) is not None:
        return found
    if log.exists() and (losses := VALIDATION.findall(log.read_text(encoding="utf-8", errors="replace"))):
        return float(losses[-1])
    return None


def shown(value: float | int | str | None) -> str:
    """A cell of the table."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else str(value)[:12]


def as_csv(rows: list[Row]) -> str:
    """All rows, numbers in full precision."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return stream.getvalue()


@click.command()
@click.option("--study", "studies", multiple=True, required=True, metavar="NAME", help="Of a stage; in their order.")
@click.option("--storage", metavar="URL", help="Of the studies. [default: sqlite:///results/NAME.db]")
@click.option("--recipe", type=click.Path(path_type=Path), required=True)
@click.option("--target", type=click.Path(path_type=Path), required=True, help="Its model file.")
@click.option("--log", type=click.Path(path_type=Path), required=True, help="Of the target's run.")
@click.option("--evaluation", type=click.Path(path_type=Path), required=True, help="What an evaluation printed.")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="DIR")
def command(
    studies: tuple[str, ...], storage: str | None, recipe: Path, target: Path, log: Path, evaluation: Path, output: Path
) -> None:
    """Print and write what came of every stage."""
    rows = [of_study(name, find_study(storage or default_storage(name), name)) for name in studies]
    fingerprint = load_recipe(recipe).fingerprint if recipe.exists() else None
    rows.append(Row(target.stem, trials=1, loss=target_loss(evaluation, log), recipe=fingerprint))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, field in enumerate(fields(Row)):
        table.add_column(field.name.replace("_", " "), justify="right" if index else "left")
    for row in rows:
        table.add_row(row.stage, *(shown(value) for value in list(asdict(row).values())[1:]))
    Console(width=200, highlight=False).print(table)
    write_atomically(output / "summary.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    write_atomically(output / "summary.csv", as_csv(rows))


if __name__ == "__main__":
    try:
        command()
    except InputError as error:
        raise SystemExit(f"report.py: {error}") from None
