"""The models of a check of torch modules: the script's, the correct ones, and what is known of all of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from mup_megatron.check.family.cost import BUILT, Shapes, prediction
from mup_megatron.check.family.sizes import SEQUENCE, narrowest
from mup_megatron.check.family.stress import PILOT, Pilot, pilot_recipe, stressed, stressed_after, under_rule
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import Grouped, MeasuredRun, Measurements, Report, RunProtocol
from mup_megatron.check.measure.measuring import measure
from mup_megatron.check.measure.workers import WorkerJob, run_jobs
from mup_megatron.check.reference.modules import carry_out, optimizers_for
from mup_megatron.check.subjects.modules import Batch, EngineTrainee, Loss, ModuleTrainee
from mup_megatron.check.subjects.scripts import Factory, Prepare, Schedule, Task, bare_model, is_engine, trained_by
from mup_megatron.check.subjects.sight import blocks, copying
from mup_megatron.check.transfer import at_rate, transfer_section
from mup_megatron.check.verdict.bounds import Known
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.depth import at_depth
from mup_megatron.check.verdict.later import LATER, later_section, width_of
from mup_megatron.check.verdict.verdict import Section
from mup_megatron.modules import plan_for_module
from mup_megatron.recipe import HuggingFaceBase, Recipe
from mup_megatron.theory import Plan, Rule
from mup_megatron.training.ranks import on_first_rank


def _shapes(model: nn.Module) -> Shapes:
    return [parameter.shape for parameter in model.parameters()]


@dataclass(frozen=True, kw_only=True)
class ModuleFamily:
    """The models of a check, and what all of its sides have in common."""

    factory: Factory
    recipe: Recipe
    """As its user knows it."""
    widths: tuple[int, ...]
    batch: Batch
    loss: Loss
    schedule: Schedule
    readout: str | None
    report: Report | None
    processes: int = 1
    """How many train at once."""
    head_sizes: dict[int, dict[str, int]] = field(default_factory=dict)
    """Width → attention logits → the size of their heads, as the subject's runs have shown."""
    _plans: dict[tuple[int, str], Plan] = field(default_factory=dict, init=False)
    """Of width and recipe's fingerprint, as they have been asked for: for each a model is built."""

    def stressed(self, protocol: RunProtocol) -> Recipe:
        """Returns the recipe with values at which mistakes show within a protocol's steps."""
        return stressed_after(self._pilot, self.recipe, steps=protocol.steps)

    def prediction(
        self,
        models: Mapping[int, nn.Module],
        level: Level,
        seeds: int,
        deep: tuple[Factory, Recipe, Sequence[int]] | None,
    ) -> str:
        """Returns how many models there will be, and how long they take."""
        shapes = {width: _shapes(model) for width, model in models.items()}
        once = [(shapes[self.widths[0]], PILOT)]
        if level is Level.QUICK:
            once.append((shapes[self.widths[0]], LATER))
        if deep is not None:
            factory, _, widths = deep
            with torch.device("meta"):
                once.append((_shapes(bare_model(factory, min(widths), seed=0)), BUILT))
        return prediction(
            shapes,
            # Of a vector for each sample, or a sequence of them.
            tokens=SEQUENCE,
            level=level,
            seeds=seeds,
            processes=self.processes,
            kept=lambda _protocol, _rule: False,
            once=once,
        )

    def plan(self, width: int, recipe: Recipe) -> Plan:
        """Returns the plan of the model of a width."""
        key = width, recipe.fingerprint
        if key not in self._plans:
            self._plans[key] = self._planned(width, recipe)
        return self._plans[key]

    def _planned(self, width: int, recipe: Recipe) -> Plan:
        if isinstance(recipe.base, HuggingFaceBase):
            from mup_megatron.huggingface.plan import plan_for

            model: Any = bare_model(self.factory, width, seed=0)
            return plan_for(model, recipe)
        return plan_for_module(lambda: bare_model(self.factory, width, seed=0), recipe, readout=self.readout)

    def subject(self, protocol: RunProtocol, prepare: Prepare, seeds: Sequence[int]) -> Measurements:
        """Returns the measurements of what a script makes of the models. Collective."""
        recipe = on_first_rank(lambda: self.stressed(protocol))
        plans = {width: self.plan(width, recipe) for width in self.widths}

        def trained(width: int, seed: int) -> tuple[MeasuredRun, dict[str, int]]:
            trainee = self._started(prepare, recipe, plans[width], width, seed, protocol.steps)
            run = measure(trainee, protocol, width=width, seed=seed)
            sizes = trainee.head_sizes()
            trainee.close()
            return run, sizes

        jobs = [WorkerJob(width, partial(trained, width, seed)) for width in self.widths for seed in seeds]
        found = run_jobs(jobs, self.processes, partial(self._tell, "subject", of=len(jobs)))
        self.head_sizes.update({run.width: sizes for run, sizes in found})
        return Measurements(tuple(run for run, _ in found))

    def at_depth(self, deep: tuple[Factory, Recipe, Sequence[int]], prepare: Prepare, first_seed: int) -> Section:
        """Returns all layers, in one model that is not trained. Collective."""
        factory, own, widths = deep
        whole = replace(self, factory=factory, recipe=own)
        recipe = stressed(own, steps=levels.EARLY.steps)
        width, plan = narrowest(widths, lambda width: whole.plan(width, recipe))
        model = bare_model(factory, width, seed=first_seed)
        task = Task(plan=plan, recipe=recipe, width=width, seed=first_seed, steps=levels.EARLY.steps)
        prepared = prepare(model, task)
        trainee = whole._trainee(model, prepared, task)
        groups: dict[str, Grouped] = {}
        if not (is_engine(prepared) or isinstance(prepared, tuple)):
            # With a scheduler of the script's own, or an engine, what a group holds need not be its peak.
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for group in chain.from_iterable(each.param_groups for each in trained_by(prepared)[0]):
                values = Grouped(
                    lr=group.get("initial_lr", group["lr"]),
                    min_lr=None,
                    eps=group.get("eps"),
                    weight_decay=group.get("weight_decay", 0.0),
                )
                groups |= {names[id(p)]: values for p in group["params"] if id(p) in names}
        section = at_depth(plan, width, trainee.parameters(), groups, trainee.gathered)
        trainee.close()
        return section

    def known(self, models: Mapping[int, nn.Module], plans: Mapping[int, Plan]) -> Known:
        """Returns what bounds need, after the subject has run.

        Args:
            models: width → the bare model.
            plans: width → its plan.
        """
        return Known(
            plans=plans,
            shares_code=True,
            blocks=blocks(models[self.widths[0]]),
            copying=copying(models[self.widths[0]]),
            growth=lambda name: _growth(self.head_sizes, name),
            own_tails=_tails(models[self.widths[-1]]),
            differing=_differing(models),
        )

    def later(
        self, prepare: Prepare, seed: int, rounding: set[str], untrained: set[str]
    ) -> tuple[Section, Cause | None]:
        """Returns the section of a run that goes on, and its cause. Collective."""
        recipe = on_first_rank(lambda: self.stressed(LATER))
        plans = {width: self.plan(width, recipe) for width in self.widths}
        width = width_of(plans)
        trainee = self._started(prepare, recipe, plans[width], width, seed, LATER.steps)
        run = measure(trainee, LATER, width=width, seed=seed)
        trainee.close()
        return later_section(run, plans[width], lambda step: self.schedule(step, LATER.steps), rounding, untrained)

    def transfer(self, prepare: Prepare, first_seed: int) -> Section:
        """Returns the basins of the learning rate at three of the widths. Collective."""
        recipe = on_first_rank(lambda: self.stressed(levels.LATE))
        running: list[ModuleTrainee | EngineTrainee] = []

        def start(width: int, seed: int, lr: float) -> ModuleTrainee | EngineTrainee:
            while running:
                running.pop().close()
            own = at_rate(recipe, lr)
            plan = self.plan(width, own)
            running.append(self._started(prepare, own, plan, width, seed, levels.LATE.steps))
            return running[0]

        section = transfer_section(start, self.widths, recipe.hyperparameters.lr, first_seed, self.report)
        while running:
            running.pop().close()
        return section

    def _started(
        self, prepare: Prepare, recipe: Recipe, plan: Plan, width: int, seed: int, steps: int
    ) -> ModuleTrainee | EngineTrainee:
        """One model of the subject, as a script makes it."""
        model = bare_model(self.factory, width, seed=levels.run_seed(seed, self.widths.index(width)))
        task = Task(plan=plan, recipe=recipe, width=width, seed=seed, steps=steps)
        return self._trainee(model, prepare(model, task), task)

    def correct(self, protocol: RunProtocol, rule: Rule) -> Measurements:
        """Returns the correct runs, or those of standard parametrization."""
        what = "reference" if rule is Rule.MUP else "control"
        seeds = range(levels.FIRST_REFERENCE_SEED, levels.FIRST_REFERENCE_SEED + levels.correct_seeds(rule))
        return on_first_rank(lambda: self._correct(self.stressed(protocol), protocol, rule, self.widths, seeds, what))

    def _correct(
        self,
        recipe: Recipe,
        protocol: RunProtocol,
        rule: Rule,
        widths: Sequence[int],
        seeds: Sequence[int],
        what: str,
    ) -> Measurements:
        recipe = under_rule(recipe, rule)
        plans = {width: self.plan(width, recipe) for width in widths}

        def trained(width: int, seed: int) -> MeasuredRun:
            own_seed = levels.run_seed(seed, self.widths.index(width))
            model = bare_model(self.factory, width, seed=own_seed)
            carry_out(model, plans[width], seed=own_seed)
            task = Task(plan=plans[width], recipe=recipe, width=width, seed=seed, steps=protocol.steps)
            trainee = self._trainee(model, optimizers_for(model, recipe, plans[width]), task, alone=True)
            return measure(trainee, protocol, width=width, seed=seed)

        jobs = [WorkerJob(width, partial(trained, width, seed)) for width in widths for seed in seeds]
        processes = self.processes if len(jobs) > 1 else 1
        return Measurements(tuple(run_jobs(jobs, processes, partial(self._tell, what, of=len(jobs)))))

    def _trainee(
        self, model: nn.Module, prepared: Any, task: Task, *, alone: bool = False
    ) -> ModuleTrainee | EngineTrainee:
        if is_engine(prepared):
            return EngineTrainee(prepared, task.recipe, width=task.width, batch=self.batch, loss=self.loss)
        optimizers, schedulers = trained_by(prepared)
        if schedulers is None:
            schedulers = [
                torch.optim.lr_scheduler.LambdaLR(each, lambda step: self.schedule(step, task.steps))
                for each in optimizers
            ]
        return ModuleTrainee(
            model,
            optimizers,
            task.recipe,
            task.plan,
            width=task.width,
            batch=self.batch,
            loss=self.loss,
            schedulers=schedulers,
            alone=alone,
        )

    @cached_property
    def _pilot(self) -> Pilot:
        recipe = pilot_recipe(self.recipe)
        width = self.widths[0]
        [run] = self._correct(recipe, PILOT, Rule.MUP, [width], [levels.FIRST_REFERENCE_SEED], "pilot").runs
        return Pilot(run, recipe, self.plan(width, recipe))

    def _tell(self, what: str, run_jobs: int, *, of: int) -> None:
        if self.report is not None:
            self.report(what, run_jobs, of)


def _growth(head_sizes: Mapping[int, Mapping[str, int]], name: str) -> float:
    """Exponent of width with which the heads of some logits grow."""
    sizes = {width: of_width[name] for width, of_width in head_sizes.items() if name in of_width}
    if len(sizes) < 2:
        return 0.0
    low, high = min(sizes), max(sizes)
    return math.log(sizes[high] / sizes[low]) / math.log(high / low)


def _tails(model: nn.Module) -> dict[str, float]:
    """Returns E x⁴ / (E x²)² of the draws of a bare model."""
    found = {}
    for name, parameter in model.named_parameters():
        square = parameter.detach().double().square()
        if (mean := square.mean().item()) > 0:
            found[name] = square.square().mean().item() / mean**2
    return found


def _differing(models: Mapping[int, nn.Module]) -> list[tuple[str, dict[int, float]]]:
    """Buffers that have one shape at all widths, and other content: name, and width → mean magnitude."""
    of_width = {width: dict(model.named_buffers()) for width, model in models.items()}
    found = []
    for name in set.intersection(*(set(buffers) for buffers in of_width.values())):
        values = {width: buffers[name].detach() for width, buffers in of_width.items()}
        first = next(iter(values.values()))
        if any(value.shape != first.shape for value in values.values()) or not first.is_floating_point():
            continue
        if any(not torch.allclose(value, first, rtol=1e-4, atol=1e-7) for value in values.values()):
            found.append((name, {width: value.double().abs().mean().item() for width, value in values.items()}))
    return sorted(found)
