"""Optuna's samplers as a study uses them: what a trial draws depends on its slot, of TPE on earlier trials as well."""

import random
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from mup_megatron.search.study import StudySpec


class _GivenSampler(optuna.samplers.BaseSampler):
    """Hyperparameters that are known, whichever trials came before."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = values

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        assert isinstance(param_distribution, FloatDistribution)
        return self._values[param_name]


def given(values: Mapping[str, float]) -> optuna.samplers.BaseSampler:
    """Returns a sampler that draws these hyperparameters."""
    return _GivenSampler(values)


def sampler_of(spec: StudySpec, slot: int) -> optuna.samplers.BaseSampler:
    """Returns the sampler of one slot of a study, on the lowest rung of its ladder if it has one."""
    if spec.sampler != "tpe":
        return _GivenSampler(spec.at(slot))
    seed = random.Random(f"{spec.seed}/{slot}").getrandbits(32)
    # Trials that are still running count as bad ones, so that workers do not all try the same place.
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
