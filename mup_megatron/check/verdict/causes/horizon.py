"""Mistakes in how values were moved from the tuning's batch and tokens to the target's."""

import math
from collections.abc import Mapping

from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis, of_weights
from mup_megatron.theory import Factors


def horizon(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Returns a rule that is applied twice, or to a part of the values; none where a recipe moves nothing."""
    factors = next(iter(at.values())).recipe.factors
    if factors == Factors():
        return []

    def moved(name: str, sentence: str, f: Factors) -> Hypothesis:
        return of_weights(
            name,
            sentence,
            {
                Quantity.LEARNING_RATE: lambda _e, _w: math.log(f.lr),
                Quantity.EPS: lambda e, _: 0.0 if e.eps is None else math.log(f.eps),
                Quantity.WEIGHT_DECAY: lambda e, _: math.log(f.weight_decay) if e.weight_decay > 0 else 0.0,
            },
            at,
        )

    return [
        moved(
            "horizon-twice",
            "all values are moved by the recipe's horizon twice. Give the run the plan's values, or the recipe the "
            "tuned ones.",
            factors,
        ),
        moved(
            "horizon-decay-only",
            "the recipe's horizon has moved the weight decay alone, and the rule moves learning rate or eps as well. "
            "Take all of them from the recipe.",
            Factors(lr=1 / factors.lr, eps=1 / factors.eps),
        ),
    ]
