"""The architectures that a trained model can become, and which of them one becomes."""

from collections.abc import Mapping, Sequence

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import shapes_of
from mup_megatron.errors import InputError
from mup_megatron.export.architectures.deepseek_v3 import DEEPSEEK_V3
from mup_megatron.export.architectures.gpt2 import GPT2
from mup_megatron.export.architectures.granite import GRANITE
from mup_megatron.export.architectures.llama import LLAMA
from mup_megatron.export.architectures.mixtral import MIXTRAL
from mup_megatron.export.architectures.qwen3 import QWEN3
from mup_megatron.export.architectures.target import Carried, Target
from mup_megatron.export.folds import Fold, folds
from mup_megatron.theory import Plan

_TARGETS: dict[str, Target] = {}


def register(target: Target) -> None:
    """Makes an architecture known under its name."""
    assert target.name not in _TARGETS, f"{target.name} is registered"
    _TARGETS[target.name] = target


for _each in (LLAMA, QWEN3, GPT2, MIXTRAL, DEEPSEEK_V3, GRANITE):
    register(_each)


def targets() -> Mapping[str, Target]:
    """Returns the architectures that are known, by name."""
    return _TARGETS


def folds_for(target: Target, model: ModelFile, plan: Plan) -> tuple[Carried, Sequence[Fold]]:
    """Returns which multipliers an architecture carries itself, and what becomes of the weights for the others.

    Raises:
        InputError: one of them cannot be folded exactly.
    """
    carried = target.carried(plan)
    _, shape = shapes_of(model, model)
    multipliers = folds(plan, shape.tensors, carried=carried.names, softmax_scale=target.softmax_scale(model))
    return carried, [*multipliers, *target.own_folds(model)]


def choose(model: ModelFile, plan: Plan, name: str | None = None) -> Target:
    """Returns the architecture of this name, or the one that leaves most weights as they are.

    Raises:
        InputError: the model has what that architecture, or any, has not; names it, and those that have it.
    """
    possible = [each for each in _TARGETS.values() if not any(each.problems(model))]
    if name is None:
        if not possible:
            raise InputError(f"no architecture has all that the model has: {_nearest(model)}.")
        return min(possible, key=lambda each: len(folds_for(each, model, plan)[1]))
    if name not in _TARGETS:
        raise InputError(f"--architecture {name}: not known. Choose one of {', '.join(_TARGETS)}.")
    chosen = _TARGETS[name]
    if problem := next(iter(chosen.problems(model)), None):
        others = ", ".join(each.name for each in possible)
        remedy = f"Export to {others}" if others else "No other that is known has all of the model"
        raise InputError(f"--architecture {name}: it has no {problem}. {remedy}.")
    return chosen


def _nearest(model: ModelFile) -> str:
    """Returns what the architecture lacks that lacks least."""
    name, lacks = min(((each.name, [*each.problems(model)]) for each in _TARGETS.values()), key=lambda it: len(it[1]))
    return f"{name} lacks {' and '.join(lacks[:3])}"
