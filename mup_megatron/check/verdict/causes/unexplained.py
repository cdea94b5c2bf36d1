"""The causes that are named where no hypothesis fits."""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.depth import unmultiplied
from mup_megatron.check.verdict.causes.observed import Observation
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.comparison import Compared, Comparison


def first_deviation(observed: Sequence[Observation], total: float) -> Cause:
    """Returns the first direct measurement that is off, whatever the reason."""
    first = next(o for o in observed if o.deviation != 0)
    key = first.key
    share = sum(o.weight * o.deviation**2 for o in observed if (o.key.quantity, o.key.name) == (key.quantity, key.name))
    if key.quantity is Quantity.ACTIVATION:
        what = "its output is off before any step, and its weights and input are not: look for a scale in this module"
    else:
        what = f"its {key.quantity} is the first thing that is off, and no known mistake explains all of it"
    return Cause("first-off", f"{key.name}: {what}.", key.name, share / total)


def indirect_cause(comparison: Comparison, at: Mapping[int, AtWidth]) -> Cause:
    """Returns the cause where weights, activations and the optimizer's numbers are right, and what follows is not."""
    off = [compared for compared in comparison.values() if compared.off is not None]
    missing = _without_rate(comparison, at)
    if missing:
        sentence = f"{missing[0]}: it has no gradient, so it is not trained. Look for requires_grad and detach."
        return Cause("not-trained", sentence, missing[0], 1.0)
    dead = [c for c in off if c.key.quantity is Quantity.DEAD]
    if dead:
        first = max(dead, key=lambda c: c.level)
        sentence = (
            f"{first.key.name}: rows of it have no gradient, up to {first.largest:.0%}. Look for detach, a mask, "
            "a hook, a backward pass that somebody wrote, as a fused attention's for queries and keys."
        )
        return Cause("gradient", sentence, first.key.name, 1.0)
    gradients = [c for c in off if c.key.quantity is Quantity.GRADIENT]
    if (cause := unmultiplied(comparison, at)) is not None:
        return cause
    norms = [c for c in off if c.key.quantity is Quantity.NORM]
    unclipped = next(iter(at.values())).recipe.moved.clip_grad == 0
    scaled = norms or (_alike(comparison, gradients) if unclipped and gradients else [])
    if scaled and (not gradients or _alike(comparison, gradients)):
        sentence = (
            f"gradients before clipping are {scaled[0].factor:.2g} times what they should be: look for micro-batches "
            "or ranks whose gradients are summed and not averaged, and for a factor on the loss. Clipping and Adam "
            "hide it but for eps and the threshold."
        )
        return Cause("gradients-scaled", sentence, scaled[0].key.name, 1.0)
    if gradients:
        return _of_gradients(comparison, gradients)
    first = min(off, key=lambda c: (c.key.step, -abs(c.level) - abs(c.slope)))
    name = first.key.name
    if first.key.quantity is Quantity.OVERLAP:
        what = "its weights keep another share of where they started: look for weight decay outside the optimizer"
    elif first.key.quantity is Quantity.LOSS:
        what = "the loss differs and nothing that it is computed from does: look for another loss or other data"
    else:
        what = (
            "it moves otherwise than its learning rate and gradient say. Look for what changes weights or activations "
            "between the optimizer's steps, and for noise in training: raise --seeds"
        )
    return Cause("training-differs", f"{name}: {what}.", name, 1.0)


def _without_rate(comparison: Comparison, at: Mapping[int, AtWidth]) -> list[str]:
    moving = {key.name for key in comparison if key.quantity in (Quantity.LEARNING_RATE, Quantity.GRADIENT)}
    known = {key.name for key in comparison if key.quantity is Quantity.INITIAL}
    plan = next(iter(at.values())).plan
    return [e.name for e in plan.entries if e.name in known and e.name not in moving] if moving else []


def _alike(comparison: Comparison, off: Sequence[Compared]) -> list[Compared]:
    """Returns the gradients of the first step with one that is off, if nearly all are off by one factor."""
    step = min(c.key.step for c in off)
    then = [c for key, c in comparison.items() if key.quantity is Quantity.GRADIENT and key.step == step]
    usual = median(c.level for c in then)
    alike = [c for c in then if abs(c.level - usual) < 0.25 * abs(usual)]
    return alike if len(then) > 1 and len(alike) > 0.8 * len(then) else []


def _of_gradients(comparison: Comparison, off: Sequence[Compared]) -> Cause:
    step = min(c.key.step for c in off)
    if alike := _alike(comparison, off):
        usual = median(c.level for c in alike)
        sentence = (
            f"all gradients are {math.exp(usual):.2g} times what they should be, and what they are taken "
            "of is right. Compare clip_grad with the recipe's; else look for a loss that is averaged otherwise."
        )
        return Cause("clipping", sentence, alike[0].key.name, 1.0)
    culprit = max((c for c in off if c.key.step == step), key=lambda c: abs(c.level) + abs(c.slope)).key.name
    sentence = (
        f"{culprit}: its gradient is off, and weights, activations and the optimizer's numbers are right. Look for "
        "what acts on gradients alone: detach, a hook, a custom backward, a reduction over ranks."
    )
    return Cause("gradient", sentence, culprit, 1.0)
