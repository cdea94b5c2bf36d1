"""Numbers that the trials of a study give beside their fit: which hyperparameters matter, and how well rungs agree."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState

from mup_megatron.search.fit import LARGEST
from mup_megatron.search.study import StudyRecord, Trial

LEAST_FOR_IMPORTANCE = 20
"""Trials: PED-ANOVA compares the best tenth with all of them."""
LEAST_FOR_CORRELATION = 4
"""Candidates on both rungs."""
SHUFFLES = 20
"""Of the losses among the trials, for what chance alone would give."""
BY_CHANCE = 0.9
"""The part of the shuffles that has at most as much."""


@dataclass(frozen=True)
class Importance:
    """The share that a hyperparameter has, of all of them, in getting a trial among the best tenth."""

    share: float
    by_chance: float
    """Losses that have nothing to do with it give so much in one of ten cases."""


@dataclass(frozen=True)
class Agreement:
    """The likeness of two rungs' ranks of the candidates that are complete on both."""

    lower: int
    upper: int
    candidates: int
    correlation: float
    """Spearman's."""
    interval: tuple[float, float]
    """Holds it in nine of ten cases."""


def ended(record: StudyRecord, rung: int) -> list[tuple[Trial, float]]:
    """Lists the trials of a rung that have a result, with their losses; infinite where they diverged, or as good as."""
    return [
        (trial, math.inf if trial.loss is None or abs(trial.loss) > LARGEST else trial.loss)
        for trial in record.trials
        if trial.finished and record.rung_of(trial) == rung
    ]


def importances(record: StudyRecord) -> dict[str, Importance]:
    """Returns how much each hyperparameter matters, the most first; empty if there are too few trials.

    By PED-ANOVA on the lowest rung, where candidates are all over the space. Those that diverged count, as the worst.
    """
    trials = ended(record, 0)
    losses = [loss for _, loss in trials]
    if len(trials) < LEAST_FOR_IMPORTANCE or not any(math.isfinite(loss) for loss in losses):
        return {}
    ranks = _ranks(np.array(losses))
    names = list(record.spec.space.ranges)
    found = _shares(record, [trial for trial, _ in trials], ranks)
    draw = np.random.Generator(np.random.PCG64(0))
    shuffled = [_shares(record, [trial for trial, _ in trials], draw.permutation(ranks)) for _ in range(SHUFFLES)]
    chance = {name: float(np.quantile([each[name] for each in shuffled], BY_CHANCE)) for name in names}
    whole = sum(found.values()) or 1.0
    order = sorted(names, key=lambda name: -found[name])
    return {name: Importance(found[name] / whole, chance[name] / whole) for name in order}


def _shares(record: StudyRecord, trials: Sequence[Trial], values: NDArray[np.float64]) -> dict[str, float]:
    distributions: Mapping[str, optuna.distributions.BaseDistribution] = {
        name: FloatDistribution(bounds.low, bounds.high, log=bounds.log)
        for name, bounds in record.spec.space.ranges.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        study = _in_memory()
        study.add_trials(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE, params=dict(trial.parameters), distributions=dict(distributions), value=value
            )
            for trial, value in zip(trials, values.tolist(), strict=True)
        )
        return PedAnovaImportanceEvaluator().evaluate(study, list(distributions))


def _in_memory() -> optuna.Study:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it says where each study is made
    try:
        return optuna.create_study(direction="minimize")
    finally:
        optuna.logging.set_verbosity(before)


def agreements(record: StudyRecord) -> list[Agreement]:
    """Returns how each two rungs agree, those left out that have too few candidates in common."""
    ladder = record.spec.ladder
    found = []
    for lower, upper in itertools.combinations(range(0 if ladder is None else len(ladder.rungs)), 2):
        pairs = compared(record, lower, upper)
        if len(pairs) >= LEAST_FOR_CORRELATION:
            value = spearman(*(np.array(losses) for losses in zip(*pairs, strict=True)))
            found.append(Agreement(lower, upper, len(pairs), value, interval(value, len(pairs))))
    return found


def compared(record: StudyRecord, lower: int, upper: int) -> list[tuple[float, float]]:
    """Lists the losses on two rungs of the candidates that are complete on both."""
    assert record.spec.ladder is not None
    losses = [
        {record.spec.ladder.place(trial.slot)[1]: loss for trial, loss in ended(record, rung) if math.isfinite(loss)}
        for rung in (lower, upper)
    ]
    return [(losses[0][candidate], losses[1][candidate]) for candidate in sorted(losses[0]) if candidate in losses[1]]


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Returns the rank correlation of two lists; 0 where one of them has no order."""
    ranks = [_ranks(each) for each in (first, second)]
    if any(each.std() == 0 for each in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the place of each value, from 0; equal ones have the middle of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: NDArray[np.float64] = (ends - counts + ends - 1) / 2
    return middle[inverse]


def interval(correlation: float, count: int) -> tuple[float, float]:
    """Returns what holds the rank correlation of so many in nine of ten cases.

    By Fisher's z, with the variance that rank correlations have (Bonett and Wright 2000). Few may all be in the
    same order although the correlation is not 1: half a step less is taken for it.
    """
    most = 1 - 6 / (count * (count**2 - 1))
    correlation = max(-most, min(most, correlation))
    z = math.atanh(correlation)
    half = 1.645 * math.sqrt((1 + correlation**2 / 2) / max(1, count - 3))
    return math.tanh(z - half), math.tanh(z + half)
