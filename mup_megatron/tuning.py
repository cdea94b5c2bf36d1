"""Tuning joins search and training: a trial is a training of the proxy, and the best one becomes a recipe.

Knows neither how trials are run (`search/`) nor what the hyperparameters do (`theory/`).
"""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file
from mup_megatron.errors import InputError
from mup_megatron.recipe import Hyperparameters, Recipe, recipe
from mup_megatron.search import (
    ReportFn,
    Selection,
    Space,
    StudyRecord,
    TrialOutcome,
    default_storage,
    find_study,
    read_study,
)
from mup_megatron.search.space import SearchRange
from mup_megatron.training.options import TrainingOptions, require_possible
from mup_megatron.validation import Strict, plain, validated

SEARCHABLE = tuple(
    key for key, field in Hyperparameters.model_fields.items() if field.is_required() or type(field.default) is float
)
"""What a space may name."""

DEFAULT_SPACE = Space(
    {
        "lr": SearchRange(1e-4, 1e-1, log=True),
        "init_method_std": SearchRange(0.002, 0.2, log=True),
        "embedding_multiplier": SearchRange(0.1, 10.0, log=True),
        "attention_multiplier": SearchRange(0.25, 4.0, log=True),
        "output_multiplier": SearchRange(0.25, 4.0, log=True),
    }
)
"""What TP5 searched for GPT-3 6.7B; the same as configs/spaces/gpt3_6.7b.yaml."""

_RUN_KEYS = ("train_iters", "global_batch_size", "micro_batch_size", "seed", "eval_iters", "split", "bf16")
"""The options on which a trial's loss depends."""


@dataclass(frozen=True, kw_only=True)
class ProxyTraining:
    """The objective of a search: trains the proxy with a trial's hyperparameters; the loss is the validation loss."""

    proxy: ModelFile
    fixed: Mapping[str, Any]
    """A recipe's content without its base: what is not searched."""
    data: Path
    data_sha256: str | None
    options: TrainingOptions

    def recipe(self, parameters: Mapping[str, float]) -> Recipe:
        """Returns the recipe of a trial: the proxy is its base."""
        return _recipe(self.proxy.model_dump(mode="json"), self.fixed, parameters, source="trial")

    def require_possible(self, space: Space, *, source: str) -> None:
        """Refuses what every trial, or a trial somewhere in the space, would refuse: before there is a study of it.

        Looks at the corners of the space: hyperparameters have bounds and an order, and nothing else can be wrong.

        Raises:
            InputError: names what is wrong; `source` is what the space is called.
        """
        base = self.proxy.model_dump(mode="json")
        bounds = [(each.low, each.high) for each in space.ranges.values()]
        for corner in itertools.product(*bounds):
            made = _recipe(base, self.fixed, dict(zip(space.ranges, corner, strict=True)), source=source)
        made.plan(self.proxy)
        require_possible(self.proxy, made, self.options, world_size=1)

    def context(self) -> dict[str, Any]:
        """Returns what must stay the same while a study goes on."""
        options = asdict(self.options)
        return {
            "proxy": plain(self.proxy),
            "fixed": dict(self.fixed),
            "data": {"name": self.data.name, "sha256": self.data_sha256},
            "training": {key: options[key] for key in _RUN_KEYS},
        }

    def __call__(self, parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        """Runs one trial, in a process of its own."""
        from mup_megatron.megatron.versions import installed
        from mup_megatron.training.train import run_training

        result = run_training(self.proxy, self.recipe(parameters), self.data, self.options, report=report)
        return TrialOutcome(
            loss=result.validation_loss,
            diverged=result.status == "diverged",
            reason=result.reason,
            metrics={
                "train_loss": result.train_loss,
                "iterations": result.iterations,
                "tokens": result.tokens,
                "versions": installed(),
            },
        )


def _recipe(
    base: Mapping[str, Any], fixed: Mapping[str, Any], parameters: Mapping[str, float], *, source: str
) -> Recipe:
    hyperparameters = {**fixed.get("hyperparameters", {}), **parameters}
    return recipe({**fixed, "base": base, "hyperparameters": hyperparameters}, source=source)


def fixed_content(given: Recipe | None) -> dict[str, Any]:
    """Returns what a search leaves alone: a recipe's content without its base; every default without a recipe."""
    if given is None:
        return {}
    if given.horizon is not None:
        raise InputError(
            "--recipe: horizon moves its values to another run, and a search tunes at its own. Take horizon out; "
            "`transfer` puts it into what is found."
        )
    return plain(given, exclude=("base", "training", "provenance"))


@dataclass(frozen=True)
class SearchSetup:
    """The hyperparameters that a study varies, and what it leaves alone."""

    space: Space
    fixed: Mapping[str, Any]
    """A recipe's content without its base."""
    selection: Selection | None = None
    """The trials of another study that are run, and no others. Its space and what it left alone are the two above."""


def best_of(
    other: str, count: int, *, study: str, storage: str | None, proxy: ModelFile, accept_unfinished: bool
) -> SearchSetup:
    """Selects the best trials of one study for another: all that they depend on but data and length of the run.

    Once that study exists, it keeps the trials that it was made of, whatever has become of the other one.

    Args:
        other: the name of the study that has the trials.
        count: how many.
        study: the name of the one that is to run them.
        storage: of both; None: each has its default.
        proxy: what is to be trained.
        accept_unfinished: whether to choose although trials of the other have no result yet.

    Raises:
        InputError: as `read_study` and `select_best`; the other study's proxy is not this one, or it is the same study.
    """
    if other == study:
        raise InputError(f"--of {other}: the same as --study. Give the new study another name.")
    made = find_study(storage or default_storage(study), study)
    if made is not None and made.spec.selection is not None and made.spec.selection.study == other:
        selection = made.spec.selection
        if len(selection.candidates) != count:
            raise InputError(
                f"--best {count}: study {study!r} was made of the best {len(selection.candidates)} of {other!r}. Give "
                "that number to go on with it, or another name with --study."
            )
        return SearchSetup(made.spec.space, made.spec.context["fixed"], selection)
    found = read_study(storage or default_storage(other), other)
    context = _sweep_context(found, _ModelContext, flag="--of")
    before, now = context["proxy"], plain(proxy)
    if before != now:
        differing = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        raise InputError(
            f"--of {other}: that study trained another model ({', '.join(differing)} differ), and hyperparameters "
            "belong to the shape they were tuned at. Give the model file of that study."
        )
    return SearchSetup(
        found.spec.space, context["fixed"], found.select_best(count, accept_unfinished=accept_unfinished)
    )


class _Training(Strict):
    """The part of a run's options that a study records."""

    model_config = ConfigDict(extra="ignore")

    train_iters: Annotated[int, Field(gt=0)]
    global_batch_size: Annotated[int, Field(gt=0)]


class _ModelContext(Strict):
    """Holds what `ProxyTraining.context` gives a study of the model and of what is not searched."""

    model_config = ConfigDict(extra="ignore")

    proxy: dict[str, Any]
    fixed: dict[str, Any]

    @model_validator(mode="after")
    def _of_a_recipe(self) -> "_ModelContext":
        if not isinstance(self.fixed.get("hyperparameters", {}), dict):
            raise ValueError("fixed.hyperparameters: no keys and values. Restore the database.")
        return self


class _SweepContext(_ModelContext):
    """All that it gives a study."""

    data: dict[str, str | None]
    training: _Training


def _sweep_context(study: StudyRecord, kind: type[_ModelContext], *, flag: str) -> Mapping[str, Any]:
    """Returns what a study of `mup-megatron sweep` says of its trials, as far as `kind` asks for it."""
    source = f"study {study.spec.name!r}"
    if "proxy" not in study.spec.context:
        raise InputError(f"{source} was not made by `mup-megatron sweep`. Choose another with {flag}.")
    validated(kind, study.spec.context, source=source)
    model_file(study.spec.context["proxy"], source=f"{source}: proxy")
    return study.spec.context


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


def transferred(study: StudyRecord, to: TargetRun | None = None) -> Recipe:
    """Returns the best trial of a study as a recipe, with its provenance.

    Args:
        study: of `mup-megatron sweep`.
        to: the run that its values are to be moved to, if to any. The recipe has them as tuned, with a note of it, and
            the horizon that moves them.

    Raises:
        InputError: no trial is complete, the study is not one of `mup-megatron sweep`, or the rule does not go with it.
    """
    best = study.require_best()
    context = _sweep_context(study, _SweepContext, flag="--study")
    selection = study.spec.selection
    chosen = None if selection is None else selection.at(best.slot)
    training = context["training"]
    source = f"study {study.spec.name!r}"
    found = _recipe(context["proxy"], context["fixed"], best.parameters, source=source)
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
                **({} if to is None else {"tuned": {key: before for key, (before, _) in moved.moves.items()}}),
                "data": context["data"],
                "tokens_per_trial": best.metrics.get("tokens"),
                "versions": best.metrics.get("versions", {}),
            },
        },
        source=source,
    )
