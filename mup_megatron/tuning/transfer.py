"""The best trial of a study as a recipe, with its provenance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe, recipe
from mup_megatron.search import StudyRecord, fitted
from mup_megatron.tuning.context import SweepContext, sweep_context
from mup_megatron.tuning.cost import Target, search_cost
from mup_megatron.tuning.objective import recipe_of


@dataclass(frozen=True, kw_only=True)
class TargetRun:
    """The run that a recipe is moved to; what is None is as in the tuning."""

    rule: str
    tokens: int | None = None
    batch: int | None = None
    seq_length: int | None = None
    exponent: float | None = None

    def content(self, training: Mapping[str, int]) -> dict[str, Any]:
        """Returns it as a recipe's `horizon`."""
        tokens = training["train_iters"] * training["global_batch_size"] * training["seq_length"]
        own = {"rule": self.rule, "tokens": self.tokens or tokens, "batch": self.batch or training["global_batch_size"]}
        chosen = {"seq_length": self.seq_length, "exponent": self.exponent}
        return own | {key: value for key, value in chosen.items() if value is not None}


def transferred(
    study: StudyRecord, to: TargetRun | None = None, *, target: Target | None = None, accept_edge: bool = False
) -> Recipe:
    """Returns the best trial of a study as a recipe, with its provenance.

    Args:
        study: of `mup-megatron sweep`.
        to: the run that its values are to be moved to, if to any. The recipe has them as tuned, with a note of it, and
            the horizon that moves them.
        target: the run that the search was for; provenance then says its share of the cost.
        accept_edge: whether to return it although the optimum is at an edge of the space.

    Raises:
        InputError: no trial is complete, the study is not one of `mup-megatron sweep`, the rule does not go with it, or
            the best values are outside of the space.
    """
    best = study.require_best()
    context = sweep_context(study, SweepContext, flag="--study")
    fit = fitted(study)
    if fit is not None and fit.at_edges and not accept_edge:
        edges = ", ".join(f"{name} {study.spec.space.ranges[name].at(edge):.4g}" for name, edge in fit.at_edges.items())
        raise InputError(
            f"study {study.spec.name!r}: the loss still falls towards an edge of the space ({edges}). Search again "
            "with wider bounds under another --study, or add --accept-edge to take the best trial as it is."
        )
    selection = study.spec.selection
    chosen = None if selection is None else selection.at(best.slot)
    training = context["training"]
    source = f"study {study.spec.name!r}"
    found = recipe_of(context["proxy"], context["fixed"], best.parameters, source=source)
    states = [trial.state for trial in study.trials]
    tuning = {
        "train_iters": training["train_iters"],
        "global_batch_size": training["global_batch_size"],
        "seq_length": context["proxy"]["seq_length"],
    }
    there = {"training": tuning} | ({} if to is None else {"horizon": to.content(tuning)})
    moved = recipe({**found.model_dump(mode="json"), **there}, source=source)
    return recipe(
        {
            **moved.model_dump(mode="json"),
            "provenance": {
                "study": study.spec.name,
                "trial": best.number,
                "loss": best.loss,
                "trials": {state: states.count(state) for state in sorted(set(states))},
                "searched": study.spec.space.to_json(),
                "sampler": study.spec.sampler,
                "seed": study.spec.seed,
                **(
                    {}
                    if selection is None or chosen is None
                    else {
                        "selected_from": {
                            "study": selection.study,
                            "best": len(selection.candidates),
                            "trial": chosen.trial,
                            "loss": chosen.loss,
                        }
                    }
                ),
                **({} if to is None else _as_tuned(moved)),
                **({} if fit is None else {"fitted": fit.to_json()}),
                **({} if study.spec.ladder is None and target is None else {"cost": search_cost(study, target)}),
                "data": context["data"],
                "tokens_per_trial": best.metrics.get("tokens"),
                "versions": best.metrics.get("versions", {}),
            },
        },
        source=source,
    )


def _as_tuned(moved: Recipe) -> dict[str, Any]:
    """Returns what a recipe's horizon starts from, by which somebody's changes are noticed."""
    values = {key: before for key, (before, _) in moved.moves.items()}
    return {"tuned": values, "tuned_in": moved.training.model_dump()}
