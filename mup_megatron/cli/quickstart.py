"""`quickstart`: the whole path in small, on this machine."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mup_megatron.cli.options import COUNT, FILE, answer_console
from mup_megatron.files import write_atomically

if TYPE_CHECKING:
    from mup_megatron.quickstart.experiment import ExperimentSettings


@click.command()
@click.option("--output", type=FILE, default=Path("results/quickstart"), show_default=True, help="Folder.")
@click.option(
    "--seed", type=click.IntRange(1, 2**32 - 1), default=1, show_default=True, help="Of search, weights and data."
)
@click.option("--workers", type=COUNT, default=2, show_default=True, help="Runs at a time, of one thread each.")
def command(output: Path, seed: int, workers: int) -> None:
    """Tune a small GPT, carry its hyperparameters to one 4× as wide, and compare with standard parametrization.

    Everything is real and small: Megatron-Core, an Optuna search, the Python standard library's source as text.
    Interrupted, the same command goes on.
    """
    # Before torch is imported: runs beside each other must not fight for cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from mup_megatron.quickstart.experiment import ExperimentSettings
    from mup_megatron.training.data import CACHE
    from mup_megatron.training.data.embedded import embedded_data
    from mup_megatron.training.ranks import preload

    settings = ExperimentSettings(seed=seed)
    preload()
    _say("0/3  preparing the text: the Python standard library's own source")
    data = embedded_data(CACHE, tokenizer=f"bpe:{settings.vocab_size}")
    conduct(settings, data, output, cache=CACHE, workers=workers)


def conduct(settings: "ExperimentSettings", data: Path, output: Path, *, cache: Path, workers: int) -> None:
    """Runs the experiment, or what is left of it, and gives its answer: files, and a table on standard output.

    Raises:
        InputError: as `quickstart.experiment.run`.
    """
    from mup_megatron.quickstart.experiment import run
    from mup_megatron.quickstart.picture import png
    from mup_megatron.quickstart.report import caption, grid_csv, summary, table

    experiment = run(
        settings,
        data,
        output,
        cache=cache,
        workers=workers,
        say=_say,
        tick=lambda done, total, text: _say(f"[{done}/{total}] {text}"),
    )
    _say("3/3  table and picture")
    files: dict[str, str | bytes] = {
        "quickstart.png": png(experiment),
        "summary.json": json.dumps(summary(experiment), indent=1, allow_nan=False),
        "grid.csv": grid_csv(experiment),
    }
    for name, content in files.items():
        write_atomically(output / name, content)
    console = answer_console()
    console.print(table(experiment))
    console.print(f"\n{caption(experiment)}\n", highlight=False)
    console.print("   ".join(str(output / name) for name in (*files, "quickstart.recipe.yaml")), highlight=False)


def _say(text: str) -> None:
    click.echo(text, err=True)
