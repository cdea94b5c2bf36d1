"""A Hugging Face model's forward pass held against the plan: attention's scale in use, and factors in code.

Base and target are run on the meta device with a small input, and each operation is watched. So a plan is given only
to models whose attention is seen to compute what the plan says.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from mup_megatron.errors import InputError
from mup_megatron.huggingface import configs
from mup_megatron.huggingface.inputs import attempts
from mup_megatron.modules.attention import attention_modules
from mup_megatron.modules.forward import Factor, Forward, joined, watched_forward
from mup_megatron.modules.shapes import MetaModule
from mup_megatron.theory import family_of, rules
from mup_megatron.validation import shortened

_CLOSE = 1e-4
"""Relative difference of two scales that are one: some code rounds them to half precision."""


def forward_of(built: MetaModule, *, fixed: Collection[str] = ()) -> Forward:
    """Returns what forward passes of a model do: one of the whole, and one of each part that this did not reach.

    Args:
        built: the model.
        fixed: names of models within it that have one size in base and target: where they do not run, nothing in them
            can follow width.

    Raises:
        InputError: the forward pass of a part cannot be run with the inputs that are known, or not on the meta device.
    """
    model: Any = built.module
    model.eval()
    for part in (model, *_models_in(model)):
        if str(getattr(part.config, "_attn_implementation", None)) not in ("eager", "sdpa", "None"):
            part.set_attn_implementation("eager")  # a kernel's own code cannot be watched; it is told the same scale
        if getattr(part, "_can_set_experts_implementation", lambda: False)():
            part.set_experts_implementation("batched_mm")  # without values there is no loop over those that were chosen
    # Some classifiers look for the end of the text, of which there is none here. What they stand on has the attention.
    ends = model.get_output_embeddings() is not None or model.base_model is model
    passes: list[Forward] = []
    try:
        passes.append(_watched(built, model if ends else (model, model.base_model)))
    except InputError:
        # A model of several may want more than text, or sound and images that fit the text.
        if len(_outermost(model)) < 2:
            raise
    for name in _FEATURES:
        if hasattr(model, name) and _unreached(model, passes):
            with contextlib.suppress(InputError):  # the models within it are tried by themselves
                passes.append(_watched(built, getattr(model, name)))
    name_of = {id(module): name for name, module in model.named_modules()}
    for part in _unreached(model, passes):
        if part in _unreached(model, passes):
            try:
                passes += _of_parts(built, part)
            except InputError:
                if not any(_is_within(name_of[id(part)], name) for name in fixed):
                    raise
    return joined(passes)


def fixed_parts(base: MetaModule, target: MetaModule) -> frozenset[str]:
    """Returns the names of the models within a model that have one size in base and target."""
    one, other = base.shapes, target.shapes
    return frozenset(
        name
        for name, part in target.module.named_modules()
        if name
        and isinstance(part, PreTrainedModel)
        and all(one.get(key) == other[key] for key in other if _is_within(key, name))
    )


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


_FEATURES = ("get_image_features", "get_audio_features")
"""The methods by which a model of several gets what it takes from images and sound, with the projectors after them."""


def _models_in(model: torch.nn.Module) -> list[Any]:
    """Returns the models within a model, outer ones first."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]


def _outermost(model: torch.nn.Module) -> list[Any]:
    """Returns the models within a model that are in no other of them."""
    found = _models_in(model)
    within = {id(own) for part in found for own in _models_in(part)}
    return [part for part in found if id(part) not in within]


def _unreached(model: torch.nn.Module, passes: Iterable[Forward]) -> list[Any]:
    """Returns the models within a model of which no pass has called anything, outer ones first."""
    called = frozenset().union(*(each.called for each in passes))
    reached = {id(module) for name, module in model.named_modules(remove_duplicate=False) if name in called}
    return [part for part in _models_in(model) if _holds(part) and reached.isdisjoint(map(id, part.modules()))]


def _holds(model: torch.nn.Module) -> bool:
    return next(model.parameters(), None) is not None


def _of_parts(built: MetaModule, part: Any) -> list[Forward]:
    """Passes of a model within a model, or of all those within it where its own does not run."""
    try:
        return [_watched(built, part)]
    except InputError:
        within = [own for own in _models_in(part) if _holds(own)]
        if not within:
            raise
        return [each for own in within for each in _of_parts(built, own)]


def _watched(built: MetaModule, calls: Any) -> Forward:
    """Returns the first pass that runs of one of some calls, models or methods, each with several inputs.

    Raises:
        InputError: none does.
    """
    model: Any = built.module
    readout = model.get_output_embeddings()
    failure: Exception | None = None
    calls = calls if isinstance(calls, tuple) else (calls,)
    for call in calls:
        part = call if isinstance(call, torch.nn.Module) else call.__self__
        for inputs in attempts(getattr(call, "forward", call), part.config):
            try:
                with configs.quiet():
                    return watched_forward(
                        model, partial(call, **inputs), built.watch, None if readout is None else readout.weight
                    )
            except Exception as error:  # a library's code may raise anything, and some of it cannot run without values
                failure = failure or error
    assert failure is not None
    what = shortened(f"{type(failure).__name__}: {configs.in_a_line(failure)}", 80)
    raise InputError(
        f"model type {model.config.model_type}: its attention could not be looked at, because {type(part).__name__}'s "
        f"forward pass does not run on small inputs without values ({what}). It is not supported."
    ) from failure


def require_right_softmax(
    base: Forward,
    stock: Forward,
    after: Forward,
    model: torch.nn.Module,
    *,
    alpha: float,
    standard: bool,
    changes: Callable[[str], bool],
) -> None:
    """Raises InputError where attention would not compute with the scale that follows from the base's.

    Args:
        base: the recipe's base, as the library makes it.
        stock: the target, as the library makes it.
        after: the target, told what the plan says.
        model: the target.
        alpha: the recipe's attention_multiplier.
        standard: every scale stays the library's, but for `alpha`.
        changes: whether an attention of this name has to be told another scale than its own.
    """
    if len(base.softmaxes) != len(after.softmaxes):
        raise InputError(
            f"attention computes {len(base.softmaxes)} softmaxes in the recipe's base and {len(after.softmaxes)} in "
            "the target. Give the base the target's architecture."
        )
    seen = {found.where for found in after.softmaxes}
    for name, module, _ in attention_modules(model):
        if name in after.called and not any(where == name or where.startswith(f"{name}.") for where in seen):
            raise InputError(
                f"{name}: no softmax was seen in {type(module).__name__}, so what it computes is not known. A model "
                "with such an attention is not supported."
            )
    families = {family_of(name) for name in after.called}
    for name, module, _ in attention_modules(model):
        if family_of(name) not in families and changes(name):
            raise InputError(
                f"{name}: no pass over small inputs reaches {type(module).__name__}, so that it uses the scale that it "
                "is told is not known. Use attention_multiplier 1, and a base whose heads have the target's size."
            )
    for own, found in zip(stock.softmaxes if standard else base.softmaxes, after.softmaxes, strict=True):
        if own.scale is None or found.scale is None:
            raise InputError(
                f"{found.where}: what its attention multiplies logits by is no number that could be seen. A model with "
                "such an attention is not supported."
            )
        wanted = rules.softmax_scale(
            base_head_size=own.head_size,
            head_size=found.head_size,
            alpha=alpha,
            stock=own.scale,
        )
        if not math.isclose(found.scale, wanted, rel_tol=_CLOSE):
            raise InputError(
                f"{found.where}: its attention would multiply logits by {found.scale:.4g}, where {wanted:.4g} follows "
                f"from the recipe's base, and it cannot be told. Use attention_multiplier 1, and a base whose heads "
                f"have the target's size ({found.head_size}; the base's have {own.head_size})."
            )


def require_no_hidden_factor(base: Forward, target: Forward, model: torch.nn.Module) -> None:
    """Raises InputError where the code multiplies by a number that is another one at another width.

    What a table's rows are multiplied by may be another one: the plan takes it back. But it has to be known.
    """
    for name, factor in (*base.looked_up.items(), *target.looked_up.items()):
        if not factor:
            raise InputError(
                f"{name}: {type(model).__name__} multiplies its rows by something that is no one number that could be "
                "seen, so its multiplier is unknown. Switch it off in both configurations, or choose another model."
            )
    at_base, at_target = (_by_place(each.factors) for each in (base, target))
    for place, factors in at_target.items():
        for own, found in zip(at_base.get(place, ()), factors, strict=False):
            if own.number is None or own.number != found.number:
                raise InputError(
                    f"{found.where or type(model).__name__}: its code has a factor that {_follows(own, found)} width, "
                    f"{_told(own)} in the recipe's base and {_told(found)} in the target, which μP has no place for. "
                    "Switch it off in both configurations, or choose another model."
                )
    counts = [{place: len(factors) for place, factors in each.items()} for each in (at_base, at_target)]
    if counts[0] != counts[1]:
        raise InputError(
            f"{type(model).__name__}: its forward pass does other things at the target's width than at the base's, so "
            "what it multiplies by cannot be compared. Choose another model."
        )


def _by_place(factors: Iterable[Factor]) -> dict[tuple[str, str], list[Factor]]:
    """Returns the factors of each operation of each module's code, in the order of the pass."""
    found: dict[tuple[str, str], list[Factor]] = {}
    for factor in factors:
        found.setdefault((factor.where, factor.operation), []).append(factor)
    return found


def _follows(base: Factor, target: Factor) -> str:
    return "may follow" if base.number is None or target.number is None else "follows"


def _told(factor: Factor) -> str:
    sign = {"mul": "×", "div": "÷", "add": "+", "sub": "−", "pow": "^"}.get(factor.operation, factor.operation)
    return f"{sign} {factor.number:g}" if factor.number is not None else "an unknown number"
