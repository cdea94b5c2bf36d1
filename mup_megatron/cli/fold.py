"""`fold`: a checkpoint in its own format that stock software computes rightly."""

from pathlib import Path

import click

from mup_megatron.cli.options import FILE, recipe_option
from mup_megatron.recipe import load_recipe
from mup_megatron.validation import listed


@click.command()
@click.argument("checkpoint", type=FILE, metavar="CHECKPOINT")
@recipe_option
@click.option("--to", type=FILE, required=True, metavar="DIR", help="The folder to make.")
def command(checkpoint: Path, recipe_path: Path, to: Path) -> None:
    """Move the multipliers of a CHECKPOINT into its weights, for inference and converters that know nothing of them.

    It stays in its format, and says that it is folded. It is not for training on: `unfold` gives back one that is.
    """
    rewrite(checkpoint, recipe_path, to, back=False)


def rewrite(checkpoint: Path, recipe_path: Path, to: Path, *, back: bool) -> None:
    """Folds or unfolds, and says what was done."""
    from mup_megatron.training import ranks

    recipe = load_recipe(recipe_path)
    ranks.enable_cpu()
    # This imports Megatron, which has to come after the CPU runtime.
    from mup_megatron.export import kinds

    done = kinds.rewrite(checkpoint, to, recipe, recipe_source=str(recipe_path), back=back)
    way = "taken out of" if back else "folded into"
    told = f"multipliers {way} {len(done.tensors)} tensors ({listed(done.tensors, 3)})" if done.tensors else "unchanged"
    click.echo(f"{done.to}: {told}; {done.optimizer}")
