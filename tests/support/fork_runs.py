"""The fork's way from a command line to a model, as far as its patch takes part, on the models of `fork_models`."""

import argparse
from pathlib import Path
from typing import Any

from support import fork_models
from torch import nn

from mup_megatron import megatron_deepspeed
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import Recipe, save_recipe

RUN = ("--train-iters", "100")


def parsed(model: ModelFile, *words: str) -> argparse.Namespace:
    """The fork's arguments of a model, with the patch in its parser, validated."""
    parser = megatron_deepspeed.add_arguments(fork_models.parser())
    return fork_models.validated(parser.parse_args([*fork_models.flags(model), *RUN, *words]), model)


def built(
    kind: Any, model: ModelFile, recipe: Recipe, folder: Path, *words: str, layout: Any = None, **stages: int
) -> tuple[nn.Module, argparse.Namespace]:
    """A model of one of the two kinds, drawn with the recipe's std and with the plan applied, and its arguments."""
    path = folder / "R.recipe.yaml"
    save_recipe(recipe, path)
    args = parsed(model, "--mup-recipe", str(path), *words)
    made = kind(model, layout, std=args.init_method_std, **stages)
    megatron_deepspeed.apply_to_model([made], args)
    return made, args
