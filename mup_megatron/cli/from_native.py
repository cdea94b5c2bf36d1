"""`from-native`: a launch line with Megatron-Core's own μP as a recipe, and where the numbers differ."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from mup_megatron.cli.options import FILE, FlagsCommand, answer, answer_console, force_option, vocab_size_option
from mup_megatron.megatron.arguments.line import read_line
from mup_megatron.megatron.arguments.native import NativeRecipe, recipe_from_native


@click.command(cls=FlagsCommand)
@click.option("-o", "--output", type=FILE, metavar="R",
              help="Where to write the recipe. Without it, the recipe is on standard output and the table on standard "
              "error.")  # fmt: skip
@vocab_size_option
@force_option
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="FLAGS… | SCRIPT.sh [FLAGS…]")
def command(output: Path | None, vocab_size: int | None, force: bool, flags: tuple[str, ...]) -> None:
    """The recipe of a launch line that has --use-mup, and a table of what differs on the line's own model.

    A launch script is read and not run. Flags after a script count as if they stood at the end of its line. Behind a
    `--`, no word is an option of this command.
    """
    if not flags:
        raise click.UsageError("give Megatron's flags, or a launch script: mup-megatron from-native FLAGS…")
    line = read_line(flags, vocab_size=vocab_size, native=True)
    native = recipe_from_native(line.values, vocab_size=line.vocab_size, source=line.source, script=line.script)
    for remark in line.remarks:
        click.echo(f"Warning: {remark}", err=True)
    answer(native.recipe.to_yaml(), output, force=force)
    _print(native, Console(width=1000, stderr=True) if output is None else answer_console())


def _print(native: NativeRecipe, console: Console) -> None:
    if native.differences:
        _print_differences(native, console)
    else:
        console.print("On this model every number is native's.", highlight=False)
    for note in native.notes:
        console.print(f"Note: {note}", highlight=False, markup=False)


def _print_differences(native: NativeRecipe, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("quantity", "role", "native", "recipe", "where"):
        table.add_column(title, justify="right" if title in ("native", "recipe") else "left", no_wrap=True)
    for difference in native.differences:
        for where in difference.where:
            numbers = (f"{difference.native:g}", f"{difference.recipe:g}")
            table.add_row(difference.quantity, difference.role, *numbers, where)
    console.print(table)
    for quantity, why in dict.fromkeys((difference.quantity, difference.why) for difference in native.differences):
        console.print(f"{quantity}: {why}", highlight=False, markup=False)
