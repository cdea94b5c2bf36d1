"""A target's file, whatever kind of model it describes → its plan: a model file, or a Hugging Face configuration.

Transformers is imported only for a configuration of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mup_megatron.architectures.registry import model_file, remarks_on
from mup_megatron.errors import InputError
from mup_megatron.json_io import read_json
from mup_megatron.recipe import HuggingFaceBase, ModuleBase, Recipe
from mup_megatron.theory import Plan
from mup_megatron.validation import quoted
from mup_megatron.yaml_io import read_yaml

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FILE = "config.json"


def plan_for_file(path: Path, recipe: Recipe) -> Plan:
    """Returns what every parameter of the model that a file describes gets.

    Args:
        path: a model file; or a Hugging Face configuration: its `config.json`, the folder of that, or YAML with a
            `model_type`.
        recipe: its base says which of the two it has to be.

    Raises:
        InputError: the file is not right, or it does not fit the recipe.
    """
    content = read_target(path)
    if is_hugging_face(content):
        from mup_megatron.huggingface.plan import plan_for

        return plan_for(hugging_face_config(content, source=str(path)), recipe)
    if isinstance(recipe.base, HuggingFaceBase):
        raise InputError(
            f"{path}: no model_type, and the recipe's base is a Hugging Face {recipe.base.model_type}. Give the "
            "target's configuration."
        )
    if isinstance(recipe.base, ModuleBase):
        raise InputError(
            f"{path}: the recipe is for a torch module, which no file describes. Use "
            f"mup_megatron.modules.plan_for_module."
        )
    return recipe.plan(model_file(content, source=str(path)))


def remarks_for_file(path: Path, recipe: Recipe) -> Sequence[str]:
    """Returns what to know of a plan that `plan_for_file` gives, in sentences."""
    content = read_target(path)
    if is_hugging_face(content):
        return ()
    return remarks_on(recipe.megatron_base, model_file(content, source=str(path)))


def read_target(path: Path) -> object:
    """Reads the content of a target's file, or of the configuration in a folder.

    Raises:
        InputError: it cannot be read.
    """
    inside = path / CONFIG_FILE
    file = inside if inside.is_file() else path
    return read_json(file) if file.suffix == ".json" else read_yaml(file)


def is_hugging_face(content: object) -> bool:
    """Says if a file's content is a Hugging Face configuration."""
    return isinstance(content, Mapping) and "model_type" in content


def hugging_face_config(content: Any, *, source: str) -> "PretrainedConfig":
    """Returns a configuration as transformers reads it, which passes over keys that it does not know.

    Raises:
        InputError: the installed transformers has no such model type, or the sizes are impossible.
    """
    from mup_megatron.huggingface.configs import config_from

    own = {key: value for key, value in content.items() if key not in {"model_type", "architectures"}}
    classes = content.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{source}: architectures is {quoted(classes)}, not a list of names. Write [GPT2LMHeadModel].")
    if not isinstance(content["model_type"], str):
        raise InputError(
            f"{source}: model_type is {quoted(content['model_type'])}, not a name. Write for example gpt2."
        )
    return config_from(content["model_type"], own, architectures=tuple(classes), source=source, strict=False)
