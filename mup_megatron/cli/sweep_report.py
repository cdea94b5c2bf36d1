"""`sweep report`: what a search has found, as a page and pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mup_megatron.cli.options import FILE
from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.search import StudyRecord, default_storage, read_study
from mup_megatron.tuning import rung_names, whole_trial_cost
from mup_megatron.validation import brief

if TYPE_CHECKING:
    from mup_megatron.search.page import Wording


@click.command()
@click.argument("study", metavar="STUDY")
@click.option("--storage", metavar="URL", help="Any storage of Optuna's. [default: sqlite:///results/STUDY.db]")
@click.option("-o", "--output", type=FILE, metavar="DIR", help="[default: results/STUDY/report]")
def command(study: str, storage: str | None, output: Path | None) -> None:
    """Show what the search STUDY has found: one HTML page, and its pictures as PNGs beside it.

    Best trials, where a fit puts the optimum and how sure that is, which hyperparameters matter, whether the rungs of a
    ladder agree, and what was spent. The search may still be running. Files of an earlier report are replaced.
    """
    from mup_megatron.search.page import PAGE, PICTURES, report_files  # only here: matplotlib takes a second

    folder = _folder(study) if output is None else output
    record = read_study(storage or default_storage(study), study)
    files = report_files(record, _wording(record))
    for name, content in files.items():
        write_atomically(folder / name, content)
    # A study that was begun again under its name may have too few trials for what an earlier report drew.
    for picture in (folder / f"{name}.png" for name in PICTURES):
        if picture.name not in files:
            picture.unlink(missing_ok=True)
    click.echo(folder / PAGE)


def _folder(study: str) -> Path:
    try:
        default_storage(study)
    except InputError:
        raise InputError(f"STUDY {brief(repr(study))}: not the name of a folder. Say where to write with -o.") from None
    return Path("results") / study / "report"


def _wording(record: StudyRecord) -> "Wording":
    """Returns what the trials of a study are; of one that another program made with this package, only their places."""
    from mup_megatron.search.page import Wording

    ladder, ours = record.spec.ladder, "proxy" in record.spec.context
    if ladder is None:
        return Wording(["trials"], "FLOPs", whole_trial_cost(record) if ours else None, "lr")
    names = rung_names(ladder) if ours else [f"rung {number}" for number in range(len(ladder.rungs))]
    return Wording(names, "FLOPs" if ours else "cost", first="lr")
