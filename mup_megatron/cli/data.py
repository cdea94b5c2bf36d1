"""`mup-megatron data`: text → Megatron's `.bin/.idx`."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from mup_megatron.errors import InputError
from mup_megatron.training.data import CACHE, ProgressFn
from mup_megatron.training.data.tokenizer import DEFAULT_TOKENIZER


@click.command("data")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", "prefix", metavar="PREFIX", type=click.Path(path_type=Path), help="Folder and name.")
@click.option(
    "--tokenizer",
    metavar="T",
    default=DEFAULT_TOKENIZER,
    show_default=True,
    help="`byte`, `bpe:VOCAB` (trained on the text itself) or a tokenizer.json. Nothing is downloaded.",
)
@click.option("--eod-token", metavar="TOKEN", help="What ends a document, where a tokenizer.json has an unusual one.")
@click.option("--force", is_flag=True, help="Replace data that are there.")
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True, help="For the corpus.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(
    files: tuple[Path, ...],
    prefix: Path | None,
    tokenizer: str,
    eod_token: str | None,
    force: bool,
    cache: Path,
    form: str,
) -> None:
    """Text files into data in Megatron's indexed format.

    A file is one document; in a .jsonl file every line is one, under the key "text". Without FILES, the embedded
    corpus: the source of the Python standard library on this machine. It needs no PREFIX, since it lies in the cache.
    """
    from mup_megatron.training.data.documents import documents, scan
    from mup_megatron.training.data.embedded import embedded_data
    from mup_megatron.training.data.prefix import copy_data, refuse_existing
    from mup_megatron.training.data.reading import read_meta
    from mup_megatron.training.data.tokenizer import make_tokenizer, parse_tokenizer
    from mup_megatron.training.data.writing import write_data

    if prefix is not None:
        refuse_existing(prefix, force=force)
    with _progress() as progress:
        if not files:
            embedded = embedded_data(cache, tokenizer=tokenizer, eod_token=eod_token, progress=progress)
            if prefix is None:
                prefix = embedded
            else:
                copy_data(embedded, prefix, force=force)
        else:
            if prefix is None:
                raise InputError("-o PREFIX is missing. Say where the data go, for example -o results/data/text.")
            spec = parse_tokenizer(tokenizer)
            sources = scan(files, progress=progress)
            progress("preparing the tokenizer", 0, 1)
            made = make_tokenizer(spec, lambda: documents(sources), eod_token=eod_token)
            progress("preparing the tokenizer", 1, 1)
            write_data(
                prefix, documents(sources), made, sources=sources, spec=tokenizer, force=force, progress=progress
            )
    meta = read_meta(prefix)
    if form == "json":
        click.echo(json.dumps({"prefix": str(prefix), **meta.model_dump(exclude={"inputs"})}))
    else:
        click.echo(prefix)
        click.echo(f"{meta.documents} documents, {meta.tokens} tokens, vocabulary {meta.vocab_size} ({meta.tokenizer})")


@contextmanager
def _progress() -> Iterator[ProgressFn]:
    """A bar on a terminal, a line per tenth of a stage elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int, /) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _plain_lines() -> ProgressFn:
    said: dict[str, int] = {}

    def say(stage: str, done: int, total: int, /) -> None:
        tenth = 10 * done // total
        if said.get(stage) != tenth:
            said[stage] = tenth
            click.echo(f"{stage}: {done} of {total}", err=True)

    return say
