"""`model`: the model file that Megatron-LM's flags, or a launch script, describe."""

from pathlib import Path

import click

from mup_megatron.architectures.registry import load_custom_tensors
from mup_megatron.cli.options import FILE, FlagsCommand, answer, force_option, vocab_size_option
from mup_megatron.megatron.arguments.line import read_line
from mup_megatron.yaml_io import dump_yaml


@click.command(cls=FlagsCommand)
@click.option("--from-args", is_flag=True, help="Read Megatron-LM's flags. Required: there is no other source yet.")
@click.option("-o", "--output", type=FILE, metavar="TARGET.yaml", help="Where to write; standard output by default.")
@click.option("--custom-tensors", type=FILE, metavar="FILE.yaml",
              help="A file with custom_tensors: those of your own layers, for a line with --spec.")  # fmt: skip
@vocab_size_option
@force_option
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="FLAGS… | SCRIPT.sh [FLAGS…]")
def command(
    from_args: bool,
    output: Path | None,
    custom_tensors: Path | None,
    vocab_size: int | None,
    force: bool,
    flags: tuple[str, ...],
) -> None:
    """The model file of Megatron-LM's flags, or of the flags in a launch script, which is read and not run.

    Flags after a script count as if they stood at the end of its line. Behind a `--`, no word is an option of this
    command. What becomes of each flag is in docs/flags.md. A line that reads its model elsewhere (--yaml-cfg,
    --use-checkpoint-args) is for Megatron to read: python -m mup_megatron.launch SCRIPT … --mup-write-model-file PATH.
    """
    if not from_args or not flags:
        raise click.UsageError("give Megatron's flags, or a launch script: mup-megatron model --from-args FLAGS…")
    line = read_line(flags, vocab_size=vocab_size)
    model = line.model(() if custom_tensors is None else load_custom_tensors(custom_tensors))
    for remark in line.remarks:
        click.echo(f"Warning: {remark}", err=True)
    content = dump_yaml(model.model_dump(mode="json", exclude_defaults=True))
    answer(content, output, force=force)
