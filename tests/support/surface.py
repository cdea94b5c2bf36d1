"""What users hold of a release, a line for each thing: names and their parameters, commands and flags, keys of files.

    PYTHONPATH=. python tests/support/surface.py

records the release whose version the package has, in tests/recorded/. For how long a line is kept is in
docs/compatibility.md.
"""

import importlib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from mup_megatron import __version__
from mup_megatron.architectures import architecture_of, load_model_file, model_file
from mup_megatron.cli.main import COMMANDS, group
from mup_megatron.deepspeed.entry import KEY, Entry
from mup_megatron.megatron import cpu
from mup_megatron.megatron.pretrain.flags import NAMES
from mup_megatron.recipe import Recipe, load_recipe
from mup_megatron.search import space

ROOT = Path(__file__).parents[2]


def surface() -> list[str]:
    """Returns the lines of what is imported here, sorted, each of them once."""
    return sorted({*_names(), *_commands(), *_flags_of_launcher(), *_keys_that_are_read(), *_keys_that_are_written()})


def _names() -> Iterator[str]:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    cpu.enable()  # lets modules that are Megatron's be imported
    for module in re.findall(r"^\| `(mup_megatron[\w.]*)` \|", page, flags=re.MULTILINE):
        offered = importlib.import_module(module)
        for name in getattr(offered, "__all__", ()):
            value = getattr(offered, name)
            yield f"{module}.{name}"
            given = set(parameters(value))
            yield from (f"{module}.{name}({parameter})" for parameter in given)
            for attribute in _attributes(value):
                if attribute not in given:
                    line = f"{module}.{name}.{attribute}"
                    yield line
                    yield from (f"{line}({parameter})" for parameter in parameters(method(value, attribute)))


def parameters(value: object, *, required: bool = False) -> Iterator[str]:
    """Yields the names of what a function or class can be called with; of those without a default if asked."""
    if inspect.isroutine(value) or (inspect.isclass(value) and not issubclass(value, BaseException)):
        for name, parameter in inspect.signature(value).parameters.items():
            given = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if not given and not (required and parameter.default is not parameter.empty):
                yield name


def method(owner: Any, name: str) -> object:
    """Returns a class's method as an instance has it, None for any other attribute. Runs no property."""
    found: Any = inspect.getattr_static(owner, name, None)
    is_one = isinstance(found, classmethod) or (callable(found) and hasattr(found, "__get__"))
    return found.__get__(object(), owner) if is_one else None


def _attributes(value: object) -> Iterator[str]:
    if inspect.isclass(value):
        own = [each for each in value.__mro__ if each.__module__.startswith("mup_megatron")]
        yield from (name for each in own for name in vars(each) if not name.startswith("_") and name != "model_config")


def _commands() -> Iterator[str]:
    def told(words: str, command: click.Command) -> Iterator[str]:
        yield words
        for parameter in command.params:
            for flag in (*parameter.opts, *parameter.secondary_opts) if isinstance(parameter, click.Option) else ():
                yield f"{words} {flag}"
                choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ()
                yield from (f"{words} {flag} {choice}" for choice in choices)
        for name, inner in getattr(command, "commands", {}).items():
            yield from told(f"{words} {name}", inner)

    for name in COMMANDS:
        found = group.get_command(click.Context(group), name)
        assert found is not None
        yield from told(f"mup-megatron {name}", found)


def _flags_of_launcher() -> Iterator[str]:
    yield from (f"mup_megatron.launch {flag}" for flag in (*NAMES, "--deepspeed"))


def _keys_that_are_read() -> Iterator[str]:
    yield from (f"recipe {key}" for key in _keys(Recipe))
    for path in sorted((ROOT / "configs" / "models").glob("*.yaml")):
        file = type(load_model_file(path))
        yield from (f"model file of a {architecture_of(load_model_file(path)).name} {key}" for key in _keys(file))
    yield from (f"model file of a hybrid {key}" for key in _keys(type(model_file(_HYBRID, source="hybrid"))))
    yield from (f"search space {key}" for key in _keys(space._Entry))
    yield from (f'"{KEY}" of DeepSpeed {key}' for key in _keys(Entry))


_HYBRID = {
    "hybrid_layer_pattern": "*-", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64,
    "seq_length": 8,
}  # fmt: skip


def _keys(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """Yields the keys of a file's content, those of its parts behind a full stop."""
    for name, field in model.model_fields.items():
        yield before + name
        for part in _models_in(field.annotation):
            yield from _keys(part, f"{before}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _keys_that_are_written() -> Iterator[str]:
    recipe = load_recipe(ROOT / "configs" / "recipes" / "gpt3_6.7b.recipe.yaml")
    plan = recipe.plan(load_model_file(ROOT / "configs" / "models" / "gpt3_125m.yaml"))
    yield from (f"explain --format json {key}" for key in _written(plan.to_json()))


def _written(content: object, before: str = "") -> Iterator[str]:
    match content:
        case Mapping():
            for key, value in content.items():
                yield before + key
                yield from _written(value, f"{before}{key}.")
        case list() | tuple():
            for value in content:
                yield from _written(value, before)


if __name__ == "__main__":
    path = ROOT / "tests" / "recorded" / f"surface-{__version__}.txt"
    path.write_text("\n".join(surface()) + "\n", encoding="utf-8")
