"""What a check asks of a recipe's optimizer: which one of torch it is, how its steps are replayed, which of its values
make a mistake show, and what its rules are in words.

Everything that a check knows of single optimizers is here. Importing it does not import torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from mup_megatron.check.entries import is_hidden
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, PlanEntry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mup_megatron.check.measure.replay import Fitted, Replay, Sums

DECAY = 0.4
"""How much weight decay alone shrinks a weight over the run, at least: so much that a wrong one shows."""
MOVEMENT = 0.125
"""How far one step at the peak moves a hidden weight, in units of its initial std, at least."""
MOST_MOVEMENT = 0.25
"""Likewise at most: beyond, training is chaos, and seeds hide what differs."""
EPS_SHARE = 0.1
"""The eps of a check, relative to the gradients: it acts, and Adam is Adam still."""
PILOT_RATE = 1e-7
"""SGD's learning rate in the run that shows how large gradients are: so small that nothing moves."""

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


def _is_sgd(recipe: Recipe) -> bool:
    return recipe.parametrization.optimizer == "sgd"


def has_eps(recipe: Recipe) -> bool:
    """Returns whether the optimizer has an eps, and betas."""
    return not _is_sgd(recipe)


def rule_in_words(recipe: Recipe, quantity: Quantity, kind: str) -> str:
    """Returns what the rules give a kind of parameter: "hidden", "embedding", "readout", "gain" or "bias"."""
    return "the plan's" if _is_sgd(recipe) else _ADAM_IN_WORDS[quantity][kind]


def torch_optimizer(groups: Iterable[dict[str, Any]], recipe: Recipe) -> "torch.optim.Optimizer":
    """Builds the recipe's optimizer as torch has it, with these parameter groups."""
    import torch

    h = recipe.hyperparameters
    if _is_sgd(recipe):
        return torch.optim.SGD(groups, lr=h.lr, momentum=h.sgd_momentum)
    return torch.optim.AdamW(groups, lr=h.lr, betas=(h.adam_beta1, h.adam_beta2))


def clip(model: "nn.Module", most: float) -> float:
    """Clips a model's gradients to a norm, unless `most` is 0, and returns the norm that they had."""
    from torch import nn

    return float(nn.utils.clip_grad_norm_(model.parameters(), most if most > 0 else math.inf))


def replay_for(recipe: Recipe) -> "Replay":
    """Returns a new replay of one tensor's state in the recipe's optimizer."""
    from mup_megatron.check.measure.replay import AdamReplay, SGDReplay

    h = recipe.hyperparameters
    return SGDReplay(h.sgd_momentum) if _is_sgd(recipe) else AdamReplay(h.adam_beta1, h.adam_beta2)


def fitted(sums: "Sums") -> "Fitted":
    """Solves the equations of a step, of whichever replay: a rank may have seen none of the tensor itself, so they are
    told by their shape.
    """
    from mup_megatron.check.measure.replay import AdamReplay, SGDReplay

    return (AdamReplay if len(sums) == AdamReplay.COLUMNS else SGDReplay).fitted(sums)


def stressed_values(
    recipe: Recipe, *, steps: int, std: float, eps: float | None, rate: float | None
) -> dict[str, float]:
    """Returns learning rate, weight decay and eps of the recipe, brought to where a mistake in them shows.

    Args:
        recipe: as tuned.
        steps: of the run.
        std: of weights at the base, by and large.
        eps: at the base, if the optimizer has one.
        rate: SGD's learning rate at which weights move by `MOVEMENT`, which depends on gradients.
    """
    h = recipe.hyperparameters
    if _is_sgd(recipe):
        lr = h.lr if rate is None else clamped(h.lr, (rate / 4, rate))
        # What momentum adds up moves a weight as well.
        return {"lr": lr, "weight_decay": DECAY * (1 - h.sgd_momentum) / (0.5 * steps * lr)}
    lr = clamped(h.lr, (MOVEMENT * std, MOST_MOVEMENT * std))
    # The mean of a check's schedule is a little above half of its peak.
    return {"lr": lr, "weight_decay": DECAY / (0.5 * steps * lr)} | ({} if eps is None else {"adam_eps": eps})


def from_gradients(gradients: Sequence[tuple[float, PlanEntry]], plan: Plan, recipe: Recipe) -> dict[str, float | None]:
    """Returns the value of `stressed_values` that depends on how large gradients are: Adam's eps, SGD's learning rate.

    Args:
        gradients: of a correct run, each with its entry.
        plan: that it was trained with.
        recipe: likewise.
    """
    there = [(value, entry) for value, entry in gradients if value > 0]
    if _is_sgd(recipe):
        h = recipe.hyperparameters
        moved = [value * entry.lr / plan.lr * entry.width_ratio for value, entry in there if is_hidden(entry)]
        return {"rate": MOVEMENT * (1 - h.sgd_momentum) * h.init_method_std / median(moved) if moved else None}
    # Gradients follow the base as the rule for eps has it.
    at_base = [value * plan.adam_eps / entry.eps for value, entry in there if entry.eps is not None]
    return {"eps": EPS_SHARE * median(at_base) if at_base else None}


def clamped(value: float, bounds: tuple[float, float]) -> float:
    """Returns the value, or the bound that it is beyond."""
    low, high = bounds
    return min(max(value, low), high)
