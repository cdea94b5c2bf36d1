"""Models of `exported.py` that Megatron-LM's own loop has trained for two iterations, saved in every format."""

from pathlib import Path
from typing import Any

from support.exported import KINDS, models, recipe_of
from support.lm_recipes import FROM_RECIPE
from support.lm_runs import CPU_FLAGS, MOCK_DATA, SCRIPT, Finished, gpt, run_script

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.megatron.arguments.convert import flags
from mup_megatron.recipe import Recipe, save_recipe

VOCABULARY = 511
"""Of the tokens themselves; the end of a document makes one more. Padded to 768 on one tensor-parallel rank or two."""
_SIZES = dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings"))


def kind(name: str, **more: Any) -> tuple[Recipe, ModelFile]:
    """A recipe and a target of four layers, of a vocabulary that is padded."""
    own = {"vocab_size": VOCABULARY + 1, "make_vocab_size_divisible_by": 384, **more}
    base, model = (each.model_copy(update=own) for each in models(KINDS[name]))
    return recipe_of(base), model.model_copy(update={"num_layers": 4})


def train(
    folder: Path, name: str, model: ModelFile, *, ranks: int = 1, recipe: Recipe | None = None, **changes: Any
) -> Finished:
    """Runs two iterations of Megatron-LM's loop, with the plug-in if there is a recipe."""
    words = gpt(**{**_SIZES, "train_iters": 2, "seed": 7, **(FROM_RECIPE if recipe else {}), **changes})
    words += [*flags(model), *MOCK_DATA, *CPU_FLAGS]
    if recipe is not None:
        save_recipe(recipe, folder / "recipe.yaml")
        words += ["--mup-recipe", str(folder / "recipe.yaml")]
    run = run_script(SCRIPT, words, ranks, folder=folder / "runs" / name, launcher=recipe is not None)
    return run.require_success()
