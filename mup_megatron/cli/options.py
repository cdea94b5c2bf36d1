"""Options and printing that several commands share."""

import sys
from pathlib import Path

import click
from rich.console import Console

from mup_megatron.errors import InputError

FILE = click.Path(path_type=Path)

target_argument = click.argument("target", type=FILE, metavar="TARGET.yaml")
recipe_option = click.option("--recipe", "recipe_path", type=FILE, required=True, metavar="R", help="The recipe file.")
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")


def answer_console() -> Console:
    """For answers on standard output: as wide as the terminal, unwrapped into a file or pipe."""
    return Console() if sys.stdout.isatty() else Console(width=1000, color_system=None)


def require_new(path: Path, *, force: bool) -> None:
    """Raises InputError if `path` exists and may not be replaced."""
    if path.exists() and not force:
        raise InputError(f"{path}: exists already. Give --force to replace it, or another name.")
