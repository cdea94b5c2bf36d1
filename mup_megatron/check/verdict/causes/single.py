"""Hypotheses that fit anything of their kind: one module, one layer, one tensor, the schedule, the optimizer."""

from collections.abc import Sequence
from statistics import fmean

from mup_megatron.check.measure.measurements import FROM_STEPS, Key, Quantity
from mup_megatron.check.measure.names import layer_of
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis, absorbing
from mup_megatron.check.verdict.causes.observed import DIRECT, GONE, Observation
from mup_megatron.check.verdict.causes.powers import QUANTITIES
from mup_megatron.theory import family_of

_SHORT = {quantity: short for quantity, short, *_ in QUANTITIES}
_LONG = {quantity: long.removeprefix("the ") for quantity, _, long, *_ in QUANTITIES}


def single_parts(observed: Sequence[Observation]) -> list[Hypothesis]:
    """One module, one layer, one kind of tensor, the schedule, the optimizer: whatever they have."""
    still = [o.key.name for o in observed if o.key.quantity is Quantity.LEARNING_RATE and o.deviation < GONE]
    sentence = "it does not move in training. Give it to the optimizer; look for requires_grad, filters on names."
    found = [
        Hypothesis("not-trained", f"{name}: {sentence}", absorbing({name}, FROM_STEPS), prior=0.99)
        for name in dict.fromkeys(still)
    ]
    for quantity in DIRECT:
        if quantity is Quantity.UNEXPLAINED:
            continue
        of_kind = [o for o in observed if o.key.quantity is quantity]
        off = list(dict.fromkeys(o.key.name for o in of_kind if o.deviation != 0))
        if not off:
            continue
        found += _of_tensors(quantity, off, {o.key.name for o in of_kind})
    found += _common_rate(observed)
    found += _other_optimizer(observed)
    return found


def _of_tensors(quantity: Quantity, off: Sequence[str], measured: set[str]) -> list[Hypothesis]:
    """By layer, where one layer is off and others are not; by tensor."""
    activation = quantity is Quantity.ACTIVATION
    what = "output" if activation else _LONG[quantity]
    found = []
    layers = {layer for name in off if (layer := layer_of(name)) is not None}
    # What no other layer has, as in a hybrid model, says nothing of the layer.
    kinds = {family_of(name) for name in off}
    with_such = {layer for name in measured if (layer := layer_of(name)) is not None and family_of(name) in kinds}
    if len(layers) == 1 and len(with_such) > 1 and not activation:
        [layer] = layers
        inside = [name for name in off if layer_of(name) == layer]
        found.append(
            Hypothesis(
                f"one-layer-{_SHORT[quantity]}",
                f"layer {layer} alone has another {what} ({_listed(inside)}). Look for what treats this layer by "
                "itself: a pattern of names, a range that ends one too early.",
                absorbing(inside, [quantity]),
                prior=0.97,
            )
        )
    families: dict[str, list[str]] = {}
    for name in off:
        families.setdefault(family_of(name), []).append(name)
    for names in families.values():
        siblings = [name for name in measured if family_of(name) == family_of(names[0])]
        where = "in every layer" if len(names) == len(siblings) > 1 else "and only there" if len(siblings) > 1 else ""
        if activation:
            sentence = (
                f"{names[0]}: its output is not what its weights and its input give, before any step{_also(where)}. "
                "Something in the model's forward pass multiplies it: look for a scale in this module."
            )
        else:
            sentence = f"{names[0]}: its {what} is not the plan's{_also(where)}. Look for what treats it by itself."
        name = "module-output" if activation else f"tensor-{_SHORT[quantity]}"
        found.append(Hypothesis(name, sentence, absorbing(names, [quantity]), prior=0.95))
    return found


def _also(where: str) -> str:
    return f", {where}" if where else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _common_rate(observed: Sequence[Observation]) -> list[Hypothesis]:
    """All learning rates are off alike, at some steps or at all."""
    groups: dict[tuple[int, int], list[float]] = {}
    for o in observed:
        if o.key.quantity is Quantity.LEARNING_RATE:
            groups.setdefault((o.key.step, o.width), []).append(o.deviation)
    means = {place: fmean(deviations) for place, deviations in groups.items()}
    if not any(means.values()):
        return []

    def predict(key: Key, width: int) -> float:
        return means.get((key.step, width), 0.0) if key.quantity is Quantity.LEARNING_RATE else 0.0

    sentence = "all learning rates are off by one factor: lr or the schedule is not the recipe's. Pass both on."
    return [Hypothesis("learning-rate-schedule", sentence, predict, prior=0.97)]


def _other_optimizer(observed: Sequence[Observation]) -> list[Hypothesis]:
    """Steps that no learning rate, eps and weight decay explain, so that what is read as these makes no sense."""
    names = dict.fromkeys(o.key.name for o in observed if o.key.quantity is Quantity.UNEXPLAINED and o.deviation != 0)
    if not names:
        return []
    sentence = (
        f"the steps of {_listed(list(names))} are not those of the recipe's optimizer: no learning rate, eps and "
        "weight decay explain them. Compare betas, momentum, and the kind of optimizer and of weight decay with the "
        "recipe's, and look for what treats parts of one tensor differently."
    )
    return [Hypothesis("optimizer-differs", sentence, absorbing(names, FROM_STEPS), prior=0.98)]
