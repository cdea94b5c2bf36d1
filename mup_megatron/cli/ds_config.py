"""`ds-config`: a DeepSpeed configuration for a recipe, or whether an existing one goes with it."""

import json
from pathlib import Path
from typing import Any

import click

from mup_megatron.cli.options import COUNT, FILE, answer, force_option, load_plan, recipe_option
from mup_megatron.deepspeed.config import EngineSettings, configuration, problems
from mup_megatron.json_io import read_json
from mup_megatron.modules.groups import members, values
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

NO = 1


@click.command()
@click.argument("target", type=FILE, metavar="TARGET")
@recipe_option
@click.option("-o", "--output", type=FILE, metavar="DS.json", help="Where to write; standard output by default.")
@click.option("--check", "existing", type=FILE, metavar="DS.json", help="Check this configuration and write none.")
@click.option("--train-iters", type=COUNT, metavar="N",
              help="Length of the run in steps; without it, no scheduler is written.")  # fmt: skip
@click.option("--global-batch-size", type=COUNT, metavar="N", help="Default: auto, the Trainer's.")
@click.option("--micro-batch-size", type=COUNT, metavar="N", help="Per process. Default: auto.")
@click.option("--zero-stage", type=click.Choice(["0", "1", "2", "3"]), default="1", show_default=True)
@click.option("--bf16", is_flag=True, help="Train in bf16.")
@click.option("--offload-optimizer", is_flag=True, help="Optimizer states on the CPU.")
@click.option("--offload-parameters", is_flag=True, help="Parameters on the CPU; ZeRO stage 3.")
@force_option
def command(
    target: Path, recipe_path: Path, output: Path | None, existing: Path | None, force: bool, **options: Any
) -> int:
    """A DeepSpeed configuration that trains TARGET with a recipe.

    TARGET is a Hugging Face configuration (config.json or its folder) or a model file. With --check, exit code 1 and a
    line for each thing that does not go with the recipe.
    """
    recipe, plan = load_plan(target, recipe_path)
    if existing is not None:
        if output is not None:
            raise click.UsageError("--check writes nothing: drop -o.")
        return _check(existing, recipe, plan)
    settings = EngineSettings(**{**options, "zero_stage": int(options["zero_stage"])})
    text = json.dumps(configuration(recipe, path=str(recipe_path), settings=settings), indent=2) + "\n"
    answer(text, output, force=force)
    return 0


def _check(path: Path, recipe: Recipe, plan: Plan) -> int:
    found = problems(read_json(path), recipe, plan, source=str(path))
    for problem in found:
        click.echo(f"{path}: {problem}")
    if not found:
        groups = members(plan)
        click.echo(f"{path}: goes with the recipe. {len(groups)} parameter groups:")
        for name, own in values(plan).items():
            eps = "" if own.eps is None else f"  eps {own.eps:.6g}"
            click.echo(f"  lr {own.lr:<12.6g} weight_decay {own.weight_decay:<8.6g}{eps}  {len(groups[name])} × {name}")
    return NO if found else 0
