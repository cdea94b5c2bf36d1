"""`explain`: one row per parameter of the target. Allocates no weights."""

import csv
import io
import json
from pathlib import Path

import click

from mup_megatron.cli.options import load_plan, recipe_option, target_argument
from mup_megatron.plan_table import COLUMNS, print_plan
from mup_megatron.targets import remarks_for_file
from mup_megatron.theory import Plan


@click.command()
@target_argument
@recipe_option
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--brief", is_flag=True, help="The table shows layers that are alike as one.")
def command(target: Path, recipe_path: Path, form: str, brief: bool) -> None:
    """What every parameter of TARGET gets from a recipe: role, init std, multiplier, LR, eps, weight decay.

    Where the recipe's horizon moves the base's values to another batch or another number of tokens, the table's second
    line has what it makes of them; the rows follow from those.

    TARGET is a model file, or a Hugging Face configuration: its config.json or the folder of that.
    """
    recipe, plan = load_plan(target, recipe_path)
    for sentence in remarks_for_file(target, recipe):
        click.echo(sentence, err=True)
    match form:
        case "json":
            horizon = recipe.horizon
            moved = {} if horizon is None else {"horizon": horizon.to_json(recipe.training, recipe.moves)}
            click.echo(json.dumps(plan.to_json() | moved, indent=2))
        case "csv":
            click.echo(_csv(plan), nl=False)
        case _:
            print_plan(plan, brief=brief, moved=recipe.told_horizon)


def _csv(plan: Plan) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in plan.entries:
        values = (getattr(entry, column) for column in COLUMNS)
        writer.writerow(["x".join(map(str, v)) if isinstance(v, tuple) else v for v in values])
    return text.getvalue()
