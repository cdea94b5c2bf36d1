"""A check of any torch module, of a Hugging Face model, of a DeepSpeed engine: whatever a script makes of a plan.

The reference has the model's code in common with what is checked, so what is wrong in that code shows in neither. Hence
bounds beside the comparison that hold for every model in μP: see `bounds.py`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from mup_megatron.check.measure import batches, levels
from mup_megatron.check.measure.cost import BUILT, Shapes, prediction
from mup_megatron.check.measure.dropout import drops, without_dropout
from mup_megatron.check.measure.measurements import Measured, Protocol, Report, Run
from mup_megatron.check.measure.measuring import measure
from mup_megatron.check.measure.workers import Job, done, ignored, one_thread, usable
from mup_megatron.check.reference.modules import carry_out, optimizer_for
from mup_megatron.check.report.report import text
from mup_megatron.check.subjects.depth import Grouped, at_depth, narrowest, with_depth
from mup_megatron.check.subjects.family import FLOOR, PILOT, PILOT_RATE, eps_from, rate_from, stressed, under_rule
from mup_megatron.check.subjects.module_trainee import (
    LOGITS,
    Batch,
    EngineTrainee,
    Loss,
    ModuleTrainee,
    blocks,
    copying,
)
from mup_megatron.check.subjects.transfer import at_rate, transfer_section
from mup_megatron.check.verdict.bounds import Known
from mup_megatron.check.verdict.causes import Cause
from mup_megatron.check.verdict.judge import Facts, Sides, judge
from mup_megatron.check.verdict.later import LATER, later_section, width_of
from mup_megatron.check.verdict.verdict import WITHOUT_DROPOUT, Level, Outcome, Section, Verdict
from mup_megatron.errors import InputError
from mup_megatron.modules import apply_plan, param_groups, plan_for_module
from mup_megatron.recipe import HuggingFaceBase, Recipe
from mup_megatron.theory import Plan, PlanError, Rule
from mup_megatron.training.ranks import on_first_rank

Factory = Callable[[int], nn.Module]
"""Width → the bare model, as its library draws it."""
Schedule = Callable[[int, int], float]
"""(step, steps) → the learning rate's part of its peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run, as it is told to the script that is checked."""

    plan: Plan
    """The right one."""
    recipe: Recipe
    """The one that is checked, with values at which mistakes show."""
    width: int
    seed: int
    steps: int


Prepare = Callable[[nn.Module, Task], Any]
"""What a script makes of a bare model: it applies the plan and returns an optimizer, (optimizer, scheduler), or a
DeepSpeed engine; None where there is nothing to train."""


def prepare_by_plan(model: nn.Module, task: Task) -> torch.optim.Optimizer | None:
    """What `mup_megatron.modules` makes of a model."""
    apply_plan(model, task.plan)
    groups = param_groups(model.named_parameters(), task.plan)
    h = task.recipe.hyperparameters
    if not groups:
        return None
    if task.recipe.parametrization.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=h.lr, momentum=h.sgd_momentum)
    return torch.optim.AdamW(groups, lr=h.lr, betas=(h.adam_beta1, h.adam_beta2))


def warm_up_and_decay(step: int, steps: int) -> float:
    """Linear from 0 over the first quarter of a run, then linear to a tenth."""
    warm = steps / 4
    return step / warm if step <= warm else 1 + (FLOOR - 1) * (step - warm) / (steps - warm)


def check_modules(
    factory: Factory,
    recipe: Recipe,
    *,
    widths: Sequence[int],
    batch: Batch | None = None,
    loss: Loss | None = None,
    prepare: Prepare = prepare_by_plan,
    schedule: Schedule = warm_up_and_decay,
    readout: str | None = None,
    level: Level = Level.QUICK,
    seeds: int = levels.SEEDS,
    first_seed: int = 1,
    remarks: Sequence[str] = (),
    report: Report | None = None,
    processes: int | None = None,
    tell: Callable[[str], None] | None = None,
    deep: tuple[Factory, Recipe, Sequence[int]] | None = None,
) -> Verdict:
    """A verdict on what a script makes of a model. Collective, if there are ranks.

    Args:
        factory: builds the bare model of a width. Dropout is off in a check; with other randomness there is no verdict.
        recipe: what is transferred; its base is a torch module or a Hugging Face configuration.
        widths: of the models, at least three, over a range of four or more.
        batch: (step, width) → what `loss` takes; by default tokens, for Hugging Face's language models.
        loss: (model, batch) → loss; by default `model(**batch).loss`.
        prepare: what is checked. By default what `mup_megatron.modules` does.
        schedule: that the learning rate is to follow. The check sees to it, unless `prepare` returns a scheduler of its
            own or an engine.
        readout: as in `plan_for_module`.
        level: how much is looked at.
        seeds: of each width.
        first_seed: the first of them.
        remarks: to be told with the verdict.
        report: called as models are done.
        processes: how many train at once, where no ranks have joined; by default as many as there are cores.
        tell: called before the first model is trained, with how many there will be and about how long it takes.
        deep: factory, recipe and possible widths of models of the whole depth, where the others have fewer layers: one
            is built, and not trained.

    Raises:
        InputError: a model cannot be built, no plan can be made for it, or nobody says what it learns.
    """
    with one_thread(), without_dropout(), _told():
        return _checked(
            factory,
            recipe,
            widths=widths,
            batch=batch,
            loss=loss,
            prepare=prepare,
            schedule=schedule,
            readout=readout,
            level=level,
            seeds=seeds,
            first_seed=first_seed,
            remarks=remarks,
            report=report,
            processes=processes,
            tell=tell,
            deep=deep,
        )


def _checked(
    factory: Factory,
    recipe: Recipe,
    *,
    widths: Sequence[int],
    batch: Batch | None,
    loss: Loss | None,
    prepare: Prepare,
    schedule: Schedule,
    readout: str | None,
    level: Level,
    seeds: int,
    first_seed: int,
    remarks: Sequence[str],
    report: Report | None,
    processes: int | None,
    tell: Callable[[str], None] | None,
    deep: tuple[Factory, Recipe, Sequence[int]] | None,
) -> Verdict:
    begun = time.monotonic()
    chosen = sorted(set(widths))
    if len(chosen) < 3:
        raise InputError(
            f"widths {list(widths)}: a slope over width takes at least three. Give for example 64 128 256."
        )
    models = {width: built(factory, width, seed=first_seed) for width in chosen}
    family = ModuleFamily(
        factory=factory,
        recipe=recipe,
        widths=tuple(chosen),
        batch=batch or default_batch(models),
        loss=loss or default_loss,
        schedule=schedule,
        readout=readout,
        report=report,
        processes=usable(processes),
    )
    if tell is not None:
        tell(family.prediction(models, level, seeds, deep))

    def subject(protocol: Protocol) -> Measured:
        return family.subject(protocol, prepare, range(first_seed, first_seed + seeds))

    frozen = {name for name, p in models[chosen[0]].named_parameters() if not p.requires_grad}
    early = on_first_rank(lambda: family.stressed(levels.EARLY))
    plans = {w: family.plan(w, early) for w in chosen}
    verdict = judge(
        Sides(subject=subject, reference=family.reference, control=family.control),
        Facts(recipe=early, plans=plans, known=lambda: family.known(models, plans)),
        level=level,
        fingerprint=recipe.fingerprint,
        extra=[lambda: family.transfer(prepare, first_seed)] if level is Level.FULL else [],
        later=lambda rounding, untrained: family.later(prepare, first_seed, rounding | frozen, untrained),
        remarks=(
            *remarks,
            *_dropping(models[chosen[0]]),
            *_frozen(models[chosen[0]]),
            *ignored(processes, family.processes),
        ),
    )
    if deep is not None:
        verdict = with_depth(verdict, family.at_depth(deep, prepare, first_seed))
    return replace(blamed(verdict), seconds=time.monotonic() - begun)


def assert_mup(model_factory: Factory, recipe: Recipe, **options: Any) -> None:
    """Raises AssertionError unless a model passes; its message is the verdict. For tests.

    Args:
        model_factory: width → the bare model.
        recipe: what is transferred.
        options: of `check_modules`; `widths` at least.
    """
    verdict = check_modules(model_factory, recipe, **options)
    if not verdict.passed:
        raise AssertionError(text(verdict, title="the model", files=()))


def _shapes(model: nn.Module) -> Shapes:
    return [parameter.shape for parameter in model.parameters()]


def _dropping(model: nn.Module) -> list[str]:
    return [WITHOUT_DROPOUT] if drops(model) else []


def _frozen(model: nn.Module) -> list[str]:
    names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return [f"Frozen as it is built, and not checked: {', '.join(names[:5])}."] if names else []


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns what a plan says of parameters that it does not have into an error for users."""
    try:
        yield
    except PlanError as error:
        raise InputError(str(error)) from error


# ---- models and batches --------------------------------------------------------------------------------------------


def built(factory: Factory, width: int, *, seed: int) -> nn.Module:
    """A bare model, always the same for a seed.

    Raises:
        InputError: the factory failed.
    """
    torch.manual_seed(seed)
    try:
        return factory(width)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"width {width}: the model cannot be built ({type(error).__name__}: {error}). Choose widths that fit the "
            "model, for example multiples of its head size."
        ) from error


VOCABULARY = 256
LENGTH = 32


def default_batch(models: Mapping[int, nn.Module]) -> Batch:
    """Tokens for Hugging Face's language models, pictures for its image classifiers.

    Raises:
        InputError: it is neither.
    """
    model: Any = next(iter(models.values()))
    config, name = getattr(model, "config", None), type(model).__name__
    size = levels.EARLY.batch_size
    if config is not None and any(part in name for part in ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration")):
        positions = getattr(config, "max_position_embeddings", None) or LENGTH
        length = min(LENGTH, positions)

        def texts(step: int, _width: int) -> dict[str, Tensor]:
            ids = batches.tokens(min(VOCABULARY, config.vocab_size), length, size, seed=0, step=step)[:, 1:]
            return {"input_ids": ids, "labels": ids.clone()}

        return texts
    if config is not None and "ImageClassification" in name:
        side = getattr(config, "image_size", 32)

        def pictures(step: int, _width: int) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(step + 1)
            # Brightness tells a few classes apart, so that there is something to learn at once.
            classes = min(config.num_labels, 4)
            labels = torch.randint(classes, (size,), generator=generator)
            noise = torch.randn(size, config.num_channels, side, side, generator=generator)
            brightness = 2.0 * labels / classes - 1.0
            return {"pixel_values": 0.3 * noise + brightness.view(-1, 1, 1, 1), "labels": labels}

        return pictures
    raise InputError(
        f"{name}: what it learns from is not known. Give `batch` (step, width) and `loss` (model, batch) to the check."
    )


def default_loss(model: Any, batch: Any) -> Tensor:
    """What Hugging Face's models compute."""
    loss: Tensor = model(**batch).loss
    return loss


# ---- who is trained ------------------------------------------------------------------------------------------------


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

    def stressed(self, protocol: Protocol) -> Recipe:
        """The recipe with values at which mistakes show within a protocol's steps."""
        pilot, recipe, plan = self._pilot
        if self.recipe.parametrization.optimizer == "adam":
            return stressed(self.recipe, steps=protocol.steps, eps=eps_from(pilot, plan))
        return stressed(self.recipe, steps=protocol.steps, rate=rate_from(pilot, plan, recipe))

    def prediction(
        self,
        models: Mapping[int, nn.Module],
        level: Level,
        seeds: int,
        deep: tuple[Factory, Recipe, Sequence[int]] | None,
    ) -> str:
        """How many models there will be, and how long they take."""
        shapes = {width: _shapes(model) for width, model in models.items()}
        once = [(shapes[self.widths[0]], PILOT)]
        if level is Level.QUICK:
            once.append((shapes[self.widths[0]], LATER))
        if deep is not None:
            factory, _, widths = deep
            with torch.device("meta"):
                once.append((_shapes(built(factory, min(widths), seed=0)), BUILT))
        return prediction(
            shapes,
            # Of a vector for each sample, or a sequence of them.
            tokens=LENGTH,
            level=level,
            seeds=seeds,
            processes=self.processes,
            kept=lambda _protocol, _rule: False,
            once=once,
        )

    def plan(self, width: int, recipe: Recipe) -> Plan:
        """What the model of a width gets."""
        if isinstance(recipe.base, HuggingFaceBase):
            from mup_megatron.huggingface.plan import plan_for

            model: Any = built(self.factory, width, seed=0)
            return plan_for(model, recipe)
        return plan_for_module(lambda: built(self.factory, width, seed=0), recipe, readout=self.readout)

    def subject(self, protocol: Protocol, prepare: Prepare, seeds: Sequence[int]) -> Measured:
        """What a script makes of the models. Collective."""
        recipe = on_first_rank(lambda: self.stressed(protocol))
        plans = {width: self.plan(width, recipe) for width in self.widths}

        def trained(width: int, seed: int) -> tuple[Run, dict[str, int]]:
            trainee = self._started(prepare, recipe, plans[width], width, seed, protocol.steps)
            run = measure(trainee, protocol, width=width, seed=seed)
            sizes = trainee.head_sizes()
            trainee.close()
            return run, sizes

        jobs = [Job(width, partial(trained, width, seed)) for width in self.widths for seed in seeds]
        found = done(jobs, self.processes, partial(self._tell, "subject", of=len(jobs)))
        self.head_sizes.update({run.width: sizes for run, sizes in found})
        return Measured(tuple(run for run, _ in found))

    def at_depth(self, deep: tuple[Factory, Recipe, Sequence[int]], prepare: Prepare, first_seed: int) -> Section:
        """All layers, in one model that is not trained. Collective."""
        factory, own, widths = deep
        whole = replace(self, factory=factory, recipe=own)
        recipe = stressed(own, steps=levels.EARLY.steps)
        width, plan = narrowest(widths, lambda width: whole.plan(width, recipe))
        model = built(factory, width, seed=first_seed)
        task = Task(plan=plan, recipe=recipe, width=width, seed=first_seed, steps=levels.EARLY.steps)
        prepared = prepare(model, task)
        trainee = whole._trainee(model, prepared, task)
        groups: dict[str, Grouped] = {}
        if isinstance(prepared, torch.optim.Optimizer):
            # With a scheduler of the script's own, or an engine, what a group holds need not be its peak.
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for group in prepared.param_groups:
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
        """For bounds, after the subject has run.

        Args:
            models: width → the bare model.
            plans: width → its plan.
        """
        return Known(
            plans=plans,
            shares_code=True,
            blocks=blocks(models[self.widths[0]]),
            logits=LOGITS,
            copying=copying(models[self.widths[0]]),
            growth=lambda name: _growth(self.head_sizes, name),
            own_tails=_tails(models[self.widths[-1]]),
            differing=_differing(models),
        )

    def later(
        self, prepare: Prepare, seed: int, rounding: set[str], untrained: set[str]
    ) -> tuple[Section, Cause | None]:
        """What a run shows that goes on. Collective."""
        recipe = on_first_rank(lambda: self.stressed(LATER))
        plans = {width: self.plan(width, recipe) for width in self.widths}
        width = width_of(plans)
        trainee = self._started(prepare, recipe, plans[width], width, seed, LATER.steps)
        run = measure(trainee, LATER, width=width, seed=seed)
        trainee.close()
        return later_section(run, plans[width], lambda step: self.schedule(step, LATER.steps), rounding, untrained)

    def transfer(self, prepare: Prepare, first_seed: int) -> Section:
        """The basins of the learning rate at three of the widths. Collective."""
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
        model = built(self.factory, width, seed=levels.run_seed(seed, self.widths.index(width)))
        task = Task(plan=plan, recipe=recipe, width=width, seed=seed, steps=steps)
        return self._trainee(model, prepare(model, task), task)

    def reference(self, protocol: Protocol) -> Measured:
        """The correct runs."""
        seeds = range(levels.FIRST_REFERENCE_SEED, levels.FIRST_REFERENCE_SEED + levels.REFERENCE_SEEDS)
        return on_first_rank(
            lambda: self._correct(self.stressed(protocol), protocol, Rule.MUP, self.widths, seeds, "reference")
        )

    def control(self, protocol: Protocol) -> Measured:
        """The correct runs of standard parametrization."""
        seeds = range(levels.FIRST_REFERENCE_SEED, levels.FIRST_REFERENCE_SEED + levels.CONTROL_SEEDS)
        return on_first_rank(
            lambda: self._correct(self.stressed(protocol), protocol, Rule.STANDARD, self.widths, seeds, "control")
        )

    def _correct(
        self,
        recipe: Recipe,
        protocol: Protocol,
        rule: Rule,
        widths: Sequence[int],
        seeds: Sequence[int],
        what: str,
    ) -> Measured:
        recipe = under_rule(recipe, rule)
        plans = {width: self.plan(width, recipe) for width in widths}

        def trained(width: int, seed: int) -> Run:
            own_seed = levels.run_seed(seed, self.widths.index(width))
            model = built(self.factory, width, seed=own_seed)
            carry_out(model, plans[width], seed=own_seed)
            task = Task(plan=plans[width], recipe=recipe, width=width, seed=seed, steps=protocol.steps)
            trainee = self._trainee(model, optimizer_for(model, recipe, plans[width]), task, alone=True)
            return measure(trainee, protocol, width=width, seed=seed)

        jobs = [Job(width, partial(trained, width, seed)) for width in widths for seed in seeds]
        processes = self.processes if len(jobs) > 1 else 1
        return Measured(tuple(done(jobs, processes, partial(self._tell, what, of=len(jobs)))))

    def _trainee(
        self, model: nn.Module, prepared: Any, task: Task, *, alone: bool = False
    ) -> ModuleTrainee | EngineTrainee:
        if hasattr(prepared, "backward") and hasattr(prepared, "module"):
            return EngineTrainee(prepared, task.recipe, width=task.width, batch=self.batch, loss=self.loss)
        optimizer, scheduler = prepared if isinstance(prepared, tuple) else (prepared, None)
        if scheduler is None and optimizer is not None:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step, task.steps))
        return ModuleTrainee(
            model,
            optimizer,
            task.recipe,
            width=task.width,
            batch=self.batch,
            loss=self.loss,
            scheduler=scheduler,
            alone=alone,
        )

    @cached_property
    def _pilot(self) -> tuple[Run, Recipe, Plan]:
        """A short run, for how large gradients are."""
        recipe = under_rule(stressed(self.recipe, steps=PILOT.steps, rate=PILOT_RATE), Rule.MUP)
        width = self.widths[0]
        [run] = self._correct(recipe, PILOT, Rule.MUP, [width], [levels.FIRST_REFERENCE_SEED], "pilot").runs
        return run, recipe, self.plan(width, recipe)

    def _tell(self, what: str, done: int, *, of: int) -> None:
        if self.report is not None:
            self.report(what, done, of)


# ---- what holds for every model ------------------------------------------------------------------------------------


def blamed(verdict: Verdict) -> Verdict:
    """The verdict, with what is the model's own fault said so: the reference has its code too."""
    if verdict.outcome is not Outcome.NO_VERDICT or not verdict.subject.problems or not verdict.reference.problems:
        return verdict
    at_start = "not finite before the first step"
    problem = verdict.subject.problems[0]
    if at_start not in problem or not all(at_start in found for found in verdict.reference.problems):
        return verdict
    where = next(run.problem for run in verdict.subject.runs if run.problem is not None)
    section = replace(
        verdict.sections[0],
        outcome=Outcome.FAIL,
        lines=(problem, "It is so with the right initial weights as well: the model's own code is at fault."),
    )
    culprit = where.partition(":")[0]
    return replace(verdict, outcome=Outcome.FAIL, culprit=culprit, sections=(section, *verdict.sections[1:]))


def _growth(head_sizes: Mapping[int, Mapping[str, int]], name: str) -> float:
    """Exponent of width with which the heads of some logits grow."""
    sizes = {width: of_width[name] for width, of_width in head_sizes.items() if name in of_width}
    if len(sizes) < 2:
        return 0.0
    low, high = min(sizes), max(sizes)
    return math.log(sizes[high] / sizes[low]) / math.log(high / low)


def _tails(model: nn.Module) -> dict[str, float]:
    """Of the draws of a bare model: E x⁴ / (E x²)²."""
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
