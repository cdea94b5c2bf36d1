"""Hypotheses against observations: which explain most."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mup_megatron.check.verdict.causes.hypothesis import Hypothesis
from mup_megatron.check.verdict.causes.observed import GONE, Observation, capped

TOLD = 3
LEAST_SHARE = 0.15
"""What explains less is not told."""
NEAR = 0.25
"""Nor what explains so much less than the best, of the same."""
ARISEN = 1.0
"""A log deviation that something has which should be 0, at least."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A likely cause."""

    name: str
    """Stable, for programs: "learning-rate-collapsed"."""
    sentence: str
    """What it is, and what to do."""
    culprit: str
    """The parameter or activation where it shows first."""
    share: float
    """Of the deviation that it explains, 0 to 1."""


@dataclass(frozen=True, slots=True)
class _Explained:
    """A hypothesis against observations."""

    cause: Cause
    worth: float
    predicted: tuple[float, ...]


def likeliest(hypotheses: Sequence[Hypothesis], observed: Sequence[Observation], total: float) -> list[Cause]:
    """Returns the best; what explains the rest, if there is enough of it; else what explains nearly as much."""
    first = _ranked(hypotheses, observed, total)
    if not first or first[0].cause.share < LEAST_SHARE:
        return []
    told, rest, best = [first[0].cause], observed, first[0]
    while len(told) < TOLD:
        rest = [o for o, p in zip(rest, best.predicted, strict=True) if p == 0]
        further = _ranked(hypotheses, rest, total)
        if not further or further[0].cause.share < LEAST_SHARE:
            break
        best = further[0]
        told.append(best.cause)
    # What fits anything of its kind adds nothing to what fits as well and says why.
    exact = [e.cause for e in first if e.worth == e.cause.share]
    near = [cause for cause in exact if cause.share > max(LEAST_SHARE, told[0].share - NEAR)]
    names = [cause.name for cause in told]
    return [*told, *(cause for cause in near if cause.name not in names)][:TOLD]


def _ranked(hypotheses: Iterable[Hypothesis], observed: Sequence[Observation], total: float) -> list[_Explained]:
    """Best first, of each name the best. `total` is the squared deviation that shares are of."""
    squares = sum(o.weight * o.deviation**2 for o in observed)
    off = [o for o in observed if o.deviation != 0]
    found: dict[str, _Explained] = {}
    seen: list[tuple[float, ...]] = []
    for hypothesis in hypotheses:
        first = next((o for o in off if hypothesis.predict(o.key, o.width) != 0), None)
        if first is None:
            continue
        predicted = tuple(_resolved(hypothesis.predict(o.key, o.width), o.deviation) for o in observed)
        left = sum(o.weight * (o.deviation - p) ** 2 for o, p in zip(observed, predicted, strict=True))
        share = (squares - left) / total
        # Of two that predict the same, the first is told: the list of hypotheses goes from likely to unlikely.
        if share <= 0 or any(_alike(predicted, other) for other in seen):
            continue
        seen.append(predicted)
        cause = Cause(hypothesis.name, hypothesis.sentence, first.key.name, share)
        explained = _Explained(cause, share * hypothesis.prior, predicted)
        if cause.name not in found or found[cause.name].worth < explained.worth:
            found[cause.name] = explained
    return sorted(found.values(), key=lambda explained: -explained.worth)


def _resolved(predicted: float, deviation: float) -> float:
    if predicted == 0:
        return 0.0
    if math.isnan(predicted):
        return deviation
    if math.isinf(predicted):
        return min(deviation, GONE) if predicted < 0 else max(deviation, ARISEN)
    return capped(predicted)


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))
