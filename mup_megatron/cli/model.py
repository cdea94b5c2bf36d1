"""`model`: the model file that Megatron-LM's flags, or a launch script, describe."""

from pathlib import Path

import click

from mup_megatron.cli.options import FILE, FlagsCommand, force_option, require_new
from mup_megatron.files import write_atomically
from mup_megatron.megatron.arguments import model_from_flags, not_in_model_file, values_from_flags, words_of_launch
from mup_megatron.yaml_io import dump_yaml


@click.command(cls=FlagsCommand)
@click.option("--from-args", is_flag=True, help="Read Megatron-LM's flags. Required: there is no other source yet.")
@click.option("-o", "--output", type=FILE, metavar="TARGET.yaml", help="Where to write; standard output by default.")
@force_option
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="FLAGS… | SCRIPT.sh [FLAGS…]")
def command(from_args: bool, output: Path | None, force: bool, flags: tuple[str, ...]) -> None:
    """The model file of Megatron-LM's flags, or of the flags in a launch script, which is read and not run.

    Flags after a script count as if they stood at the end of its line. Behind a `--`, no word is an option of this
    command.
    """
    if not from_args or not flags:
        raise click.UsageError("give Megatron's flags, or a launch script: mup-megatron model --from-args FLAGS…")
    words, source = words_of_launch(flags)
    model = model_from_flags(words, source=source)
    for name in not_in_model_file(values_from_flags(words, source=source)):
        click.echo(f"Warning: {name}: a model file has no key for it. Give it to the proxy's runs as well.", err=True)
    content = dump_yaml(model.model_dump(mode="json", exclude_defaults=True))
    if output is None:
        click.echo(content, nl=False)
    else:
        require_new(output, force=force)
        write_atomically(output, content)
        click.echo(output)
