"""What is checked in the exam: set-ups of three kinds, each of which can be checked and trained."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exam import models
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.stress import stressed
from mup_megatron.check.measure.levels import SEEDS, Level
from mup_megatron.check.mutants import Mutant
from mup_megatron.check.run_modules import check_modules
from mup_megatron.check.subjects.modules import ModuleTrainee
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan, trained_by, warm_up_and_decay
from mup_megatron.check.verdict.verdict import Verdict
from mup_megatron.huggingface import plan_for
from mup_megatron.modules import module_base, plan_for_module
from mup_megatron.recipe import HuggingFaceBase, Recipe

STEPS = 20
"""After so many a mistake has to have changed the weights."""
HYPERPARAMETERS: Mapping[str, Any] = {
    "lr": 0.004,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "embedding_multiplier": 2.0,
    "output_multiplier": 2.0,
}

Factory = Callable[[int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much a check does, and from which seed on."""

    level: str
    seed: int
    seeds: int = SEEDS
    processes: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of a check."""
        own = {"first_seed": self.seed, "seeds": self.seeds, "processes": self.processes}
        return {"level": Level(self.level), **own}


@dataclass(frozen=True, kw_only=True)
class Modules:
    """A torch module or a Hugging Face model, its user's script, and `check_modules`."""

    key: str
    """Of what its reference is: the same for the same model, loss and batches."""
    factory: Factory
    hyperparameters: Mapping[str, Any] = field(default_factory=lambda: HYPERPARAMETERS)
    content: Mapping[str, Any] = field(default_factory=dict)
    """More of the recipe."""
    base: HuggingFaceBase | None = None
    """By default the module at `base_width`."""
    base_width: int = models.BASE
    batch: Any = models.texts
    loss: Any = models.text_loss
    prepare: Callable[[nn.Module, Task], Any] = prepare_by_plan
    schedule: Callable[[int, int], float] = warm_up_and_decay
    widths: Sequence[int] = models.WIDTHS

    @property
    def recipe(self) -> Recipe:
        """As tuned at the base."""
        base: Any = self.base
        if base is None:
            base = module_base(lambda: self.factory(self.base_width), lambda: self.factory(2 * self.base_width))
        content = {"base": base, "hyperparameters": {**self.hyperparameters}, **self.content}
        return Recipe.model_validate(content)

    def check(self, extent: Extent, *, references: Path) -> Verdict:
        """The verdict."""
        return check_modules(
            self.factory,
            self.recipe,
            widths=self.widths,
            batch=self.batch,
            loss=self.loss,
            prepare=self.prepare,
            schedule=self.schedule,
            **extent.options,
        )

    def trained(self, folder: Path) -> dict[str, Tensor]:
        """The widest model's weights after some steps."""
        width, recipe = max(self.widths), stressed(self.recipe, steps=STEPS)
        torch.manual_seed(0)
        model = self.factory(width)
        if self.base is None:
            plan = plan_for_module(lambda: self.factory(width), recipe)
        else:
            plan = plan_for(copy.deepcopy(model), recipe)  # type: ignore[arg-type]
        task = Task(plan=plan, recipe=recipe, width=width, seed=0, steps=STEPS)
        prepared = self.prepare(model, task)
        optimizers, schedulers = trained_by(prepared)
        if schedulers is None:
            schedulers = [
                torch.optim.lr_scheduler.LambdaLR(each, lambda step: self.schedule(step, STEPS)) for each in optimizers
            ]
        trainee = ModuleTrainee(
            model, optimizers, recipe, plan, width=width, batch=self.batch, loss=self.loss, schedulers=schedulers
        )
        for step in range(STEPS):
            trainee.step(step)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def with_model(self, name: str, factory: Factory) -> "Modules":
        """With another model, which its reference has too."""
        return replace(self, key=name, factory=factory)

    def with_loss(self, name: str, loss: Any) -> "Modules":
        """With another loss, likewise."""
        return replace(self, key=name, loss=loss)

    def with_script(self, prepare: Callable[[nn.Module, Task], Any]) -> "Modules":
        """With another script."""
        return replace(self, prepare=prepare)

    def then(self, change: Callable[[nn.Module, Any, Task], Any]) -> "Modules":
        """With a script that does this after it has done all as it should; it may give something in its place."""

        def prepare(model: nn.Module, task: Task) -> Any:
            optimizer = prepare_by_plan(model, task)
            changed = change(model, optimizer, task)
            return optimizer if changed is None else changed

        return self.with_script(prepare)


@dataclass(frozen=True, kw_only=True)
class Megatron:
    """A model file, and `check_megatron`; a mistake is one of the library's kind."""

    target: ModelFile
    recipe: Recipe
    widths: Sequence[int] | None = (32, 64, 128)
    mutant: Mutant | None = None

    def check(self, extent: Extent, *, references: Path) -> Verdict:
        """The verdict."""
        from mup_megatron.check.run_megatron import check_megatron

        return check_megatron(
            self.target,
            self.recipe,
            widths=self.widths,
            **extent.options,
            mutant=self.mutant,
            references=references,
        )

    def trained(self, folder: Path) -> dict[str, Tensor]:
        """The widest model's weights after some steps."""
        import check_rates
        from rates.architectures import Architecture

        assert self.widths is not None
        architecture = Architecture(self.target, self.recipe)
        weights: dict[str, Tensor] = check_rates.trained(self.mutant, architecture, folder, max(self.widths))
        return weights


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A Hugging Face configuration, and `check_hugging_face`."""

    config: Any
    recipe: Recipe
    widths: Sequence[int] | None = (32, 64, 128)

    def check(self, extent: Extent, *, references: Path) -> Verdict:
        """The verdict."""
        from mup_megatron.check.run_huggingface import check_hugging_face

        return check_hugging_face(self.config, self.recipe, widths=self.widths, **extent.options)


Setup = Modules | Megatron | Configuration
