"""Engines whose configuration has no `"mup"` entry: refused where they would undo what a recipe has made."""

from collections.abc import Mapping
from typing import Any

from mup_megatron.checkpoint_recipe import SIDECAR
from mup_megatron.deepspeed import checkpoints
from mup_megatron.deepspeed.entry import KEY
from mup_megatron.deepspeed.planning import plan_applied_to
from mup_megatron.deepspeed.remarks import say
from mup_megatron.errors import InputError
from mup_megatron.modules.marker import marked


def require_no_training(arguments: Mapping[str, Any]) -> None:
    """Raises InputError if an engine without an entry and without a plan is to train: it has an optimizer."""
    content = arguments["config_class"]._param_dict
    if arguments.get("optimizer") is not None or content.get("optimizer"):
        raise InputError(
            f'"{KEY}": missing in the configuration, so this engine would train without μP. Write '
            f'"{KEY}": {{"recipe": "…"}}, or start the script without mup_megatron.launch.'
        )


def require_not_forgotten(arguments: Mapping[str, Any]) -> None:
    """Raises InputError if an engine without an entry is to train a model that was trained with a recipe before."""
    model, content = arguments["model"], getattr(arguments.get("config_class"), "_param_dict", {})
    if plan_applied_to(model) is not None or not (arguments.get("optimizer") is not None or content.get("optimizer")):
        return
    if (mark := marked(model)) is not None:
        raise InputError(
            f"the model was trained with the recipe {mark.fingerprint[:12]}, and this engine would train it without a "
            f'plan. Write "{KEY}": {{"recipe": "…", "initialize": "keep"}} into the configuration.'
        )


def require_same_plan(engine: Any, load_dir: str, tag: str | None) -> None:
    """Raises InputError if a checkpoint of a recipe is about to be loaded by an engine without its plan.

    Not collective, and what cannot be read is DeepSpeed's to load or to refuse. Then it is told that nobody looked.
    """
    plan = plan_applied_to(engine)
    if engine.optimizer is None and plan is None:
        return
    try:
        found = checkpoints.recipe_of_checkpoint(load_dir, tag, universal=engine.load_universal_checkpoint())
    except (InputError, OSError) as error:
        say(f"warning: {error} Whether the checkpoint was trained with a recipe is not known.")
        return
    if found is None:
        return
    if plan is None:
        if found.recipe is not None:
            raise InputError(
                f"{found.folder}: the checkpoint was trained with a recipe, and without it every parameter would go on "
                f'with another learning rate and scale. Write "{KEY}": '
                f'{{"recipe": "{found.folder / SIDECAR}"}} into the configuration.'
            )
    elif found.recipe is not None and found.recipe.fingerprint != plan.fingerprint:
        raise InputError(
            f"{found.folder}: it was trained with another recipe (fingerprint {found.recipe.fingerprint[:12]}) than "
            f"the one whose plan was applied to the model ({plan.fingerprint[:12]}), and would be another function "
            "under its multipliers. Apply the plan of that recipe."
        )
