"""`unfold`: the checkpoint that `fold` made, for going on with training."""

from pathlib import Path

import click

from mup_megatron.cli.fold import rewrite
from mup_megatron.cli.options import FILE, recipe_option


@click.command()
@click.argument("checkpoint", type=FILE, metavar="CHECKPOINT")
@recipe_option
@click.option("--to", type=FILE, required=True, metavar="DIR", help="The folder to make.")
def command(checkpoint: Path, recipe_path: Path, to: Path) -> None:
    """Take the multipliers out of the weights of a folded CHECKPOINT again, and out of the optimizer's state."""
    rewrite(checkpoint, recipe_path, to, back=True)
