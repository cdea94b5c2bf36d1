"""Steps beyond those of a quick check: one narrow model trains on, and what its optimizer did is held against the plan.

No reference is needed for that: what a learning rate, an eps and a weight decay have to be, plan and schedule say. So a
schedule that goes wrong in a second phase, or a group that somebody changes later, shows for the price of one run.
"""

import math
from collections.abc import Callable, Collection, Mapping

from mup_megatron.check.measure.measurements import Key, MeasuredRun, Quantity, RunProtocol
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.comparison import TOLERANCES, Compared, Finding, Mismatch, Slope, without_gradient
from mup_megatron.check.verdict.verdict import CheckOutcome, Section
from mup_megatron.theory import Plan

LATER = RunProtocol(steps=48, recorded=(12, 16, 20, 24, 28, 32, 36, 40, 44, 48), spectral=False, activations=False)
_MOST = 2.5
"""So many times the tolerance of several runs, for one of them."""
_LEAST_DECAY = 0.3
"""Of the largest weight decay: what is less acts too little beside the rest to be read from one run."""


def width_of(plans: Mapping[int, Plan]) -> int:
    """The narrowest width at which a plan gives parameters different learning rates, so that their ratios show."""
    apart = (width for width in sorted(plans) if len({entry.lr for entry in plans[width].entries}) > 1)
    return next(apart, min(plans))


def later_section(
    run: MeasuredRun,
    plan: Plan,
    schedule: Callable[[int], float],
    rounding: Collection[str],
    untrained: Collection[str] = (),
) -> tuple[Section, Cause | None]:
    """Returns the section of what one run shows of later steps, and its cause.

    Args:
        run: of the subject, as `LATER` has it.
        plan: the right one at its width.
        schedule: step, from 0 → the learning rate's part of its peak.
        rounding: parameters of which nothing can be read.
        untrained: those that get no gradient in the correct reference. Where they get none here either, they stay.
    """
    found = []
    still = without_gradient([run]) & set(untrained)
    most = max(entry.weight_decay for entry in plan.entries)
    for key, value in run.values.items():
        entry = plan.by_name.get(key.name)
        if entry is None or key.name in rounding or key.name in still or key.step < min(LATER.recorded):
            continue
        if key.quantity is Quantity.LEARNING_RATE:
            expected = entry.lr * schedule(key.step - 1)
        elif key.quantity is Quantity.WEIGHT_DECAY and entry.weight_decay > _LEAST_DECAY * most:
            expected = entry.weight_decay
        else:
            continue
        room = _MOST * TOLERANCES[key.quantity].level
        if expected > 0 and abs(math.log(max(value, 1e-9 * expected) / expected)) > room:
            found.append(_finding(run.width, key, value, expected))
    found.sort(key=lambda finding: (finding.key.step, finding.key.quantity is not Quantity.LEARNING_RATE))
    told = (
        f"learning rate and weight decay of {len(plan.entries) - len(still)} parameters to step {LATER.steps} at width "
        f"{run.width}"
    )
    outcome = CheckOutcome.FAIL if found or run.problem else CheckOutcome.PASS
    lines = (run.problem or told,)
    return Section(name="later steps", outcome=outcome, lines=lines, findings=tuple(found)), _cause(found)


def _finding(width: int, key: Key, value: float, expected: float) -> Finding:
    level = math.log(max(value, 1e-9 * expected) / expected)
    flat = Slope(0.0, 0.0)
    return Finding(
        Compared(key, flat, flat, 0.0, 0.0, level, 0.0, {width: level}, value, Mismatch.LEVEL), Mismatch.LEVEL
    )


def _cause(found: list[Finding]) -> Cause | None:
    if not found:
        return None
    first = found[0]
    sentence = (
        f"{first.key.name}: its {first.key.quantity} is right for the first steps, and {first.compared.factor:.3g} "
        f"times the plan's by step {first.key.step}. Look for a second phase of the schedule, and for what sets the "
        "groups' values later: each group has its own, at every step."
    )
    return Cause("later-steps", sentence, first.key.name, 1.0)
