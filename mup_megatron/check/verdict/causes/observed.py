"""Everything direct that is measured, in causal order, without what only follows from something else that is off."""

from collections.abc import Mapping
from dataclasses import dataclass

from mup_megatron.check.measure.measurements import FROM_STEPS, Key, Quantity
from mup_megatron.check.measure.names import layer_of
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.comparison import Compared, Comparison
from mup_megatron.theory import Plan

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
    plan = next(iter(at.values())).plan
    keys = [key for key in comparison if key.quantity in DIRECT and not _follows(key, comparison, plan)]
    steps: dict[tuple[Quantity, str], int] = {}
    for key in keys:
        steps[key.quantity, key.name] = steps.get((key.quantity, key.name), 0) + 1
    order = {entry.name: index for index, entry in enumerate(plan.entries)}

    def causal(key: Key) -> tuple[int, tuple[int, ...], str, int]:
        place = _forward_place(key.name) if key.quantity is Quantity.ACTIVATION else (order.get(key.name, len(order)),)
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


def _follows(key: Key, comparison: Comparison, plan: Plan) -> bool:
    """Whether an activation that is off may be so because of what it is computed from."""
    if key.quantity is not Quantity.ACTIVATION:
        return False
    if key.step != 0:
        return True
    if comparison[key].off is None:
        return False
    inputs = [Key(Quantity.ACTIVATION, name, 0) for name in _computed_from(key.name, plan)]
    weights = [Key(Quantity.INITIAL, name, 0) for name in _weights_of(key.name, plan)]
    before = [comparison[k] for k in (*inputs, *weights) if k in comparison and comparison[k].off is not None]
    if _is_gone(comparison[key]):
        # A nothing needs a nothing to follow from.
        return any(_is_gone(compared) for compared in before)
    return bool(before)


def _is_gone(compared: Compared) -> bool:
    return compared.off is not None and max(compared.deviations.values()) < GONE


_PLACES = (
    "input_layernorm",
    "linear_qkv",
    "q_layernorm",
    "k_layernorm",
    "scale_mask_softmax",
    "linear_proj",
    "pre_mlp_layernorm",
    "linear_fc1",
    "linear_fc2",
)
"""Of a layer's modules, in the order in which they are computed."""


def _forward_place(name: str) -> tuple[int, ...]:
    layer = layer_of(name)
    if layer is not None:
        last = name.rpartition(".")[2]
        return (1, layer, _PLACES.index(last) if last in _PLACES else len(_PLACES))
    if "embedding" in name:
        return (0, "word" not in name)
    return (2, "final" not in name)


def _computed_from(name: str, plan: Plan) -> list[str]:
    """The activations that a GPT's activation is computed from, as far as they are measured."""
    layer, last = layer_of(name), name.rpartition(".")[2]
    if layer is None:
        final = plan.readout_norm[0].rpartition(".")[0] if plan.readout_norm else ""
        if name == final:
            return [f"decoder.layers.{plan.num_layers - 1}"]
        return [final] if last == "output_layer" else []
    here = f"decoder.layers.{layer}"
    stream = [f"decoder.layers.{layer - 1}"] if layer else [f"embedding.{kind}_embeddings" for kind in _TABLES]
    attention, mlp = f"{here}.self_attention", f"{here}.mlp"
    qkv, proj = f"{attention}.linear_qkv", f"{attention}.linear_proj"
    return {
        "input_layernorm": stream,
        "linear_qkv": [f"{here}.input_layernorm"],
        "q_layernorm": [qkv],
        "k_layernorm": [qkv],
        "scale_mask_softmax": [qkv, f"{attention}.q_layernorm", f"{attention}.k_layernorm"],
        "linear_proj": [qkv, f"{attention}.core_attention.scale_mask_softmax"],
        "pre_mlp_layernorm": [*stream, proj],
        "linear_fc1": [f"{here}.pre_mlp_layernorm"],
        "linear_fc2": [f"{mlp}.linear_fc1"],
    }.get(last, [*stream, proj, f"{mlp}.linear_fc2"])


_TABLES = ("word", "position")


def _weights_of(name: str, plan: Plan) -> list[str]:
    own = [entry.name for entry in plan.entries if entry.name.rpartition(".")[0] == name]
    if name.rpartition(".")[2] == "output_layer" and not own and plan.readout is not None:
        return [plan.readout]
    return own
