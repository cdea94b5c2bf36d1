"""The trained model of a checkpoint, whoever saved it. A recipe says whose names its run had."""

from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.export import tags
from mup_megatron.export.weights import TrainedModel
from mup_megatron.recipe import HuggingFaceBase, ModuleBase, Recipe


def open_model(path: Path, recipe: Recipe, *, recipe_source: str, target: Path | None = None) -> TrainedModel:
    """Returns the trained model of a checkpoint; its weights are not read yet.

    Args:
        path: the folder of a run's checkpoints, whose last one is meant; or that of one checkpoint.
        recipe: the run's.
        recipe_source: what the recipe is called in messages.
        target: the configuration of the model, for checkpoints that do not say it: DeepSpeed's.

    Raises:
        InputError: there is none, it is damaged, or of another recipe; names the file.
    """
    if isinstance(recipe.base, ModuleBase):
        raise InputError(
            f"{recipe_source}: of a torch module of your own, which is no architecture of transformers. Use it with "
            'its plan: apply_plan(…, initialize="keep").'
        )
    if isinstance(recipe.base, HuggingFaceBase):
        return _of_transformers(path, recipe, recipe_source, target)
    if tags.is_at(path):
        from mup_megatron.export.zero_megatron import open_zero_megatron

        return open_zero_megatron(path, recipe, recipe_source=recipe_source, target=target)
    if target is not None:
        raise InputError(f"{target}: {path} says itself what the model is. Leave the target out.")
    from mup_megatron.training import ranks

    ranks.enable_cpu()
    # This imports Megatron, which has to come after the CPU runtime.
    from mup_megatron.export.kinds import open_source

    return open_source(path, recipe, recipe_source=recipe_source)


def _of_transformers(path: Path, recipe: Recipe, recipe_source: str, target: Path | None) -> TrainedModel:
    from mup_megatron.export import saved, zero

    if not path.is_dir():
        raise InputError(f"{path}: no such folder. Give that of a saved model, or of a run's checkpoints.")
    if saved.is_at(path):
        if target is not None:
            raise InputError(f"{target}: {path} says itself what the model is. Leave the target out.")
        return saved.open_saved(path, recipe, recipe_source=recipe_source)
    if tags.is_at(path):
        return zero.open_zero(path, recipe, recipe_source=recipe_source, target=target)
    if (pickled := path / "pytorch_model.bin").exists():
        raise InputError(f"{pickled}: a pickle, which is not read. Save the model again with save_pretrained.")
    raise InputError(
        f"{path}: no model there that save_pretrained or the Trainer saved (config.json and model.safetensors), and no "
        "checkpoint of DeepSpeed's."
    )
