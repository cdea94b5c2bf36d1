"""Checkpoints of DeepSpeed's engine with a Hugging Face model: ZeRO 0 to 3, of any number of ranks, and universal."""

from pathlib import Path
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.export.hugging_face import HuggingFaceModel, hugging_face_model
from mup_megatron.export.tags import chosen
from mup_megatron.export.zero_states import Tensors, require_recipe, tensors_of_engine
from mup_megatron.recipe import Recipe
from mup_megatron.targets import CONFIG_FILE, is_hugging_face, read_target


def open_zero(path: Path, recipe: Recipe, *, recipe_source: str, target: Path | None) -> HuggingFaceModel:
    """Returns the trained model of a checkpoint; under ZeRO its weights are put together in memory.

    Args:
        path: the folder of a run's checkpoints, whose last one is meant; or that of one checkpoint.
        recipe: the run's.
        recipe_source: what the recipe is called in messages.
        target: the model's configuration; None for the `config.json` beside the checkpoint, as the Trainer has it.

    Raises:
        InputError: it is damaged, of another recipe, of a pipeline or of parallel models, or may run code; names the
            file.
    """
    folder = chosen(path)
    require_recipe(folder, recipe, recipe_source)
    config = _config(folder, target)
    content: Any = read_target(config)
    if not is_hugging_face(content):
        raise InputError(f"{config}: no configuration of transformers (model_type is missing). Give the model's.")
    return hugging_face_model(
        content,
        recipe,
        Tensors(tensors_of_engine(folder)),
        live_names=True,
        source=str(config),
        described=str(folder),
        folder=folder,
    )


def _config(folder: Path, target: Path | None) -> Path:
    if target is not None:
        return target
    beside = [each / CONFIG_FILE for each in (folder, folder.parent)]
    found = next((each for each in beside if each.is_file()), None)
    if found is None:
        raise InputError(f"{folder}: does not say what the model is. Give its configuration with --target.")
    return found
