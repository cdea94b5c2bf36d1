"""Everything direct that is measured, in causal order, without what only follows from something else that is off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mup_megatron.architectures.measured import Kind
from mup_megatron.check.measure.measurements import FROM_STEPS, Key, Quantity
from mup_megatron.check.measure.names import layer_of
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.comparison import Compared, Comparison

CAP = 3.0
"""Of log deviations: what is 0 and should not be, or the reverse, is not infinitely more than all the rest."""
GONE = -2.0
"""A log deviation that only a value of about 0 has."""


DIRECT = (Quantity.INITIAL, Quantity.ACTIVATION, *FROM_STEPS)
"""In causal order."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A direct measurement at one width: how far it is off."""

    key: Key
    width: int
    deviation: float
    """0 for what seeds and tolerance allow."""
    weight: float
    """So that what is measured at many steps counts once."""


def observed_of(comparison: Comparison, at: Mapping[int, AtWidth]) -> list[Observation]:
    """Everything direct, in causal order, without what only follows from something else that is off."""
    here = next(iter(at.values()))
    keys = [key for key in comparison if key.quantity in DIRECT and not _follows(key, comparison, here)]
    steps: dict[tuple[Quantity, str], int] = {}
    for key in keys:
        steps[key.quantity, key.name] = steps.get((key.quantity, key.name), 0) + 1
    order = {entry.name: index for index, entry in enumerate(here.plan.entries)}

    def causal(key: Key) -> tuple[int, tuple[int, ...], str, int]:
        activation = key.quantity is Quantity.ACTIVATION
        place = _forward_place(key.name, here) if activation else (order.get(key.name, len(order)),)
        return DIRECT.index(key.quantity), place, key.name, key.step

    return [
        Observation(key, width, _deviation(comparison[key], width), 1 / steps[key.quantity, key.name])
        for key in sorted(keys, key=causal)
        for width in at
        if width in comparison[key].deviations
    ]


def _deviation(compared: Compared, width: int) -> float:
    return 0.0 if compared.off is None else capped(compared.deviations[width])


def capped(deviation: float) -> float:
    """Within ± `CAP`."""
    return max(-CAP, min(CAP, deviation))


def _follows(key: Key, comparison: Comparison, here: AtWidth) -> bool:
    """Returns whether an activation that is off may be so because of what it is computed from."""
    if key.quantity is not Quantity.ACTIVATION:
        return False
    if key.step != 0:
        return True
    if comparison[key].off is None:
        return False
    inputs = [Key(Quantity.ACTIVATION, name, 0) for name in _computed_from(key.name, here)]
    weights = [Key(Quantity.INITIAL, name, 0) for name in _weights_of(key.name, here)]
    before = [comparison[k] for k in (*inputs, *weights) if k in comparison and comparison[k].off is not None]
    if _is_gone(comparison[key]):
        # A nothing needs a nothing to follow from.
        return any(_is_gone(compared) for compared in before)
    return bool(before)


def _is_gone(compared: Compared) -> bool:
    return compared.off is not None and max(compared.deviations.values()) < GONE


def _forward_place(name: str, here: AtWidth) -> tuple[int, ...]:
    """When the forward pass comes by a module: by the architecture, or of a torch module by the layer that it is in."""
    if here.measured:
        return (list(here.measured).index(name) if name in here.measured else len(here.measured),)
    layer = layer_of(name)
    if layer is not None:
        return (1, layer)
    entries = [entry for entry in here.plan.entries if entry.module == name]
    return (0,) if any(entry.is_embedding for entry in entries) else (2,)


def _computed_from(name: str, here: AtWidth) -> tuple[str, ...]:
    """Returns the activations that an activation is computed from, as far as they are measured."""
    return here.measured[name].reads if name in here.measured else ()


def _weights_of(name: str, here: AtWidth) -> Sequence[str]:
    own = here.weights_of.get(name, ())
    if name in here.of_kind(Kind.READOUT) and not own and here.plan.readout is not None:
        return [here.plan.readout]
    return own
