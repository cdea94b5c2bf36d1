"""`args`: the Megatron-LM flags of a model file, and of a recipe."""

from pathlib import Path

import click

from mup_megatron.architectures.registry import load_model_file
from mup_megatron.cli.options import COUNT, FILE, load_planned, target_argument
from mup_megatron.megatron.arguments.convert import flags


@click.command()
@target_argument
@click.option("--recipe", "recipe_path", type=FILE, metavar="R",
              help="The recipe file. Without it, the flags of the model alone.")  # fmt: skip
@click.option("--train-iters", type=COUNT, metavar="N",
              help="Length of the run, for schedules that Megatron counts in iterations.")  # fmt: skip
@click.option("--one-line", is_flag=True, help="All flags on one line instead of one on each.")
def command(target: Path, recipe_path: Path | None, train_iters: int | None, one_line: bool) -> None:
    """TARGET as Megatron-LM's flags, with the hyperparameters and the schedule of a recipe.

    For a launch script: torchrun … -m mup_megatron.launch pretrain_gpt.py $(mup-megatron args …) --mup-recipe R …

    They are the flags that the installed Megatron-Core takes, or without one the newest that was tested. Nothing is
    quoted: in a script that has them without $(…), put quotes around a pattern of layers.
    """
    if recipe_path is None:
        words = flags(load_model_file(target))
    else:
        model, recipe, _ = load_planned(target, recipe_path)
        words = flags(model, recipe, train_iters=train_iters)
    lines: list[str] = []
    for word in words:
        if word.startswith("--"):
            lines.append(word)
        else:
            # In `$(…)` quotes would be a part of the word, and a pattern alone could become a file's name.
            lines[-1] += f"={word}" if set(word) & set("*[") else f" {word}"
    click.echo((" " if one_line else "\n").join(lines))
