"""Launch lines that leave to a recipe what a recipe says, and such recipes."""

from pathlib import Path
from typing import Any

from support.lm_runs import CPU_FLAGS, MOCK_DATA, gpt

from mup_megatron.recipe import Recipe, recipe, save_recipe

WIDTH, BASE_WIDTH = 128, 32
FROM_RECIPE = {"lr": None, "min_lr": None, "lr_decay_style": None}


def line(**changes: Any) -> list[str]:
    """A line for a recipe: a GPT of `WIDTH`, two layers and two iterations, unless said otherwise."""
    return [
        *gpt(**{"num_layers": 2, "hidden_size": WIDTH, "train_iters": 2, **FROM_RECIPE, **changes}),
        *MOCK_DATA,
        *CPU_FLAGS,
    ]


def a_recipe(
    *,
    width: int = BASE_WIDTH,
    schedule: dict[str, Any] | None = None,
    parametrization: dict[str, Any] | None = None,
    **hyperparameters: Any,
) -> Recipe:
    """A recipe for the model of `line`, whose multipliers all act."""
    return recipe(
        {
            "base": {
                "num_layers": 2,
                "hidden_size": width,
                "num_attention_heads": 4,
                "vocab_size": 512,
                "seq_length": 32,
                "transformer_impl": "local",
            },
            "hyperparameters": {
                "lr": 1e-3,
                "init_method_std": 0.05,
                "weight_decay": 0.1,
                "output_multiplier": 2.0,
                "embedding_multiplier": 3.0,
                **hyperparameters,
            },
            "schedule": schedule or {"lr_decay_style": "constant"},
            "parametrization": parametrization or {},
        },
        source="test",
    )


def recipe_file(folder: Path, name: str = "a", **more: Any) -> Path:
    """`a_recipe` in a file."""
    path = folder / f"{name}.recipe.yaml"
    save_recipe(a_recipe(**more), path)
    return path
