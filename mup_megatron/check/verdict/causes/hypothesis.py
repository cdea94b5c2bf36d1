"""A hypothesis of a mistake: a prediction for every direct measurement."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mup_megatron.check.measure.measurements import Key, Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.theory import PlanEntry

ANY = math.nan
"""A prediction that takes whatever is there."""


Predict = Callable[[Key, int], float]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A mistake and what it would look like."""

    name: str
    sentence: str
    predict: Predict
    """(key, width) → log deviation; ±inf for what is gone or has arisen, NaN for whatever is there."""
    prior: float = 1.0
    """Below 1 for what fits anything of its kind: a mistake that says more comes first."""


Select = Callable[[PlanEntry], bool]
LogFactor = Callable[[PlanEntry, AtWidth], float]


def of_weights(
    name: str,
    sentence: str,
    quantity: Quantity | Mapping[Quantity, LogFactor],
    at: Mapping[int, AtWidth],
    select: Select = lambda _: True,
    factor: LogFactor = lambda _e, _w: 0.0,
) -> Hypothesis:
    """About parameters; the same at all steps at which there is a learning rate."""
    factors = quantity if isinstance(quantity, Mapping) else {quantity: factor}

    def predict(key: Key, width: int) -> float:
        here = at[width]
        entry = here.plan.by_name.get(key.name)
        if key.quantity not in factors or entry is None or not select(entry) or at_rest(key, here):
            return 0.0
        return factors[key.quantity](entry, here)

    return Hypothesis(name, sentence, predict)


def as_if_wider(
    name: str, sentence: str, at: Mapping[int, AtWidth], select: Select, log_ratio: LogFactor
) -> Hypothesis:
    """Returns the mistake of a fan_in that is so many times as large relative to the base's."""
    exponent = next(iter(at.values())).recipe.parametrization.weight_decay_exponent
    factors: Mapping[Quantity, LogFactor] = {
        Quantity.INITIAL: lambda e, w: -0.5 * log_ratio(e, w),
        Quantity.LEARNING_RATE: lambda e, w: -log_ratio(e, w),
        Quantity.WEIGHT_DECAY: lambda e, w: exponent * log_ratio(e, w),
    }
    return of_weights(name, sentence, factors, at, select)


def ratio_of_hidden_size(entry: PlanEntry, here: AtWidth) -> float:
    """Returns how much more the hidden size grows than a weight's own fan_in: the logarithm."""
    return math.log(here.r / entry.width_ratio)


def at_rest(key: Key, at: AtWidth) -> bool:
    """Returns whether it is a learning rate of 0: of the first step of a warm-up."""
    return key.quantity is Quantity.LEARNING_RATE and key.step == 1 and at.recipe.schedule.lr_warmup_fraction > 0


def log_of(value: float) -> float:
    """Logarithm of a factor; 0 for none."""
    return math.log(value) if value > 0 else 0.0


def absorbing(names: Iterable[str], quantities: Sequence[Quantity]) -> Predict:
    """Whatever these have."""
    chosen = frozenset(names)
    return lambda key, _: ANY if key.quantity in quantities and key.name in chosen else 0.0
