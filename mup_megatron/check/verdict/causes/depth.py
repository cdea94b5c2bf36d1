"""Mistakes about depth, under a rule of it."""

import math
from collections.abc import Mapping
from statistics import median

from mup_megatron.architectures.measured import Kind
from mup_megatron.check.entries import is_any, is_residual, is_vector
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis, absorbing, of_weights
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.comparison import Comparison
from mup_megatron.theory import BRANCH, Acts, PlanEntry

_UNMULTIPLIED = (
    "what layers add to the residual stream has not the plan's multiplier, residual_multiplier times what the rule of "
    "depth says. Apply the plan to the model that is trained; look for layers built anew."
)
_NEAR = 0.25
"""Of the logarithm of a multiplier: what is so far from it is not it."""


def unmultiplied(comparison: Comparison, at: Mapping[int, AtWidth]) -> Cause | None:
    """Returns the cause where gradients in blocks, and they alone, lack the multiplier of branches.

    The stream itself hardly shows it where the embedding is most of it.
    """
    plan = next(iter(at.values())).plan
    expected = [-math.log(s.factor / s.stock) for s in map(plan.site, plan.places) if s.acts is Acts.BRANCH]
    gradients = [c for key, c in comparison.items() if key.quantity is Quantity.GRADIENT]
    if not any(expected) or not gradients:
        return None
    first = min(c.key.step for c in gradients)
    levels: dict[bool, list[float]] = {True: [], False: []}
    for compared in gradients:
        entry = plan.by_name.get(compared.key.name)
        if compared.key.step == first and entry is not None and not entry.is_embedding:
            levels[bool(entry.stack)].append(compared.level)
    if not all(levels.values()):
        return None
    found = median(levels[True]) - median(levels[False])
    if abs(found - median(expected)) > _NEAR * abs(median(expected)):
        return None
    culprit = next(place.module for place in plan.places if place.carries == BRANCH)
    return Cause("branch-multiplier", _UNMULTIPLIED, culprit, 1.0)


def depth(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Branches without their multiplier, and factors that are missing or count twice; none where depth has no rule."""
    some = next(iter(at.values()))
    found = []
    if any(some.plan.site(place).changes for place in some.plan.places if place.carries == BRANCH):
        # How far the stream is off follows from what else is in it: whatever it is, and before one module's output.
        found.append(
            Hypothesis(
                "branch-multiplier",
                _UNMULTIPLIED,
                absorbing(some.of_kind(Kind.STREAM), [Quantity.ACTIVATION]),
                prior=0.97,
            )
        )
    if all(stack.ratio == 1.0 for stack in some.plan.deepened.values()):
        return found

    def rate(entry: PlanEntry, here: AtWidth) -> float:
        stack = here.deepening(entry)
        return 0.0 if stack is None else -math.log(stack.lr)

    def eps(entry: PlanEntry, here: AtWidth) -> float:
        stack = here.deepening(entry)
        return 0.0 if stack is None or entry.eps is None else -math.log(stack.eps)

    def init(entry: PlanEntry, here: AtWidth) -> float:
        stack = here.deepening(entry)
        return 0.0 if stack is None else -0.5 * math.log(stack.ratio)

    return [
        *found,
        of_weights(
            "depth-init",
            "what writes into the residual stream starts with the target's 1/√(2L), and its branch is multiplied too: "
            "depth counts twice. Take the base's L.",
            Quantity.INITIAL,
            at,
            is_residual,
            init,
        ),
        of_weights(
            "depth-rates",
            "learning rates in blocks do not follow depth. Multiply them by m_L^(α−1).",
            Quantity.LEARNING_RATE,
            at,
            is_any,
            rate,
        ),
        of_weights(
            "depth-rates-of-vectors",
            "learning rates of norms and biases in blocks do not follow depth. Multiply them by m_L^(α−1) as well.",
            Quantity.LEARNING_RATE,
            at,
            is_vector,
            rate,
        ),
        of_weights(
            "depth-eps",
            "eps in blocks does not follow depth. Multiply it by m_L^−α, as the branches.",
            Quantity.EPS,
            at,
            is_any,
            eps,
        ),
    ]
