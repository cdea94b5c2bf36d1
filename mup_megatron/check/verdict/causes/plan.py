"""Mistakes about a whole plan: none of it, one ratio for all of it, or without the recipe's own rules."""

import math
from collections.abc import Mapping

from mup_megatron.check.entries import (
    is_hidden,
    is_matrix,
)
from mup_megatron.check.measure.measurements import Key, Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.forward import at_logits, at_readout, root_of_head
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis, at_rest, log_of, of_weights


def plan_mistakes(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Returns all of it at once."""
    exponent = next(iter(at.values())).recipe.parametrization.weight_decay_exponent
    standard = of_weights(
        "standard-parametrization",
        "everything has the base's values: no rule of μP is applied. Make the plan for this target and apply it.",
        {
            Quantity.INITIAL: lambda e, _: 0.5 * math.log(e.width_ratio) if is_hidden(e) else 0.0,
            Quantity.LEARNING_RATE: lambda e, w: math.log(w.plan.lr * w.own_rate(e) / e.lr),
            Quantity.EPS: lambda e, w: 0.0 if e.eps is None else math.log(w.plan.adam_eps / e.eps),
            Quantity.WEIGHT_DECAY: lambda e, w: (
                log_of(w.plan.weight_decay) - log_of(e.weight_decay) if is_matrix(e) else 0.0
            ),
        },
        at,
    )
    readout, attention = at_readout(lambda w: math.log(w.r)), at_logits(root_of_head)

    def standard_forward(key: Key, width: int) -> float:
        here = at[width]
        return standard.predict(key, width) + readout(key, here) + attention(key, here)

    def overrides(key: Key, width: int) -> float:
        here = at[width]
        if key.quantity is Quantity.ACTIVATION:
            module = next((e for e in here.plan.entries if e.name == f"{key.name}.weight"), None)
            own = None if module is None else here.own(module)
            return 0.0 if own is None else -math.log(own.multiplier)
        entry = here.plan.by_name.get(key.name)
        own = None if entry is None else here.own(entry)
        if own is None or at_rest(key, here):
            return 0.0
        factor = {Quantity.LEARNING_RATE: own.lr_mult, Quantity.INITIAL: own.init_mult}.get(key.quantity, 1.0)
        return -math.log(factor) if factor > 0 else math.inf

    return [
        Hypothesis(standard.name, standard.sentence, standard_forward),
        of_weights(
            "one-width-ratio",
            "one ratio, of hidden sizes, is used for every tensor. Give each tensor the ratios of its own fan_in and "
            "fan_out: ffn, heads and key/value groups may grow otherwise than hidden_size.",
            {
                Quantity.INITIAL: lambda e, w: 0.5 * math.log(e.width_ratio / w.r),
                Quantity.LEARNING_RATE: lambda e, w: math.log(e.width_ratio / w.r),
                Quantity.EPS: lambda e, w: math.log(w.r_out(e) / w.r),
                Quantity.WEIGHT_DECAY: lambda e, w: exponent * math.log(w.r / e.width_ratio),
            },
            at,
            is_hidden,
        ),
        Hypothesis(
            "overrides-dropped",
            "the recipe's per_parameter is not applied. Pass it on with the recipe.",
            overrides,
        ),
    ]
