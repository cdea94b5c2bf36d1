"""The architectures that are known, and which of them a model file is of.

An architecture is one file and one line here: see `gpt.py` and `architecture.py` for what it has to say.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import SerializeAsAny, WrapValidator

from mup_megatron.architectures.architecture import Architecture
from mup_megatron.architectures.bert import BERT
from mup_megatron.architectures.gpt import GPT
from mup_megatron.architectures.hybrid import HYBRID
from mup_megatron.architectures.keys.custom import CustomList, CustomTensor
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.t5 import T5
from mup_megatron.errors import InputError
from mup_megatron.theory import ModelShape
from mup_megatron.validation import quoted, validated
from mup_megatron.yaml_io import read_yaml

KEY = "architecture"
"""The key of a model file that names its architecture, where the others do not decide it."""

DEFAULT: Architecture = GPT
"""The architecture of a model file, or of a line, that says no other."""

_ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Makes an architecture known under its name.

    Raises:
        InputError: another one has its name or the class of its model files, or nothing in such a file tells it.
    """
    for other in _ARCHITECTURES.values():
        if other.name == architecture.name or other.file is architecture.file:
            raise InputError(
                f"architecture {architecture.name}: {other.name} has this name or class of model files already. Give "
                "it its own."
            )
    if architecture is not DEFAULT and not (architecture.command_line.keys or KEY in architecture.file.model_fields):
        raise InputError(
            f"architecture {architecture.name}: nothing in its model files tells it from others. Give their class a "
            f"key of its own, or a field {KEY}."
        )
    _ARCHITECTURES[architecture.name] = architecture


def architectures() -> Mapping[str, Architecture]:
    """Returns every architecture that is known, by its name."""
    return _ARCHITECTURES


def architecture_of(model: ModelFile) -> Architecture:
    """Returns the architecture of a model file."""
    found = next((each for each in _ARCHITECTURES.values() if each.file is type(model)), None)
    assert found is not None, f"{type(model).__name__}: of no architecture that is registered"
    return found


def depth_of(model: ModelFile) -> int:
    """Returns the number of residual branches of a model."""
    return sum(len(families) for layers in architecture_of(model).stacks(model).values() for families in layers)


for _each in (GPT, HYBRID, BERT, T5):
    register(_each)


# ---- model files ---------------------------------------------------------------------------------------------------


def model_file(content: Mapping[str, Any] | object, *, source: str) -> ModelFile:
    """Returns a model file from plain values; `source` names them in messages.

    Raises:
        InputError: unknown key, wrong type or impossible shape; names file, key and remedy.
    """
    if isinstance(content, Mapping) and "model_type" in content and "num_layers" not in content:
        raise InputError(f"{source}: a Hugging Face configuration, and a model file of Megatron's is needed here.")
    try:
        architecture, own = _sorted_out(content)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    return validated(architecture.file, own, source=source)


def load_model_file(path: Path) -> ModelFile:
    """Reads a model file (YAML).

    Raises:
        InputError: as `model_file`, and for a file that cannot be read.
    """
    return model_file(read_yaml(path), source=str(path))


def load_custom_tensors(path: Path) -> tuple[CustomTensor, ...]:
    """Reads the key `custom_tensors` of a file that may have others, as a model file has.

    Raises:
        InputError: there is no such key, or what it says is wrong.
    """
    content = read_yaml(path)
    key = "custom_tensors"
    if not isinstance(content, Mapping) or key not in content:
        raise InputError(f"{path}: no {key}. Write it as in a model file.")
    return validated(CustomList, {key: content[key]}, source=str(path)).custom_tensors


def _sorted_out(content: object) -> tuple[Architecture, object]:
    """Returns the architecture that plain values are of, and what its model file says of them.

    Raises:
        ValueError: they name an architecture that there is not, or another than their keys are of.
    """
    if not isinstance(content, Mapping):
        return DEFAULT, content
    named = content.get(KEY, DEFAULT.name)
    if not (isinstance(named, str) and named in _ARCHITECTURES):
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"{KEY}: {quoted(named)} is no architecture that is supported. Choose one of {known}.")
    by_keys = [each for each in _ARCHITECTURES.values() if each.command_line.keys.keys() & content.keys()]
    if KEY in content and by_keys and by_keys[0].name != named:
        key = next(iter(by_keys[0].command_line.keys.keys() & content.keys()))
        raise ValueError(f"{KEY}: {named} has no {key}. Remove one of the two keys.")
    architecture = by_keys[0] if by_keys else _ARCHITECTURES[named]
    own = {key: value for key, value in content.items() if key != KEY}
    return architecture, own | ({KEY: architecture.name} if KEY in architecture.file.model_fields else {})


def _as_model_file(content: object, handler: Callable[[object], ModelFile]) -> ModelFile:
    if isinstance(content, ModelFile):
        return content
    architecture, own = _sorted_out(content)
    return architecture.file.model_validate(own)


AnyModelFile = Annotated[SerializeAsAny[ModelFile], WrapValidator(_as_model_file)]
"""A model file of whatever architecture, as a field of another content."""


def remarks_on(base: ModelFile, target: ModelFile) -> Sequence[str]:
    """Returns what is known of transfer between a base and a target that differ in more than width, in sentences."""
    return architecture_of(target).remarks(base, target)


def shapes_of(base: ModelFile, target: ModelFile) -> tuple[ModelShape, ModelShape]:
    """Returns the shapes of base and target, named as in the target: see `Architecture.shapes`.

    Raises:
        InputError: the two differ in architecture; names the key.
    """
    return architecture_of(target).shapes(base, target, architecture_of(base))
