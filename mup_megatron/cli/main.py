"""`mup-megatron`: finds the command, and turns what users did wrong into one sentence and an exit code.

Exit codes: 0 done, 1 the answer is no, 2 bad input; 130 Ctrl-C, 143 SIGTERM. Commands are thin modules beside this one,
imported when called.
"""

import errno
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

import click

from mup_megatron import __version__
from mup_megatron.errors import InputError, Terminated
from mup_megatron.messages import BAD_INPUT, is_first
from mup_megatron.validation import shortened

COMMANDS = {
    "quickstart": "the whole path in small: tune, transfer, compare; ends in a table and a picture",
    "explain": "what every parameter of a target gets, and why",
    "recipe": "write a recipe by hand, or show every default",
    "proxy": "a small model on which to tune for a target, and what that costs",
    "data": "text to Megatron's indexed format",
    "sweep": "search hyperparameters on a proxy",
    "transfer": "the best trial of a study as a recipe",
    "check": "a verdict on a target and its recipe before the run is paid for",
    "train": "train a target on Megatron-Core with a recipe",
    "export": "a trained model as one of transformers, which stock software computes rightly",
    "fold": "a checkpoint in its own format that stock software computes rightly",
    "unfold": "what `fold` made, for going on with training",
    "args": "a model file and a recipe as Megatron-LM's flags",
    "model": "Megatron-LM's flags, or a launch script, as a model file",
    "ds-config": "a DeepSpeed configuration for a recipe, or whether one goes with it",
    "from-native": "a launch line with Megatron's own μP as a recipe, and where its numbers differ",
}

LONGEST = 500
"""Characters of a message of click's; the lists of choices in some are long."""


class _CommandGroup(click.Group):
    """Imports a command's module only when it is needed: `explain` must not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mup_megatron.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="--debug, anywhere on the line, shows the traceback of an error.",
)
@click.version_option(__version__, prog_name="mup-megatron")
def group() -> None:
    """Tune a small model, train a large one with the same hyperparameters (μP), on Megatron-Core or DeepSpeed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    Under torchrun every rank exits with the same code and rank 0 alone says why.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in own
    if debug:
        words.remove("--debug")
    try:
        code = group.main(args=words or ["--help"], prog_name="mup-megatron", standalone_mode=False)
        sys.stdout.flush()
    except InputError as error:
        code = _complain(str(error), BAD_INPUT, debug=debug)
    except click.ClickException as error:
        usage = f"\n{error.ctx.get_usage()}" if isinstance(error, click.UsageError) and error.ctx else ""
        # Click repeats what it was given, however long.
        code = _complain(shortened(error.format_message(), LONGEST) + usage, BAD_INPUT, debug=debug)
    except BrokenPipeError:
        # The reader has seen enough, as in `… | head`. Python would complain once more while closing standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        # What commands read and write themselves has a message of its own; what is left has at least a name.
        code = _complain(_refused_by_system(error), BAD_INPUT, debug=debug)
    except (click.Abort, KeyboardInterrupt) as error:  # click makes the first of the second
        if isinstance(error.__cause__ or error, Terminated):
            code = _complain("terminated", 128 + signal.SIGTERM, debug=debug)
        else:
            code = _complain("interrupted", 130, debug=debug)
    sys.exit(code if isinstance(code, int) else 0)


def _refused_by_system(error: OSError) -> str:
    """Returns what could not be opened, read or written: a file that the error names, or else the answer."""
    why = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the answer" if error.filename is None else str(error.filename)
        return f"{what} cannot be written ({why}). Free some space."
    if error.filename is not None:
        return f"{error.filename} cannot be opened or written ({why}). Correct its path, or who may use it."
    return f"the system refuses what the command needs ({why}). Where it was is shown with --debug."


def _complain(message: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if is_first():
        click.echo(f"mup-megatron: {message}", err=True)
    else:
        # torchrun ends all ranks as soon as one has left: the first one has to have spoken by then.
        time.sleep(1)
    return code
