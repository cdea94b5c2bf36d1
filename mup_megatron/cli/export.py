"""`export`: a trained model as one of transformers, which stock software computes rightly."""

from pathlib import Path
from typing import Any

import click

from mup_megatron.cli.options import FILE, recipe_option, target_option
from mup_megatron.recipe import load_recipe
from mup_megatron.validation import listed

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
DTYPES = ("float32", "bfloat16", "float16")


class Size(click.ParamType[int]):
    """A number of bytes, as 5GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the number of bytes."""
        if isinstance(value, int):
            return value
        number, unit = str(value)[:-2], str(value)[-2:].upper()
        if unit not in _UNITS or not number.isdecimal() or not 0 < int(number) <= 10**6:
            self.fail(f"{value!r} is no size. Write a whole number and KB, MB or GB, as 5GB.", param, ctx)
        return int(number) * _UNITS[unit]


@click.command()
@click.argument("checkpoint", type=FILE, metavar="CHECKPOINT")
@recipe_option
@click.option("--to", type=FILE, required=True, metavar="DIR", help="The folder to make.")
@target_option
@click.option("--format", "form", type=click.Choice(["hf"]), default="hf", help="Of transformers, which is all so far.")
@click.option("--architecture", metavar="A", help="Of transformers. [default: what leaves most weights as they are]")
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Of a file of weights.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights. [default: as they were trained]")
@click.option("--tokenizer", "tokenizer_path", type=FILE, metavar="DIR", help="A tokenizer that goes with the model.")
def command(
    checkpoint: Path,
    recipe_path: Path,
    to: Path,
    target: Path | None,
    form: str,
    architecture: str | None,
    max_shard_size: int,
    dtype: str | None,
    tokenizer_path: Path | None,
) -> None:
    """Make a model of transformers of a CHECKPOINT, the folder of a run's checkpoints or one of them.

    Multipliers go into the configuration where the architecture has them (Granite), and else into the weights, exactly.
    What no architecture can do exactly is refused.
    """
    from mup_megatron.export.opened import open_model

    recipe = load_recipe(recipe_path)
    # This prepares what the next ones import, where the model is Megatron's.
    model = open_model(checkpoint, recipe, recipe_source=str(recipe_path), target=target)
    from mup_megatron.export.export import DTYPES as TYPES
    from mup_megatron.export.export import export
    from mup_megatron.export.tokenizers import read_tokenizer

    done = export(
        model,
        to,
        architecture=architecture,
        largest=max_shard_size,
        dtype=None if dtype is None else TYPES[dtype],
        tokenizer=None if tokenizer_path is None else read_tokenizer(tokenizer_path),
    )
    said = ", ".join(f"{key} {value:.6g}" for key, value in done.carried.items())
    ways = [
        *([f"{said} in its configuration"] if said else []),
        *([f"multipliers folded into {len(done.folded)} tensors ({listed(done.folded, 3)})"] if done.folded else []),
        *(f"without its {each}" for each in done.left_out),
    ]
    click.echo(
        f"{done.to}: {done.architecture}, {done.parameters:,} parameters, {done.size / 1e9:.3g} GB in "
        f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}; {'; '.join(ways) or 'weights as they are'}"
    )
