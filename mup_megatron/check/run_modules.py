"""A check of any torch module, of a Hugging Face model, of a DeepSpeed engine: whatever a script makes of a plan.

The reference has the model's code in common with what is checked, so what is wrong in that code shows in neither. Hence
bounds beside the comparison that hold for every model in μP: see `verdict/bounds.py`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from mup_megatron.check.measure import levels
from mup_megatron.check.measure.dropout import drops, without_dropout
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import Measurements, Report, RunProtocol
from mup_megatron.check.measure.workers import ignored_processes, one_thread, usable_processes
from mup_megatron.check.module_family import ModuleFamily
from mup_megatron.check.report.report import text
from mup_megatron.check.subjects.modules import Batch, Loss
from mup_megatron.check.subjects.scripts import (
    Factory,
    Prepare,
    Schedule,
    Task,
    bare_model,
    default_batch,
    default_loss,
    prepare_by_plan,
    warm_up_and_decay,
)
from mup_megatron.check.verdict.depth import with_depth
from mup_megatron.check.verdict.judge import Expectation, Sides, judge
from mup_megatron.check.verdict.verdict import WITHOUT_DROPOUT, CheckOutcome, Verdict
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe
from mup_megatron.theory import PlanError, Rule
from mup_megatron.training.ranks import on_first_rank

__all__ = ["CheckOutcome", "Level", "Task", "Verdict", "assert_mup", "check_modules", "prepare_by_plan"]


@contextlib.contextmanager
def _errors_for_users() -> Iterator[None]:
    """Turns what a plan says of parameters that it does not have into an error for users."""
    try:
        yield
    except PlanError as error:
        raise InputError(str(error)) from error


@one_thread()
@without_dropout()
@_errors_for_users()
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
    """Returns a verdict on what a script makes of a model. Collective, if there are ranks.

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
    begun = time.monotonic()
    chosen = sorted(set(widths))
    if len(chosen) < 3:
        raise InputError(
            f"widths {list(widths)}: a slope over width takes at least three. Give for example 64 128 256."
        )
    models = {width: bare_model(factory, width, seed=first_seed) for width in chosen}
    family = ModuleFamily(
        factory=factory,
        recipe=recipe,
        widths=tuple(chosen),
        batch=batch or default_batch(models),
        loss=loss or default_loss,
        schedule=schedule,
        readout=readout,
        report=report,
        processes=usable_processes(processes),
    )
    if tell is not None:
        tell(family.prediction(models, level, seeds, deep))

    def subject(protocol: RunProtocol) -> Measurements:
        return family.subject(protocol, prepare, range(first_seed, first_seed + seeds))

    frozen = {name for name, p in models[chosen[0]].named_parameters() if not p.requires_grad}
    early = on_first_rank(lambda: family.stressed(levels.EARLY))
    plans = {w: family.plan(w, early) for w in chosen}
    verdict = judge(
        Sides(
            subject=subject,
            reference=lambda protocol: family.correct(protocol, Rule.MUP),
            control=lambda protocol: family.correct(protocol, Rule.STANDARD),
        ),
        Expectation(recipe=early, plans=plans, known=lambda: family.known(models, plans)),
        level=level,
        fingerprint=recipe.fingerprint,
        extra=[lambda: family.transfer(prepare, first_seed)] if level is Level.FULL else [],
        later=lambda rounding, untrained: family.later(prepare, first_seed, rounding | frozen, untrained),
        remarks=(
            *remarks,
            *_dropping(models[chosen[0]]),
            *_frozen(models[chosen[0]]),
            *ignored_processes(processes, family.processes),
        ),
    )
    if deep is not None:
        verdict = with_depth(verdict, family.at_depth(deep, prepare, first_seed))
    return replace(blaming_own_code(verdict), seconds=time.monotonic() - begun)


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


def _dropping(model: nn.Module) -> list[str]:
    return [WITHOUT_DROPOUT] if drops(model) else []


def _frozen(model: nn.Module) -> list[str]:
    names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return [f"Frozen as it is built, and not checked: {', '.join(names[:5])}."] if names else []


def blaming_own_code(verdict: Verdict) -> Verdict:
    """Returns the verdict, with what is the model's own fault said so: the reference has its code too."""
    if verdict.outcome is not CheckOutcome.NO_VERDICT or not verdict.subject.problems or not verdict.reference.problems:
        return verdict
    at_start = "not finite before the first step"
    problem = verdict.subject.problems[0]
    if at_start not in problem or not all(at_start in found for found in verdict.reference.problems):
        return verdict
    where = next(run.problem for run in verdict.subject.runs if run.problem is not None)
    section = replace(
        verdict.sections[0],
        outcome=CheckOutcome.FAIL,
        lines=(problem, "It is so with the right initial weights as well: the model's own code is at fault."),
    )
    culprit = where.partition(":")[0]
    return replace(verdict, outcome=CheckOutcome.FAIL, culprit=culprit, sections=(section, *verdict.sections[1:]))
