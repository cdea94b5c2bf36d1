"""The objective of a search: a training of the proxy, or of a narrower model with the proxy's hyperparameters."""

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.recipe import Hyperparameters, Recipe, recipe
from mup_megatron.search import Interruption, ReportFn, Space, TrialOutcome
from mup_megatron.search.space import SearchRange
from mup_megatron.training.options import TrainingOptions, require_possible
from mup_megatron.training.train import Stop, Stopped, run_training
from mup_megatron.validation import plain

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
    """With a project of Weights & Biases each trial that can be stopped is a run there, `output` the folder of all."""
    narrower: ModelFile | None = None
    """The model that is trained instead of the proxy, by the plan that the proxy's recipe makes for it."""

    @property
    def model(self) -> ModelFile:
        """The model that is trained."""
        return self.narrower or self.proxy

    def recipe(self, parameters: Mapping[str, float]) -> Recipe:
        """Returns the recipe of a trial: the proxy is its base."""
        return recipe_of(self.proxy.model_dump(mode="json"), self.fixed, parameters, source="trial")

    def require_possible(self, space: Space, *, source: str) -> None:
        """Refuses what every trial, or a trial somewhere in the space, would refuse: before there is a study of it.

        Looks at the corners of the space: hyperparameters have bounds and an order, and nothing else can be wrong.

        Raises:
            InputError: names what is wrong; `source` is what the space is called.
        """
        base = self.proxy.model_dump(mode="json")
        bounds = [(each.low, each.high) for each in space.ranges.values()]
        for corner in itertools.product(*bounds):
            made = recipe_of(base, self.fixed, dict(zip(space.ranges, corner, strict=True)), source=source)
        made.plan(self.model)
        require_possible(self.model, made, self.options, world_size=1)

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
        return self._run(parameters, self.options, report)

    def resume(
        self, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
    ) -> TrialOutcome | None:
        """Runs one trial, which can be stopped; its checkpoint is bitwise what an undisturbed trial has there."""
        try:
            stop = Stop(interruption.folder, interruption.requested)
            return self._run(parameters, self._logged(interruption), report, stop)
        except Stopped:
            return None

    def _run(
        self, parameters: Mapping[str, float], options: TrainingOptions, report: ReportFn, stop: Stop | None = None
    ) -> TrialOutcome:
        from mup_megatron.megatron.versions import installed

        result = run_training(self.model, self.recipe(parameters), self.data, options, report=report, stop=stop)
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

    def _logged(self, interruption: Interruption) -> TrainingOptions:
        """Returns the options of a trial; where it is logged, in a folder of its own.

        What an earlier attempt has logged is removed, unless this one goes on from its state.
        """
        if self.options.wandb_project is None:
            return self.options
        assert self.options.output is not None
        name = f"trial-{interruption.number}"
        if not interruption.folder.is_dir():
            shutil.rmtree(self.options.output / name, ignore_errors=True)
        return replace(self.options, output=self.options.output / name, wandb_exp_name=name)


def recipe_of(
    base: Mapping[str, Any], fixed: Mapping[str, Any], parameters: Mapping[str, float], *, source: str
) -> Recipe:
    """Returns the recipe of what was drawn and what was not searched, at this base."""
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
