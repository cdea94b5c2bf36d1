"""The optimizers as a check sees them: how their steps are replayed, which of their values make a mistake show,
and what their rules are in words.

To add one, `register` it here, in `modules/optimizers.py`, whose class trains the correct runs, and its rules in
`theory.optimizers`. Importing it does not import torch.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from mup_megatron.by_optimizer import ByOptimizer
from mup_megatron.check.entries import is_hidden
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.errors import InputError
from mup_megatron.recipe import Hyperparameters, Recipe
from mup_megatron.theory import Optimizer, Plan, PlanEntry, optimizers

__all__ = ["CHECKED_OPTIMIZERS", "CheckedOptimizer", "Handling", "Split", "register"]

if TYPE_CHECKING:
    import torch
    from torch import nn

    _Made = Callable[[Iterable[dict[str, Any]], Hyperparameters], torch.optim.Optimizer]

    from mup_megatron.check.measure.replay import Replay

Split = tuple[int, ...]
"""The rows of a matrix's parts that follow each other, over and over: those of queries, keys and values of a group.
Empty for a matrix that is orthogonalised as one.
"""

DECAY = 0.4
"""How much weight decay alone shrinks a weight over the run, at least: so much that a wrong one shows."""
MOVEMENT = 0.125
"""How far one step at the peak moves a hidden weight, in units of its initial std, at least."""
MOST_MOVEMENT = 0.25
"""Likewise at most: beyond, training is chaos, and seeds hide what differs."""
EPS_SHARE = 0.1
"""The eps of a check, relative to the gradients: it acts, and Adam is Adam still."""
PILOT_RATE = 1e-7
"""Of an optimizer whose step grows with gradients, the learning rate in the run that shows how large these are: so
small that nothing moves."""

_ADAM_IN_WORDS: Mapping[Quantity, Mapping[str, str]] = {
    Quantity.INITIAL: {
        "hidden": "σ/√r_in",
        "embedding": "σ",
        "readout": "σ",
        "gain": "1, a constant",
        "bias": "0",
    },
    Quantity.LEARNING_RATE: {"hidden": "η/r_in", "embedding": "η", "readout": "η", "gain": "η", "bias": "η"},
    Quantity.EPS: {
        "hidden": "ε/r_out",
        "embedding": "ε/r_out",
        "readout": "ε/r_in",
        "gain": "ε/r_out",
        "bias": "ε/r_out",
    },
    Quantity.WEIGHT_DECAY: {"hidden": "λ·r_in", "embedding": "λ", "readout": "λ", "gain": "none", "bias": "none"},
}


@dataclass(frozen=True, slots=True)
class Handling:
    """The way in which an optimizer of matrices takes a tensor."""

    split: Split = ()
    dtype: "torch.dtype | None" = None
    """In which it multiplies matrices; None for that of gradients."""


_AS_IT_IS = Handling()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedOptimizer:
    """An optimizer as a check sees it, beside its rules."""

    replay: "Callable[[Hyperparameters, Handling], Replay]"
    """Makes a new replay of one tensor's state; given how that is taken."""
    made: "_Made | None" = None
    """Makes the optimizer of correct runs of groups of one tensor each; None where that is torch's own."""
    damping: Callable[[Hyperparameters], float] = lambda _: 1.0
    """How much shorter a first step is than what repeated ones add up to: 1 - μ with a momentum that is no mean."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Hyperparameters of its own → between which values a right model trains."""
    in_words: Mapping[Quantity, Mapping[str, str]] = field(default_factory=dict)
    """Quantity and kind of parameter → what the rules give it, for people."""


def _adam_replay(h: Hyperparameters, _: Handling) -> "Replay":
    from mup_megatron.check.measure.replay import AdamReplay

    return AdamReplay(h.adam_beta1, h.adam_beta2)


def _sgd_replay(h: Hyperparameters, _: Handling) -> "Replay":
    from mup_megatron.check.measure.replay import SGDReplay

    return SGDReplay(h.sgd_momentum)


def _muon_replay(h: Hyperparameters, handling: Handling) -> "Replay":
    from mup_megatron.check.measure.directions import DirectionReplay, MuonDirection

    # Where a framework's own rounds, somebody's may not.
    dtypes = dict.fromkeys((handling.dtype, None))
    return DirectionReplay(*(MuonDirection(h, handling.split, dtype) for dtype in dtypes), whole=True)


def _lion_replay(h: Hyperparameters, _: Handling) -> "Replay":
    from mup_megatron.check.measure.directions import DirectionReplay, LionDirection

    return DirectionReplay(LionDirection(h), whole=False)


def _muon(groups: Iterable[dict[str, Any]], h: Hyperparameters) -> "torch.optim.Optimizer":
    from mup_megatron.check.measure.directions import Directed, MuonDirection

    return Directed(groups, lambda handling: MuonDirection(h, handling.split, handling.dtype))


def _lion(groups: Iterable[dict[str, Any]], h: Hyperparameters) -> "torch.optim.Optimizer":
    from mup_megatron.check.measure.directions import Directed, LionDirection

    return Directed(groups, lambda _: LionDirection(h))


CHECKED_OPTIMIZERS = ByOptimizer[CheckedOptimizer]("a check")
"""The optimizers that a check knows, by their names in a recipe."""
register = CHECKED_OPTIMIZERS.register

register("adam", CheckedOptimizer(replay=_adam_replay, in_words=_ADAM_IN_WORDS))
register("sgd", CheckedOptimizer(replay=_sgd_replay, damping=lambda h: 1 - h.sgd_momentum))
register("muon", CheckedOptimizer(replay=_muon_replay, made=_muon, bounds={"muon_extra_scale_factor": (0.1, 1.0)}))
register("lion", CheckedOptimizer(replay=_lion_replay, made=_lion))


def rules_of(recipe: Recipe) -> Optimizer:
    """Returns the rules of the recipe's optimizer."""
    return optimizers()[recipe.parametrization.optimizer]


def _checked(recipe: Recipe) -> CheckedOptimizer:
    return CHECKED_OPTIMIZERS[recipe.parametrization.optimizer]


def rule_in_words(recipe: Recipe, quantity: Quantity, kind: str) -> str:
    """Returns what rules give a kind of parameter ("hidden", "embedding", "readout", "gain", "bias"), for people."""
    return _checked(recipe).in_words.get(quantity, {}).get(kind, "the plan's")


def torch_optimizers(groups: Iterable[dict[str, Any]], recipe: Recipe) -> "list[torch.optim.Optimizer]":
    """Builds the recipe's optimizers as torch has them, each with its parameter groups: those that step anything.

    Args:
        groups: where the recipe has several optimizers, each says which `optimizer` it is for.
        recipe: of the check.

    Raises:
        InputError: torch has not the recipe's.
    """
    from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS

    return _built(groups, recipe, lambda name: TORCH_OPTIMIZERS[name].made)


def correct_optimizers(groups: Iterable[dict[str, Any]], recipe: Recipe) -> "list[torch.optim.Optimizer]":
    """Builds what trains a correct run: one for each of the recipe's optimizers that steps anything.

    Args:
        groups: of one tensor each, that say which `optimizer` steps it, and may say its `handling`.
        recipe: of the check.
    """
    from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS

    return _built(groups, recipe, lambda name: CHECKED_OPTIMIZERS[name].made or TORCH_OPTIMIZERS[name].made)


def _built(
    groups: Iterable[dict[str, Any]], recipe: Recipe, maker: "Callable[[str], _Made]"
) -> "list[torch.optim.Optimizer]":
    of_each: dict[str, list[dict[str, Any]]] = {name: [] for name in recipe.optimizers}
    for group in groups:
        of_each[group.get("optimizer", recipe.optimizers[0])].append(group)
    made = {name: maker(name) for name in of_each}
    return [made[name](own, recipe.moved) for name, own in of_each.items() if own]


def of_torch(optimizer: str) -> Handling:
    """Returns how torch's own optimizer takes a tensor.

    Raises:
        InputError: torch has none of this name.
    """
    from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS

    return Handling(dtype=TORCH_OPTIMIZERS[optimizer].dtype)


def require_one_optimizer(recipe: Recipe) -> None:
    """Raises for a recipe of which a DeepSpeed engine's steps cannot be read.

    Raises:
        InputError: its optimizer leaves some tensors to another.
    """
    first, *others = recipe.optimizers
    if others:
        raise InputError(
            f"parametrization.optimizer: the recipe's is {first}, which leaves some tensors to {' and '.join(others)}, "
            "and a check of an engine of DeepSpeed's reads one optimizer. Check without --deepspeed: the engine "
            "compares its groups with the plan as it starts."
        )


def replay_for(recipe: Recipe, optimizer: str | None = None, handling: Handling = _AS_IT_IS) -> "Replay":
    """Returns a new replay of one tensor's state.

    Args:
        recipe: of the check.
        optimizer: which of the recipe's steps it; None where one steps all.
        handling: how that takes it.

    Raises:
        InputError: none is known of it.
    """
    known = CHECKED_OPTIMIZERS.only(recipe.optimizers) if optimizer is None else CHECKED_OPTIMIZERS[optimizer]
    return known.replay(recipe.moved, handling)


def clip(model: "nn.Module", most: float) -> float:
    """Clips a model's gradients to a norm, unless `most` is 0, and returns the norm that they had."""
    from torch import nn

    return float(nn.utils.clip_grad_norm_(model.parameters(), most if most > 0 else math.inf))


def stressed_values(
    recipe: Recipe, *, steps: int, std: float, eps: float | None, rate: float | None
) -> dict[str, float]:
    """Returns learning rate, weight decay, eps and what is the optimizer's own, brought to where mistakes show.

    Args:
        recipe: as tuned.
        steps: of the run.
        std: of weights at the base, by and large.
        eps: at the base, if the optimizer has one.
        rate: of an optimizer whose step grows with gradients, the learning rate at which weights move by `MOVEMENT`.
    """
    h = recipe.moved
    if rules_of(recipe).step == 0:
        lr = clamped(h.lr, (MOVEMENT * std, MOST_MOVEMENT * std))
    else:
        lr = h.lr if rate is None else clamped(h.lr, (rate / 4, rate))
    # The mean of a check's schedule is a little above half of its peak; what momentum adds up moves a weight as well.
    decay = DECAY * _checked(recipe).damping(h) / (0.5 * steps * lr)
    own = {key: clamped(getattr(h, key), bounds) for key, bounds in _checked(recipe).bounds.items()}
    return {"lr": lr, "weight_decay": decay, **own} | ({} if eps is None else {"adam_eps": eps})


def from_gradients(gradients: Sequence[tuple[float, PlanEntry]], plan: Plan, recipe: Recipe) -> dict[str, float | None]:
    """Returns the value of `stressed_values` that depends on how large gradients are: the eps, or where they make the
    step, the learning rate.

    Args:
        gradients: of a correct run, each with its entry.
        plan: that it was trained with.
        recipe: likewise.
    """
    there = [(value, entry) for value, entry in gradients if value > 0]
    if rules_of(recipe).step > 0:
        h = recipe.moved
        moved = [value * entry.lr / plan.lr * entry.width_ratio for value, entry in there if is_hidden(entry)]
        return {"rate": MOVEMENT * _checked(recipe).damping(h) * h.init_method_std / median(moved) if moved else None}
    # Gradients follow the base as the rule for eps has it.
    at_base = [value * plan.adam_eps / entry.eps for value, entry in there if entry.eps is not None]
    return {"eps": EPS_SHARE * median(at_base) if at_base else None}


def clamped(value: float, bounds: tuple[float, float]) -> float:
    """Returns the value, or the bound that it is beyond."""
    low, high = bounds
    return min(max(value, low), high)
