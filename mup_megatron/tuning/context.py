"""The context of a study of the proxy, read back: its model, what was not searched, its data and the run of a trial."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from mup_megatron.architectures.registry import model_file
from mup_megatron.errors import InputError
from mup_megatron.search import StudyRecord
from mup_megatron.validation import Strict, validated


class _Training(Strict):
    """The part of a run's options that a study records."""

    model_config = ConfigDict(extra="ignore")

    train_iters: Annotated[int, Field(gt=0)]
    global_batch_size: Annotated[int, Field(gt=0)]


class ModelContext(Strict):
    """The part of a context that is about the model and about what is not searched."""

    model_config = ConfigDict(extra="ignore")

    proxy: dict[str, Any]
    fixed: dict[str, Any]

    @model_validator(mode="after")
    def _of_a_recipe(self) -> "ModelContext":
        if not isinstance(self.fixed.get("hyperparameters", {}), dict):
            raise ValueError("fixed.hyperparameters: no keys and values. Restore the database.")
        return self


class SweepContext(ModelContext):
    """A whole context, as `ProxyTraining.context` makes it."""

    data: dict[str, str | None]
    training: _Training


def sweep_context(study: StudyRecord, kind: type[ModelContext], *, flag: str) -> Mapping[str, Any]:
    """Returns what a study of `mup-megatron sweep` says of its trials, as far as `kind` asks for it.

    Raises:
        InputError: it was made by something else, or is damaged; names the flag that chose it.
    """
    source = f"study {study.spec.name!r}"
    if "proxy" not in study.spec.context:
        raise InputError(f"{source} was not made by `mup-megatron sweep`. Choose another with {flag}.")
    validated(kind, study.spec.context, source=source)
    model_file(study.spec.context["proxy"], source=f"{source}: proxy")
    return study.spec.context
