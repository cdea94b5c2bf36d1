"""Mistakes about what is narrow inside of a model: latents, and every side that keeps its size."""

import math
from collections.abc import Mapping

from mup_megatron.check.entries import is_hidden, is_residual
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis, as_if_wider, of_weights, ratio_of_hidden_size
from mup_megatron.theory import PlanEntry


def latents(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Returns mistakes about what leads away from a narrow place, and about what leads to it."""

    def narrowing(entry: PlanEntry, here: AtWidth) -> float:
        return -0.5 * math.log(entry.width_ratio) if here.r_out(entry) == 1.0 else 0.0

    return [
        as_if_wider(
            "latent-by-width",
            "what reads a latent, or another narrow side, follows hidden_size. Give it the ratio of its own fan_in, 1 "
            "where that is fixed.",
            at,
            lambda e: is_hidden(e) and not is_residual(e),
            ratio_of_hidden_size,
        ),
        of_weights(
            "bottleneck-init",
            "what leads to a side of a fixed size is drawn as an output, σ/r_in. It is hidden: draw it with σ/√r_in.",
            Quantity.INITIAL,
            at,
            is_hidden,
            narrowing,
        ),
    ]
