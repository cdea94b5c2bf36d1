"""The cost of a search: FLOPs on each rung, and their share of the target's run."""

from dataclasses import dataclass
from typing import Any

from mup_megatron.architectures.cost import parameter_count, training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file
from mup_megatron.search import Ladder, StudyRecord
from mup_megatron.search.standing import standing
from mup_megatron.tuning.context import SweepContext, sweep_context
from mup_megatron.tuning.fidelities import settings_of

TOKENS_PER_PARAMETER = 20
"""Of a run whose number of tokens is not said."""


@dataclass(frozen=True)
class Target:
    """The run that a search is for."""

    model: ModelFile
    tokens: int | None = None

    @property
    def flops(self) -> float:
        """The cost of training it, by default on 20 tokens per parameter."""
        tokens = self.tokens or TOKENS_PER_PARAMETER * parameter_count(self.model)
        return tokens * training_flops(self.model).total


def whole_trial_cost(study: StudyRecord) -> float:
    """Returns the FLOPs of a trial of the proxy's whole run."""
    context = sweep_context(study, SweepContext, flag="--study")
    proxy, training = model_file(context["proxy"], source=f"study {study.spec.name!r}: proxy"), context["training"]
    tokens: int = training["train_iters"] * training["global_batch_size"] * proxy.seq_length
    return training_flops(proxy).total * tokens


def rung_names(ladder: Ladder) -> list[str]:
    """Returns what the rungs of a ladder of `ladder_for` are called where people read of them."""
    return [f"width {rung.hidden_size}, {rung.train_iters} steps" for rung in map(settings_of, ladder.rungs)]


def search_cost(study: StudyRecord, target: Target | None) -> dict[str, Any]:
    """Returns what a recipe's provenance says of the cost of its search: a trial that has a result counts as whole."""
    whole = whole_trial_cost(study)
    found = standing(study, cost=whole)
    spent = found.spent or 0.0
    cost: dict[str, Any] = {"flops": spent}
    if study.spec.ladder is not None:
        cost["rungs"] = [
            {
                "width": settings.hidden_size,
                "steps": settings.train_iters,
                "trials": rung.finished,
                "flops": rung.spent,
            }
            for rung, settings in zip(found.rungs, map(settings_of, study.spec.ladder.rungs), strict=True)
        ]
        cost["flops_of_whole_trials"] = study.spec.ladder.candidates * whole
    if target is not None:
        cost["share_of_target"] = spent / target.flops
    return cost
