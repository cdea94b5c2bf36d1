"""`transfer`: the best trial of a study as a recipe."""

from pathlib import Path

import click

from mup_megatron.cli.options import FILE, answer, force_option
from mup_megatron.search import default_storage, read_study
from mup_megatron.tuning import transferred


@click.command()
@click.option("--study", required=True, metavar="NAME")
@click.option("--storage", metavar="URL", help="Any storage of Optuna's. [default: sqlite:///results/NAME.db]")
@click.option("-o", "--output", type=FILE, metavar="R", help="Where to write; standard output by default.")
@force_option
def command(study: str, storage: str | None, output: Path | None, force: bool) -> None:
    """The best trial of a study as a recipe, with the study, trial, data and versions that it comes from."""
    answer(transferred(read_study(storage or default_storage(study), study)).to_yaml(), output, force=force)
