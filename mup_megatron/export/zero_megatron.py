"""Checkpoints of DeepSpeed's engine with a Megatron-Core model, as a GPTModel or as DeepSpeed's pipeline.

Nothing of Megatron's is imported: names and shapes are the plan's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file
from mup_megatron.deepspeed.stage_names import layer_files, plan_name
from mup_megatron.errors import InputError
from mup_megatron.export import zero_stages
from mup_megatron.export.tags import chosen
from mup_megatron.export.weights import Source
from mup_megatron.export.zero_states import Tensors, require_recipe, tensors_of_engine
from mup_megatron.modules.groups import PADDING
from mup_megatron.recipe import Recipe
from mup_megatron.targets import is_hugging_face, read_target
from mup_megatron.theory import Plan
from mup_megatron.validation import brief

_BESIDE = "_extra_state"
"""How Transformer Engine calls what it keeps beside parameters."""


def open_zero_megatron(path: Path, recipe: Recipe, *, recipe_source: str, target: Path | None) -> Source:
    """Returns the trained model of a checkpoint; under ZeRO its weights are put together in memory.

    Args:
        path: the folder of a run's checkpoints, whose last one is meant; or that of one checkpoint.
        recipe: the run's; its base is a model file.
        recipe_source: what the recipe is called in messages.
        target: the model file; such a checkpoint does not say it.

    Raises:
        InputError: it is damaged, of another recipe or model, of parallel models, or may run code; names the file.
    """
    folder = chosen(path)
    computes = require_recipe(folder, recipe, recipe_source).computes
    if target is None:
        raise InputError(f"{folder}: does not say what the model is. Give its model file with --target.")
    model = _model(target)
    _require_same(computes, model, target, folder)
    plan = recipe.plan(model)
    if zero_stages.is_at(folder):
        tensors = zero_stages.tensors_of_stages(folder, layer_files(plan.num_layers, tied=plan.tied))
    else:
        tensors = tensors_of_engine(folder)
    held = _by_plan(tensors, plan)
    unknown = next((name for name in held if name not in plan.by_name), None)
    if unknown is not None:
        raise InputError(
            f"{folder}: has {brief(unknown, 80)}, which a model of {target} has not. Give the model file of the run."
        )
    return Source(
        model=model,
        plan=plan,
        weights=Tensors(held),
        described=str(folder),
        folder=folder,
        tanh_gelu=computes.get("tanh_gelu") is True,
    )


def _model(target: Path) -> ModelFile:
    content: Any = read_target(target)
    if is_hugging_face(content):
        raise InputError(
            f"{target}: a configuration of transformers, and the recipe's base is a model file. Give the model file of "
            "the run."
        )
    return model_file(content, source=str(target))


def _require_same(computes: Mapping[str, Any], model: ModelFile, target: Path, folder: Path) -> None:
    """Raises InputError where a model file says what another model computes, whose weights may have the same shapes."""
    said = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_size,
        "norm_epsilon": model.norm_epsilon,
    }
    for key, value in said.items():
        if computes.get(key, value) != value:
            raise InputError(
                f"{target}: {key} is {value}, and {folder} was trained with {brief(computes[key], 20)}. Give the model "
                "file of the run."
            )


def _by_plan(tensors: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
    """Returns the parameters by the plan's names, without what only pads groups or is kept beside parameters."""
    return {
        plan_name(name, tied=plan.tied): tensor
        for name, tensor in tensors.items()
        if hasattr(tensor, "shape") and not name.rpartition(".")[2].startswith((PADDING, _BESIDE))
    }
