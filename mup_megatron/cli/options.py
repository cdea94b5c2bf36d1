"""Options and printing that several commands share."""

import difflib
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import load_model_file
from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.recipe import Recipe, load_recipe
from mup_megatron.targets import plan_for_file
from mup_megatron.theory import Plan

FILE = click.Path(path_type=Path)
MOST = 10**9
"""Of things on a command line: products and floats of so many stay exact."""
COUNT = click.IntRange(1, MOST)
"""A number of things."""

TRIAL_ITERS, TRIAL_BATCH = 1000, 32
"""Iterations and sequences in each, of a trial that is told no others."""

target_argument = click.argument("target", type=FILE, metavar="TARGET.yaml")
recipe_option = click.option("--recipe", "recipe_path", type=FILE, required=True, metavar="R", help="The recipe file.")
target_option = click.option(
    "--target",
    type=FILE,
    metavar="CONFIG",
    help="The model's configuration, where CHECKPOINT does not say it: of DeepSpeed alone.",
)
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")
vocab_size_option = click.option(
    "--vocab-size",
    type=COUNT,
    metavar="N",
    help="The tokenizer's number of entries, before padding, where neither the line nor a tokenizer's file says it.",
)


class FlagsCommand(click.Command):
    """A command that takes Megatron-LM's flags as they are, before, between and after its own options.

    Behind a `--` nothing is its own. A misspelt option of its own is an error, and not taken for a flag of Megatron's.
    Where there is no `--`, --vocab-size is Megatron's.
    """

    ignore_unknown_options = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Returns what is left over, as any command does."""
        from mup_megatron.megatron.arguments.effects import row_of  # only for commands that read flags

        own = [name for param in self.get_params(ctx) for name in param.opts if name.startswith("-")]
        for word in args[: args.index("--")] if "--" in args else args:
            name = word.partition("=")[0]
            # 0.75: what --forse and --out reach, and no flag of Megatron's. Nor has Megatron a short one.
            close = difflib.get_close_matches(name, own, cutoff=0.75) if name.startswith("--") else []
            short = len(word) > 1 and word[0] == "-" and word[1].isalpha() and word[:2] not in own
            if (close and name not in own and row_of(name) is None) or short:
                raise click.NoSuchOption(name, possibilities=close, ctx=ctx)
        divided = "--" in args
        rest = super().parse_args(ctx, args)
        size = ctx.params.get("vocab_size")
        if size is not None and not divided:
            ctx.params["flags"] = (*ctx.params["flags"], "--vocab-size", str(size))
            ctx.params["vocab_size"] = None
        return rest


def answer_console() -> Console:
    """Returns a console for answers. Never narrowed: to fit the terminal, a table would lose digits and columns."""
    return Console(width=1000)


class FiniteFloat(click.FloatRange):
    """A number in a range; NaN, which no range excludes, and infinity are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the number that was given as text."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


def load_planned(target: Path, recipe_path: Path) -> tuple[ModelFile, Recipe, Plan]:
    """Loads target, recipe, and the plan that follows from the two.

    Raises:
        InputError: one of the files is not right, or they do not fit each other; names the files.
    """
    model, recipe = load_model_file(target), load_recipe(recipe_path)
    try:
        return model, recipe, recipe.plan(model)
    except InputError as error:
        raise InputError(f"{recipe_path} for {target}: {error}") from None


def load_plan(target: Path, recipe_path: Path) -> tuple[Recipe, Plan]:
    """Loads the recipe, and the plan that follows from it for a target of any kind.

    Raises:
        InputError: as `load_planned`.
    """
    recipe = load_recipe(recipe_path)
    try:
        return recipe, plan_for_file(target, recipe)
    except InputError as error:
        if str(error).startswith(str(target)):  # what is wrong with the file itself
            raise
        raise InputError(f"{recipe_path} for {target}: {error}") from None


def require_new(path: Path, *, force: bool) -> None:
    """Raises InputError if `path` exists and may not be replaced."""
    try:
        exists = path.exists()
    except OSError as error:
        raise InputError(f"{path}: not a usable name ({error.strerror}). Choose another.") from None
    if exists and not force:
        raise InputError(f"{path}: exists already. Give --force to replace it, or another name.")


def answer(text: str, output: Path | None, *, force: bool) -> None:
    """Writes an answer to a file, whose name is then the answer; on standard output if there is none.

    Raises:
        InputError: the file exists and may not be replaced, or cannot be written.
    """
    if output is None:
        click.echo(text, nl=False)
    else:
        require_new(output, force=force)
        write_atomically(output, text)
        click.echo(output)
