"""`recipe`: a recipe by hand, with every option that a recipe has; or every default."""

from pathlib import Path
from typing import Any, get_args

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mup_megatron import recipe as recipes
from mup_megatron import theory
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file
from mup_megatron.cli.options import FILE, answer, force_option
from mup_megatron.targets import hugging_face_config, is_hugging_face, read_target
from mup_megatron.yaml_io import dump_yaml

_SECTIONS: dict[str, type[BaseModel]] = {
    "hyperparameters": recipes.Hyperparameters,
    "schedule": recipes.Schedule,
    "parametrization": recipes.Parametrization,
}

_DEPTH = "depth"
"""The one key of these that has keys of its own."""


@click.command()
@click.option(
    "--base",
    type=FILE,
    metavar="MODEL.yaml",
    help="The shape at which the values were tuned: a model file, or a Hugging Face config.json.",
)
@click.option("-o", "--output", type=FILE, metavar="R", help="Where to write; standard output by default.")
@click.option("--defaults", is_flag=True, help="Print every key of a recipe with its default, and do nothing else.")
@force_option
def command(base: Path | None, output: Path | None, defaults: bool, force: bool, **values: Any) -> None:
    """A recipe from values that you have tuned yourself."""
    if defaults:
        click.echo(_defaults(), nl=False)
        return
    if base is None:
        raise click.UsageError("--base MODEL.yaml is missing: a recipe says at which shape its values were tuned.")
    for key in (k for model in _SECTIONS.values() for k, field in model.model_fields.items() if field.is_required()):
        if values[key] is None:
            raise click.UsageError(f"--{key.replace('_', '-')} is missing: it has no default.")
    given = {key: value for key, value in values.items() if value is not None}
    if _DEPTH in given:
        given[_DEPTH] = {"alpha": given[_DEPTH]}
    shape, implied = _base(base)
    content: dict[str, Any] = {"base": shape}
    given = {**implied, **given}
    for section, model in _SECTIONS.items():
        content[section] = {key: given[key] for key in model.model_fields if key in given}
    answer(recipes.recipe(content, source="recipe").to_yaml(), output, force=force)


def _base(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the shape in a file, and the hyperparameters that it implies if nothing else is said."""
    content = read_target(path)
    if not is_hugging_face(content):
        return model_file(content, source=str(path)).model_dump(mode="json"), {}
    from mup_megatron.huggingface.configs import base_content, reference_std

    config = hugging_face_config(content, source=str(path))
    # With the default in its place, a base that is drawn otherwise would be rescaled without a word.
    return base_content(config), {"init_method_std": reference_std(config)}


def _option(key: str, field: FieldInfo) -> click.Option:
    if key == _DEPTH:
        return click.Option(
            ["--depth-alpha", key],
            type=float,
            help="Layers follow their stack's depth by CompleteP, with this exponent of the branches: 1, or 0.5. "
            "[default: depth changes nothing]",
        )
    known = theory.optimizers() if key == "optimizer" else get_args(field.annotation)
    choices = [value for value in known if isinstance(value, str)]
    default = "required" if field.is_required() else f"default {field.default}"
    kind = type(field.default) if isinstance(field.default, int) else float
    return click.Option(
        [f"--{key.replace('_', '-')}", key], type=click.Choice(choices) if choices else kind, help=f"[{default}]"
    )


command.params.extend(_option(k, f) for model in _SECTIONS.values() for k, f in model.model_fields.items())


def _defaults() -> str:
    def values(model: type[BaseModel]) -> dict[str, Any]:
        return {key: None if field.is_required() else field.default for key, field in model.model_fields.items()}

    content = {"version": 1, "base": values(ModelFile)}
    content |= {section: values(model) for section, model in _SECTIONS.items() if section != "parametrization"}
    content |= {"per_parameter": [], "parametrization": values(recipes.Parametrization)}
    content |= {"horizon": None, "training": values(recipes.Training), "provenance": {}}
    required = [key for key, field in ModelFile.model_fields.items() if field.is_required()]
    own = ", ".join(f"{key}: {value}" for key, value in values(recipes.PerParameter).items() if value is not None)
    return (
        f"# Required, without a default: hyperparameters.lr, base.{', base.'.join(required)}.\n"
        f"# An entry of per_parameter: {{match: PATTERN, {own}}}.\n" + dump_yaml(content)
    )
