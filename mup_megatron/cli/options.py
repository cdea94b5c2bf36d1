"""Options and printing that several commands share."""

import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mup_megatron.errors import InputError

FILE = click.Path(path_type=Path)

target_argument = click.argument("target", type=FILE, metavar="TARGET.yaml")
recipe_option = click.option("--recipe", "recipe_path", type=FILE, required=True, metavar="R", help="The recipe file.")
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")


def answer_console() -> Console:
    """For answers on standard output. Never narrowed: to fit the terminal, a table would lose digits and columns."""
    return Console(width=1000)


class FiniteFloat(click.FloatRange):
    """A number in a range; NaN, which no range excludes, and infinity are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number that was given as text."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


def require_new(path: Path, *, force: bool) -> None:
    """Raises InputError if `path` exists and may not be replaced."""
    if path.exists() and not force:
        raise InputError(f"{path}: exists already. Give --force to replace it, or another name.")
