"""Mistakes in the optimizer: learning rates, their schedule, eps, weight decay."""

import math
from collections.abc import Callable, Mapping

from mup_megatron.check.entries import (
    is_any,
    is_embedding,
    is_hidden,
    is_input_role,
    is_matrix,
    is_not_hidden,
    is_readout,
    is_vector,
)
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.measurements import Key, Quantity, RunProtocol
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.hypothesis import (
    ANY,
    Hypothesis,
    LogFactor,
    Predict,
    Select,
    at_rest,
    log_of,
    of_weights,
)
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, PlanEntry


def rates(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Learning rates that follow another rule."""
    lr = Quantity.LEARNING_RATE
    return [
        of_weights(
            "learning-rate-collapsed",
            "all groups have one learning rate, the base's. Give hidden weights η/r_in: look for what overwrites the "
            "groups' lr, as a scheduler that does not know max_lr, or a launcher that merges groups.",
            lr,
            at,
            is_any,
            lambda e, w: math.log(w.plan.lr / e.lr),
        ),
        of_weights(
            "learning-rate-all-divided",
            "all groups have the hidden weights' learning rate. Divide by r for hidden weights alone: embeddings, "
            "gains, biases and the readout keep η.",
            lr,
            at,
            is_not_hidden,
            lambda _, w: -math.log(w.r),
        ),
        of_weights(
            "learning-rate-by-fan-out",
            "the learning rate of hidden weights follows fan_out. Divide by the ratio of fan_in.",
            lr,
            at,
            is_hidden,
            lambda e, w: math.log(e.width_ratio / w.r_out(e)),
        ),
    ]


def _protocol(step: int) -> RunProtocol:
    return levels.EARLY if step <= levels.EARLY.steps else levels.LATE


def schedule(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Warm-up and floor."""

    def start(key: Key, width: int) -> float:
        if key.quantity is not Quantity.LEARNING_RATE:
            return 0.0
        warm = at[width].recipe.schedule.lr_warmup_fraction * _protocol(key.step).steps
        if at_rest(key, at[width]):
            return math.inf
        return ANY if key.step - 1 < warm else 0.0

    def floor(other: Callable[[PlanEntry, Plan], float]) -> Predict:
        def predict(key: Key, width: int) -> float:
            here = at[width]
            entry = here.plan.by_name.get(key.name)
            if key.quantity is not Quantity.LEARNING_RATE or entry is None or at_rest(key, here):
                return 0.0
            down = _descended(key.step, here.recipe)
            right, wrong = ((1 - down) * entry.lr + down * f for f in (entry.min_lr, other(entry, here.plan)))
            return math.log(wrong / right) if right > 0 and wrong > 0 else 0.0

        return predict

    return [
        Hypothesis(
            "warm-up-start",
            "the warm-up does not start at 0: one starting value for all groups breaks their ratios. Start at 0, or "
            "scale the start as the peak.",
            start,
        ),
        Hypothesis(
            "learning-rate-floor",
            "all groups decay to the base's min_lr. Scale the floor of each group as its peak.",
            floor(lambda _, plan: plan.min_lr),
        ),
        Hypothesis(
            "learning-rate-floor",
            "the learning rates decay to 0 instead of the recipe's min_lr. Pass min_lr on, scaled as the peak.",
            floor(lambda _e, _p: 0.0),
        ),
    ]


def _descended(step: int, recipe: Recipe) -> float:
    """Returns how much of the way from peak to floor a check's linear schedule has gone in a step, counted from 1."""
    steps = _protocol(step).steps
    warm, end = (f * steps for f in (recipe.schedule.lr_warmup_fraction, recipe.schedule.lr_decay_fraction))
    return max(0.0, min(1.0, (step - 1 - warm) / (end - warm)))


def eps(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Returns an eps that follows another rule, of the tensors whose optimizer has one."""
    if all(entry.eps is None for entry in next(iter(at.values())).plan.entries):
        return []

    def unscaled(entry: PlanEntry, here: AtWidth) -> float:
        return 0.0 if entry.eps is None else math.log(here.plan.adam_eps / entry.eps)

    def h(name: str, sentence: str, select: Select, factor: LogFactor) -> Hypothesis:
        return of_weights(name, sentence, Quantity.EPS, at, lambda e: e.eps is not None and select(e), factor)

    rule = "Divide ε by the ratio of fan_out, the readout's by that of fan_in."
    return [
        h("eps-not-scaled", f"Adam's eps is the base's for all. {rule}", is_any, unscaled),
        h(
            "eps-not-scaled-for-inputs",
            "Adam's eps is the base's for embeddings, gains and biases, as in Megatron's own μP. Their gradients "
            f"shrink with width too. {rule}",
            is_input_role,
            unscaled,
        ),
        h(
            "eps-not-scaled-for-embeddings",
            f"Adam's eps is the base's for embeddings. {rule}",
            is_embedding,
            unscaled,
        ),
        h("hidden-eps", f"Adam's eps is the base's for hidden weights. {rule}", is_hidden, unscaled),
        h("readout-eps", f"Adam's eps is the base's for the readout. {rule}", is_readout, unscaled),
        h(
            "eps-scaled-twice",
            "Adam's eps is divided by the ratio twice. Give the plan's eps to the groups, and nothing else.",
            is_any,
            lambda e, w: -unscaled(e, w),
        ),
        h(
            "eps-by-fan-in",
            f"Adam's eps of hidden weights follows fan_in. {rule}",
            is_hidden,
            lambda e, w: math.log(w.r_out(e) / e.width_ratio),
        ),
    ]


def weight_decay(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Weight decay that is missing, or not compensated, or where there should be none."""
    wd = Quantity.WEIGHT_DECAY
    return [
        of_weights(
            "weight-decay-not-compensated",
            "the weight decay of hidden weights is not multiplied by r where their learning rate was divided by it, so "
            "they decay r times as slowly. Give them λ·r_in.",
            wd,
            at,
            is_hidden,
            lambda e, w: log_of(w.plan.weight_decay) - log_of(e.weight_decay),
        ),
        of_weights(
            "weight-decay-on-vectors",
            "biases and gains have weight decay. Put them into groups without.",
            wd,
            at,
            is_vector,
            lambda _e, _w: math.inf,
        ),
        of_weights(
            "weight-decay-off",
            "there is no weight decay. Pass the recipe's on.",
            wd,
            at,
            is_matrix,
            lambda _e, _w: -math.inf,
        ),
    ]
