"""Bounds that hold for every right model, whatever a reference shows: on measurements of the subject alone.

The reference of a torch module has the module's own code, so a mistake in that code shows in neither. But μP says how
activations follow width: before training not at all, but for what a readout gives, and for attention logits of heads
that grow; and training moves what blocks compute alike at all widths. Evaluation computes what training does. What
positions make of queries, and every number that is no weight, is the same at all widths. Draws are independent of each
other. What of these does not hold is named in the order in which a forward pass comes by it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from mup_megatron.check.entries import is_embedding, is_hidden, is_output_role, is_scalar_role
from mup_megatron.check.measure.measurements import (
    LOGITS,
    LOSS_INPUT,
    TURNING,
    WITHOUT_MEAN,
    Key,
    Measurements,
    Quantity,
)
from mup_megatron.check.verdict.comparison import CONFIDENCE, Compared, Finding, Mismatch, Slope, own_slopes, t_quantile
from mup_megatron.theory import Plan

Bounds = tuple[float, float]

BEFORE: Bounds = (-0.16, 0.16)
"""Slopes over width, before training, of what is computed anywhere but at a readout. What finite widths do by
themselves is within ±0.05 on most right models, and was -0.14 with certainty in one of a hundred; the least power of
width that anybody takes by mistake is ¼."""
BEFORE_READOUT: Bounds = (-0.65, 0.15)
"""Likewise of what a readout gives and what follows from it: -½ with a weight of its own, up to 0 with a tied one."""
MOVED: Bounds = (-0.5, 0.25)
"""Slopes of how far training moves what is computed inside of blocks. Neither may vanish nor grow in μP; a factor of
√width that the rules do not know makes ½. The room is for what finite widths do by themselves."""
MOVED_LOGITS: Bounds = (-0.9, 0.25)
"""Likewise of attention logits, which queries and keys start to move only after each other: at the widths of a check
their updates fall, the more so where heads grow."""
MOVED_READOUT: Bounds = (-0.9, 0.4)
"""Likewise of what a readout gives: its updates shrink at the widths of a check, in right models too."""
LOSS: Bounds = (-1.1, 0.1)
"""Slopes of the first loss. It may fall: what a readout gives before training does, and its square is in the loss."""
EVALUATION = 1e-3
"""Of what training computes: kernels differ by rounding, mistakes by a factor."""
POSITIONS = 0.03
"""Change of what positions make of queries over one e-fold of width. Of a hundred right models one has 0.02."""
TURNS = 0.004
"""Likewise of the angles by which positions turn queries, which are read exactly."""
TURNS_APART = 0.01
POSITIONS_APART = 0.04
"""And how far it may be from an independent reference's."""
ALIKE = 0.3
ROWS = 1.5
MEAN = 0.05
TAILS = 0.1
"""In the logarithm. A normal distribution that is cut at three standard deviations is within it."""
_LEAST = 512
"""Elements of a tensor, at least, of which the shape of a draw is looked at."""
SUMMED = 1.5
NORMAL = 3.0


@dataclass(frozen=True, kw_only=True)
class Known:
    """The facts about the models of a check."""

    plans: Mapping[int, Plan]
    """Width → the right plan."""
    shares_code: bool = False
    """Whether the reference computes with the subject's own code, so that nothing but bounds can tell it wrong."""
    blocks: Sequence[str] = ()
    """Modules that are blocks."""
    copying: Mapping[str, str] = field(default_factory=dict)
    """Modules that copy one layer into all of theirs → how their class is called."""
    growth: Callable[[str], float] = lambda _: 0.0
    """Name of logits → exponent of width with which their heads grow."""
    heads_grow: bool = False
    """Whether heads are larger in wider models, where that is not read from logits."""
    own_tails: Mapping[str, float] = field(default_factory=dict)
    """Of draws, as the model's library makes them; normal where nothing is said."""
    differing: Sequence[tuple[str, Mapping[int, float]]] = ()
    """Buffers of one shape and other content at other widths: name, and width → mean magnitude."""


def out_of_bounds(subject: Measurements, reference: Measurements, known: Known) -> list[Finding]:
    """Returns what does not hold, first what the forward pass comes by first.

    Args:
        subject: short runs, of which some may have broken off.
        reference: likewise.
        known: of the models.
    """
    place = _places(subject)

    def first(found: Iterable[Finding]) -> list[Finding]:
        return sorted(found, key=lambda f: (f.key.step, place(f.key.name)))

    forward = _positions(subject, reference, known)
    if known.shares_code:
        forward += _slopes_before(subject, known, place) + _slopes_after(subject, known, place)
    return [
        *_draws(subject, known),
        *_constants(subject, known),
        *first(forward),
        *first(_evaluation(subject)),
        *_summed(subject),
    ]


def _places(measured: Measurements) -> Callable[[str], float]:
    """Name → when the forward pass comes by it."""
    first = measured.runs[0].values
    names = [key.name for key in first if key.quantity is Quantity.ACTIVATION]
    order = {name: float(index) for index, name in enumerate(names)}
    order |= {key.name: value for key, value in first.items() if key.quantity is Quantity.PLACE}
    return lambda name: order.get(name.partition(",")[0], math.inf)


# ---- slopes --------------------------------------------------------------------------------------------------------


def _slopes_before(subject: Measurements, known: Known, place: Callable[[str], float]) -> list[Finding]:
    found = []
    at_readout = _at_readout(subject, known, place)
    readouts, latest = set(_readouts(known)), _latest(subject, known, place)
    # With biases of positions, as ALiBi's, logits grow with the number of heads.
    there = {(key.quantity, key.name) for key in subject.keys()}  # noqa: SIM118
    for quantity in (Quantity.ACTIVATION, Quantity.INSIDE):
        for key, compared in own_slopes(subject, quantity, 0).items():
            low, high = BEFORE
            if LOGITS in key.name:
                if (Quantity.INSIDE, f"{key.name}.{WITHOUT_MEAN}") in there:
                    continue
                growth = known.growth(key.name.removesuffix(f".{WITHOUT_MEAN}"))
                # Of heads that grow they stay with 1/√d, and shrink with 1/d: between the two.
                low, high = low - growth / 2, (-growth / 4 if growth else high)
                if latest(key.name) in readouts:
                    # A router's, or weights of a pool: one layer makes them, and no product of queries and keys.
                    low = BEFORE_READOUT[0]
            elif at_readout(key.name):
                low, high = BEFORE_READOUT
            if is_outside(compared.subject, low, high):
                found.append(_slope(compared, low, high))
    for compared in own_slopes(subject, Quantity.LOSS, 1).values():
        if is_outside(compared.subject, *LOSS):
            found.append(_slope(compared, *LOSS))
    return found


def _slopes_after(subject: Measurements, known: Known, place: Callable[[str], float]) -> list[Finding]:
    moved = [key.step for key in subject.keys() if key.quantity is Quantity.UPDATE]  # noqa: SIM118
    if not moved:
        return []
    found = []
    at_readout = _at_readout(subject, known, place)
    for key, compared in own_slopes(subject, Quantity.UPDATE, max(moved)).items():
        low, high = MOVED_READOUT if at_readout(key.name) else MOVED_LOGITS if LOGITS in key.name else MOVED
        if is_outside(compared.subject, low, high):
            found.append(_slope(compared, low, high))
    return found


def _at_readout(subject: Measurements, known: Known, place: Callable[[str], float]) -> Callable[[str], bool]:
    """Name → whether it is of a readout, or computed from one: in a module that has one, and after it."""
    plan = next(iter(known.plans.values()))
    readouts = _readouts(known)
    blocks = set(known.blocks)
    bottlenecks = {block for block in blocks if _is_bottleneck(block, plan)}
    beside = {key.name for key in subject.keys() if key.quantity is Quantity.INSIDE}  # noqa: SIM118

    def is_at(name: str) -> bool:
        if name.startswith(LOSS_INPUT) or any(
            name == readout or name.startswith(f"{readout}.") for readout in readouts if readout
        ):
            return True
        owner = name if place(name) == math.inf else _owner(name, beside, plan)
        inside = next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)
        if inside is not None and name.removeprefix(inside) in ("", ".added"):
            return inside in bottlenecks
        if plan.tied and inside is None and place(name) > _last_of_blocks(place, blocks):
            return True
        return any(place(r) < place(name) and (not owner or r.startswith(f"{owner}.")) for r in readouts if r)

    return is_at


def _readouts(known: Known) -> list[str]:
    """Modules that give something of a finite size."""
    plan = next(iter(known.plans.values()))
    readouts = [e.name.rpartition(".")[0] for e in plan.entries if is_output_role(e) or is_scalar_role(e)]
    if plan.readout is not None and not is_embedding(plan.by_name[plan.readout]):
        readouts.append(plan.readout.rpartition(".")[0])
    return readouts


def _latest(subject: Measurements, known: Known, place: Callable[[str], float]) -> Callable[[str], str | None]:
    """Name → the module that was done last before it is computed."""
    of_plan = {entry.name.rpartition(".")[0] for entry in next(iter(known.plans.values())).entries}
    modules = {key.name for key in subject.keys() if key.quantity is Quantity.ACTIVATION} & of_plan  # noqa: SIM118

    def latest(name: str) -> str | None:
        whole = name.removesuffix(f".{WITHOUT_MEAN}")
        return max((m for m in modules if place(m) < place(whole)), key=place, default=None)

    return latest


def _is_bottleneck(block: str, plan: Plan) -> bool:
    """Returns whether all that a block computes goes through a layer of a finite size, as in an adapter."""
    inside = [entry for entry in plan.entries if entry.name.startswith(f"{block}.")]
    return any(map(is_output_role, inside)) and not any(map(is_hidden, inside))


def _owner(name: str, beside: Collection[str], plan: Plan) -> str:
    """Returns the module that a module is in, or in which a value is computed: `block` of `block.summand.3` too.

    A function that is a module, as `nn.SiLU`, counts as a part of the one that it is in.
    """
    owner, _, last = name.rpartition(".")
    if name not in beside:
        return owner
    if last.isdigit():
        owner = owner.rpartition(".")[0]
    has_weights = any(entry.name.startswith(f"{owner}.") for entry in plan.entries)
    return owner if has_weights or not owner else owner.rpartition(".")[0]


def _last_of_blocks(place: Callable[[str], float], blocks: Iterable[str]) -> float:
    places = [place(block) for block in blocks]
    return max([p for p in places if p < math.inf], default=math.inf)


def is_outside(slope: Slope, low: float, high: float) -> bool:
    """Returns whether a slope certainly is: by twice its interval, as there are many of them."""
    return slope.value - 2 * slope.half_width > high or slope.value + 2 * slope.half_width < low


def _slope(compared: Compared, low: float, high: float) -> Finding:
    """Returns a slope that is not what it has to be."""
    expected, around = (low + high) / 2, (high - low) / 2
    return Finding(
        replace(
            compared,
            reference=Slope(expected, around),
            slope=compared.subject.value - expected,
            deviations=dict.fromkeys(compared.deviations, 0.0),
            off=Mismatch.SLOPE,
        ),
        Mismatch.SLOPE,
    )


# ---- values --------------------------------------------------------------------------------------------------------


def _bound(key: Key, values: Mapping[int, float], *, expected: float = 0.0) -> Finding:
    """Values that are not what they have to be."""
    mean = fmean(values.values())
    found, right = Slope(mean, 0.0), Slope(expected, 0.0)
    largest = max(values.values(), key=abs)
    compared = Compared(key, found, right, mean - expected, 0.0, largest, 0.0, values, largest, Mismatch.BOUND)
    return Finding(compared, Mismatch.BOUND)


def _by_width(measured: Measurements, key: Key) -> dict[int, list[float]]:
    found = {w: [run.values[key] for run in measured.at(w) if key in run.values] for w in measured.widths}
    return {width: values for width, values in found.items() if values}


def _keys(measured: Measurements, quantity: Quantity) -> list[Key]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(key for run in measured.runs for key in run.values if key.quantity is quantity))


def _evaluation(subject: Measurements) -> list[Finding]:
    found = []
    for key in _keys(subject, Quantity.EVALUATION):
        least = {width: min(values) for width, values in _by_width(subject, key).items()}
        if any(value > EVALUATION for value in least.values()):
            found.append(_bound(key, least))
    return found


def _positions(subject: Measurements, reference: Measurements, known: Known) -> list[Finding]:
    found = []
    logits = [key.name for key in _keys(subject, Quantity.ACTIVATION) if LOGITS in key.name]
    grow = known.heads_grow or any(map(known.growth, logits))
    expected = reference.keys()
    slopes = own_slopes(subject, Quantity.POSITION, 0, logarithms=False)
    rooms = {key: TURNS if key.name.startswith(TURNING) else POSITIONS for key in slopes}
    # Where heads grow frequencies lie closer, and their mean follows.
    follow = {
        key for key, compared in slopes.items() if not grow and is_outside(compared.subject, -rooms[key], rooms[key])
    }
    for key, compared in slopes.items():
        turns = key.name.startswith(TURNING)
        alike = [other for other in slopes if _how_far(other) == _how_far(key)]
        # What is drawn at random differs by chance in a layer or other; the code of positions is that of all layers.
        follows = key in follow and (turns or 2 * len(follow.intersection(alike)) > len(alike))
        most = TURNS_APART if turns else POSITIONS_APART
        apart = key in expected and _is_apart(_by_width(subject, key), _by_width(reference, key), most)
        if follows or apart:
            found.append(_bound(key, compared.deviations))
    return found


def _how_far(key: Key) -> str:
    """Returns the distance of two positions in a key's name."""
    return key.name.rpartition(", ")[2]


def _is_apart(subject: Mapping[int, Sequence[float]], reference: Mapping[int, Sequence[float]], most: float) -> bool:
    """Returns whether values certainly differ by more than is allowed, at all widths on average."""
    sides = [[values for width, values in side.items() if width in subject] for side in (subject, reference)]
    groups = [values for side in sides for values in side]
    freedom = max(1, sum(len(values) - 1 for values in groups))
    spread = math.sqrt(sum((v - fmean(values)) ** 2 for values in groups for v in values) / freedom)
    means = [fmean(fmean(values) for values in side) for side in sides]
    error = spread * math.sqrt(sum(1 / len(values) / len(side) ** 2 for side in sides for values in side))
    return abs(means[0] - means[1]) - t_quantile(1 - CONFIDENCE, freedom) * error > most


def _constants(subject: Measurements, known: Known) -> list[Finding]:
    found = [_bound(Key(Quantity.CONSTANT, name, 0), values) for name, values in known.differing if known.shares_code]
    for key in _keys(subject, Quantity.CONSTANT):
        values = {width: fmean(of_width) for width, of_width in _by_width(subject, key).items()}
        if max(values.values()) > min(values.values()) * (1 + 1e-6):
            found.append(_bound(key, values))
    return found


def _summed(subject: Measurements) -> list[Finding]:
    found = []
    for key in _keys(subject, Quantity.SUMMED):
        values = {width: fmean(of_width) for width, of_width in _by_width(subject, key).items()}
        if min(values.values()) > SUMMED:
            found.append(_bound(key, values, expected=1.0))
    return found


# ---- draws ---------------------------------------------------------------------------------------------------------


def _draws(subject: Measurements, known: Known) -> list[Finding]:
    widest = subject.widths[-1]
    plan = known.plans[widest] if widest in known.plans else next(iter(known.plans.values()))
    drawn = {e.name: e for e in plan.entries if e.init_std}
    found = []
    for quantity, most in ((Quantity.ALIKE, ALIKE), (Quantity.ROWS, ROWS)):
        for key in _keys(subject, quantity):
            least = min(_by_width(subject, key).get(widest, [0.0]))
            if key.name in drawn and least > most:
                found.append(_bound(key, {widest: least}))
    for name, entry in drawn.items():
        sizes = {w: math.prod(p.by_name[name].shape) for w, p in known.plans.items() if name in p.by_name}
        if math.prod(entry.shape) < _LEAST:
            continue
        mean = _pooled(subject, Key(Quantity.MEAN, name, 0), sizes)
        if mean is not None and abs(mean[0]) > max(MEAN, 6 / math.sqrt(mean[1])):
            found.append(_bound(Key(Quantity.MEAN, name, 0), {widest: mean[0]}))
        tails = _pooled(subject, Key(Quantity.TAILS, name, 0), sizes)
        allowed = {NORMAL, known.own_tails.get(name, NORMAL)}
        if tails is not None and tails[0] > 0:
            room = max(TAILS, 6 * math.sqrt(24 / tails[1]) / NORMAL)
            if all(abs(math.log(tails[0] / right)) > room for right in allowed):
                key = Key(Quantity.TAILS, name, 0)
                found.append(_bound(key, {widest: tails[0]}, expected=known.own_tails.get(name, NORMAL)))
    return found


def _pooled(measured: Measurements, key: Key, sizes: Mapping[int, int]) -> tuple[float, float] | None:
    """Returns the mean over runs, in which each counts as its elements; and how many these are."""
    of = [(value, sizes[width]) for width, vs in _by_width(measured, key).items() if width in sizes for value in vs]
    total = float(sum(size for _, size in of))
    return (sum(value * size for value, size in of) / total, total) if of else None
