"""Mistakes about experts and what chooses them."""

import math
from collections.abc import Mapping

from mup_megatron.check.entries import is_of_experts, is_residual, is_router
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis, as_if_wider, of_weights, ratio_of_hidden_size
from mup_megatron.theory import PlanEntry


def experts(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Sizes, shares and roles that are another's; none of a model without experts."""
    some = next(iter(at.values()))
    if not any(map(is_of_experts, some.plan.entries)):
        return []

    def writes(entry: PlanEntry) -> bool:
        return is_of_experts(entry) and is_residual(entry)

    return [
        as_if_wider(
            "experts-by-width",
            "fc2 of experts follows hidden_size. Give it the ratio of one expert's own ffn, 1 where that is fixed.",
            at,
            writes,
            ratio_of_hidden_size,
        ),
        as_if_wider(
            "experts-by-total",
            "fc2 of experts follows the ffn of all experts together. Give it the ratio of one expert's own ffn.",
            at,
            writes,
            lambda _, here: here.log_of_experts,
        ),
        of_weights(
            "router-hidden",
            "the router starts as a hidden weight. Draw it as an output, σ/r_in, or let the recipe say router: hidden.",
            Quantity.INITIAL,
            at,
            lambda e: is_router(e) and e.init_std is not None,
            lambda e, _: 0.5 * math.log(e.width_ratio),
        ),
        of_weights(
            "experts-eps",
            "Adam's eps of experts does not follow their share of the tokens. Multiply it by the ratio of k/E.",
            Quantity.EPS,
            at,
            lambda e: is_of_experts(e) and e.eps is not None,
            lambda e, here: -here.log_share(e),
        ),
    ]
