"""`quickstart`: the whole path in small, on this machine."""

import json
import os
from pathlib import Path

import click

from mup_megatron.cli.options import FILE, answer_console
from mup_megatron.files import write_atomically


@click.command()
@click.option("--output", type=FILE, default=Path("results/quickstart"), show_default=True, help="Folder.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the search, the weights and the data.")
@click.option("--workers", type=int, default=2, show_default=True, help="Runs at a time, of one thread each.")
def command(output: Path, seed: int, workers: int) -> None:
    """Tune a small GPT, carry its hyperparameters to one 4× as wide, and compare with standard parametrization.

    Everything is real and small: Megatron-Core, an Optuna search, the Python standard library's source as text.
    Interrupted, the same command goes on.
    """
    # Before torch is imported: runs beside each other must not fight for cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from mup_megatron.quickstart.experiment import Settings, run
    from mup_megatron.quickstart.picture import png
    from mup_megatron.quickstart.report import caption, summary, table
    from mup_megatron.training.data import CACHE
    from mup_megatron.training.data.embedded import embedded_data
    from mup_megatron.training.ranks import preload

    def say(text: str) -> None:
        click.echo(text, err=True)

    settings = Settings(seed=seed)
    preload()
    say("0/3  preparing the text: the Python standard library's own source")
    data = embedded_data(CACHE, tokenizer=f"bpe:{settings.vocab_size}")
    experiment = run(
        settings,
        data,
        output,
        cache=CACHE,
        workers=workers,
        say=say,
        tick=lambda done, total, text: say(f"[{done}/{total}] {text}"),
    )
    say("3/3  table and picture")
    write_atomically(output / "summary.json", json.dumps(summary(experiment), indent=1))
    write_atomically(output / "quickstart.png", png(experiment))
    console = answer_console()
    console.print(table(experiment))
    console.print(f"\n{caption(experiment)}\n", highlight=False)
    console.print(f"{output / 'quickstart.png'}   {output / 'summary.json'}   {output / 'quickstart.recipe.yaml'}")
