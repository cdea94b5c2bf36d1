"""Ratios between the learning rates of groups: the check of a running engine, and when two ratios are one."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mup_megatron.deepspeed.guard import CLOSE

SAME = 1e-7
"""Relative difference of numbers that somebody wrote: what is accepted passes the live check."""

NEGLIGIBLE = 1e-12
"""Part of a group's peak below which a learning rate is rounding, left where a decay to 0 cancels."""


def is_proportional(values: Sequence[float], peaks: Sequence[float]) -> bool:
    """Says if there is one value for each group, all of them the same part of their peaks."""
    if len(values) != len(peaks):
        return False
    factors = [value / peak for value, peak in zip(values, peaks, strict=True)]
    return all(math.isclose(factor, factors[0], rel_tol=SAME, abs_tol=NEGLIGIBLE) for factor in factors)


def as_list(values: Sequence[Any]) -> str:
    """Returns learning rates as a list in Python's and JSON's terms."""
    return f"[{', '.join(f'{float(value):.9g}' for value in values)}]"


@dataclass(frozen=True, slots=True)
class RatioWatch:
    """Compares the groups' learning rates with their peaks. Made once, asked at every step."""

    plan_lr: float
    """The recipe's learning rate."""
    peak_lrs: Sequence[float]
    """Of this rank's groups, above 0."""

    def check(self, current_lrs: Sequence[Any]) -> str | None:
        """Names the group that is farthest off, and the likely cause; None if all are at one part of their peaks."""
        lrs = [float(lr) for lr in current_lrs]
        if len(lrs) != len(self.peak_lrs):
            return f"The optimizer has {len(lrs)} groups, and {len(self.peak_lrs)} were made from the plan."
        factors = [lr / peak for lr, peak in zip(lrs, self.peak_lrs, strict=True)]
        if not factors:
            return None
        common = statistics.median_low(factors)
        off = [i for i, factor in enumerate(factors) if not _is_close(factor, common)]
        if not off:
            return None
        flat = all(math.isclose(lr, lrs[0], rel_tol=CLOSE) for lr in lrs)
        if flat:
            common = lrs[0] / self.plan_lr
            cause = (
                "One learning rate was written into every group, as a scheduler does with one maximum for all of them, "
                "or set_lr() of DeepSpeed's optimizers."
            )
        elif len(off) == 1:
            cause = "Something set the learning rate of this group alone."
        else:
            cause = "A floor or a warm-up's start that is one number for all groups does that: give each group its own."
        worst = max(
            (i for i, factor in enumerate(factors) if not _is_close(factor, common)),
            key=lambda i: abs(factors[i] - common),
        )
        peak = self.peak_lrs[worst]
        return (
            f"param_groups[{worst}]: the learning rate should be {common * peak:.8g}, its peak {peak:.8g} times the "
            f"schedule's {common:.8g} (the recipe's {self.plan_lr:.8g} is at {common * self.plan_lr:.8g}), and is "
            f"{lrs[worst]:.8g}. {cause}"
        )


def _is_close(factor: float, other: float) -> bool:
    return math.isclose(factor, other, rel_tol=CLOSE, abs_tol=NEGLIGIBLE)
