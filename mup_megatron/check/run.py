"""A check of a Megatron-Core target from beginning to end: its family of models, who trains them, the verdict."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mup_megatron.check import cache, levels
from mup_megatron.check.family import PILOT, condensed, eps_from, models_for, stressed, under_rule, widths_for
from mup_megatron.check.judge import Facts, Measure, Sides, judge
from mup_megatron.check.measurements import Measured, Protocol, Report, Run
from mup_megatron.check.mutants import Context, Mutant
from mup_megatron.check.transfer import at_rate, transfer_section
from mup_megatron.check.verdict import Level, Section, Verdict
from mup_megatron.models.model_file import ModelFile
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Optimizer, Rule
from mup_megatron.training import ranks
from mup_megatron.training.options import TrainingOptions, require_possible

if TYPE_CHECKING:
    from mup_megatron.check.megatron_subject import MegatronTrainee

ONE_PROCESS = TrainingOptions(train_iters=1, global_batch_size=1)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is trained in a check: the models of a target's shape, and the recipe under stress."""

    recipe: Recipe
    """As its user knows it."""
    models: dict[int, ModelFile]
    """Width → model, as it can be built here."""
    cache: Path | None

    @cached_property
    def plain(self) -> dict[int, ModelFile]:
        """The same, with norms that are layers of their own, as the reference's are: the names of measurements."""
        return {w: model.model_copy(update={"transformer_impl": "local"}) for w, model in self.models.items()}

    def at(self, protocol: Protocol) -> Recipe:
        """The recipe under stress for runs of this length."""
        return stressed(self.recipe, steps=protocol.steps, eps=self._eps)

    def correct(self, protocol: Protocol, rule: Rule = Rule.MUP) -> Recipe:
        """Likewise with the rules that are right, or with none."""
        return under_rule(self.at(protocol), rule)

    def reference(self, protocol: Protocol, *, rule: Rule = Rule.MUP, report: Report | None = None) -> Measured:
        """The correct runs, or those in standard parametrization: from the cache, or trained. One process."""
        recipe = self.correct(protocol, rule)
        count = levels.REFERENCE_SEEDS if rule is Rule.MUP else levels.CONTROL_SEEDS
        seeds = range(levels.FIRST_REFERENCE_SEED, levels.FIRST_REFERENCE_SEED + count)
        what = "reference" if rule is Rule.MUP else "control"
        return _references(self.cache, self.plain, recipe, protocol, seeds, what, report)

    @cached_property
    def _eps(self) -> float | None:
        if self.recipe.parametrization.optimizer != Optimizer.ADAM.value:
            return None
        recipe = under_rule(stressed(self.recipe, steps=PILOT.steps), Rule.MUP)
        width, model = next(iter(self.plain.items()))
        seeds = range(levels.FIRST_REFERENCE_SEED, levels.FIRST_REFERENCE_SEED + 1)
        measured = _references(self.cache, {width: model}, recipe, PILOT, seeds, "pilot", None)
        return eps_from(measured.runs[0], recipe.plan(model))


def _references(
    folder: Path | None,
    models: dict[int, ModelFile],
    recipe: Recipe,
    protocol: Protocol,
    seeds: Sequence[int],
    what: str,
    report: Report | None,
) -> Measured:
    from mup_megatron.check.measuring import measure
    from mup_megatron.check.reference import Reference

    def trained() -> Measured:
        runs: list[Run] = []
        for index, (width, model) in enumerate(models.items()):
            plan = recipe.plan(model)
            for seed in seeds:
                trainee = Reference(
                    model,
                    recipe,
                    plan,
                    seed=levels.run_seed(seed, index),
                    steps=protocol.steps,
                    batch_size=protocol.batch_size,
                )
                runs.append(measure(trainee, protocol, width=width, seed=seed))
                if report is not None:
                    report(what, len(runs), len(models) * len(seeds))
        return Measured(tuple(runs))

    shapes = [model.model_dump(mode="json") for model in models.values()]
    return cache.cached(folder, [recipe.fingerprint, shapes, protocol.fingerprint(), list(seeds)], trained)


def check_megatron(
    target: ModelFile,
    recipe: Recipe,
    *,
    level: Level = Level.QUICK,
    widths: Sequence[int] | None = None,
    seeds: int = levels.SEEDS,
    first_seed: int = 1,
    layout: TrainingOptions = ONE_PROCESS,
    mutant: Mutant | None = None,
    references: Path | None = cache.FOLDER,
    report: Report | None = None,
) -> Verdict:
    """A verdict on a target that is trained on Megatron-Core with a recipe. Collective under torchrun.

    Args:
        target: what is to be trained.
        recipe: with which it is.
        level: how much is looked at.
        widths: hidden sizes of the models; by default `family.widths_for`.
        seeds: of each width.
        first_seed: the first of them.
        layout: parallel sizes and the optimizer's sharding, as of the run to come.
        mutant: a deliberate mistake, to see what it looks like.
        references: folder of references that were measured before; None keeps none.
        report: called on every rank as models are done.

    Raises:
        InputError: a model of a width cannot be built, or the layout is not possible.
    """
    begun = time.monotonic()
    ranks.enable_cpu()
    from mup_megatron.training.build import available_model

    shared = layout.tensor_model_parallel_size
    target.require_tensor_parallel(shared)
    stages = layout.pipeline_model_parallel_size * (layout.virtual_stages(target) or 1)
    small, small_recipe = condensed(target, recipe, tensor_parallel=shared, stages=stages)
    chosen = list(widths or widths_for(small, small_recipe, levels.WIDTHS, tensor_parallel=shared))
    models = {w: available_model(m, layout) for w, m in models_for(small, small_recipe, chosen).items()}
    family = Family(recipe=small_recipe, models=models, cache=references)
    world = ranks.world_size()
    possible = replace(layout, train_iters=levels.EARLY.steps, global_batch_size=levels.EARLY.batch_size)
    for model in models.values():
        require_possible(model, small_recipe, possible, world)
    subject = _Subject(family, layout, world, mutant, report)
    with ranks.joined(
        tensor=layout.tensor_model_parallel_size,
        pipeline=layout.pipeline_model_parallel_size,
        virtual_stages=layout.virtual_stages(small),
        seed=first_seed,
    ):

        def correct(rule: Rule) -> Measure:
            return lambda protocol: ranks.on_first_rank(lambda: family.reference(protocol, rule=rule, report=report))

        early = ranks.on_first_rank(lambda: family.correct(levels.EARLY))
        verdict = judge(
            Sides(
                subject=lambda protocol: subject.measured(protocol, range(first_seed, first_seed + seeds)),
                reference=correct(Rule.MUP),
                control=correct(Rule.STANDARD),
            ),
            Facts(recipe=early, plans={w: early.plan(m) for w, m in family.plain.items()}, models=family.plain),
            level=level,
            fingerprint=recipe.fingerprint,
            extra=[lambda: subject.transfer(first_seed)] if level is Level.FULL else [],
            remarks=_remarks(target, models, mutant),
        )
    return replace(verdict, seconds=time.monotonic() - begun)


@dataclass(frozen=True)
class _Subject:
    """What is checked. Collective in all that it does; Megatron's groups have to be joined."""

    family: Family
    layout: TrainingOptions
    world_size: int
    mutant: Mutant | None
    report: Report | None

    def measured(self, protocol: Protocol, seeds: Sequence[int]) -> Measured:
        """All runs of one length."""
        from mup_megatron.check.measuring import measure

        recipe = ranks.on_first_rank(lambda: self.family.at(protocol))
        runs: list[Run] = []
        for width in self.family.models:
            for seed in seeds:
                runs.append(measure(self._started(recipe, width, seed, protocol), protocol, width=width, seed=seed))
                if self.report is not None:
                    self.report("subject", len(runs), len(self.family.models) * len(seeds))
        return Measured(tuple(runs))

    def transfer(self, first_seed: int) -> Section:
        """The basins of the learning rate."""
        recipe = ranks.on_first_rank(lambda: self.family.at(levels.LATE))
        return transfer_section(
            lambda width, seed, lr: self._started(at_rate(recipe, lr), width, seed, levels.LATE),
            [*self.family.models],
            recipe.hyperparameters.lr,
            first_seed,
            self.report,
        )

    def _started(self, recipe: Recipe, width: int, seed: int, protocol: Protocol) -> "MegatronTrainee":
        """One model, freshly built, with its mistake."""
        from mup_megatron.check.megatron_subject import build_megatron

        mutant, model = self.mutant, self.family.models[width]
        context = Context(base=recipe.megatron_base, target=model, recipe=recipe, width=width)
        right = recipe.plan(model)
        plan = right if mutant is None or mutant.plan is None else mutant.plan(right, context)
        return build_megatron(
            model,
            recipe,
            plan,
            seed=levels.run_seed(seed, list(self.family.models).index(width)),
            protocol=protocol,
            layout=self.layout,
            world_size=self.world_size,
            tamper=None if mutant is None else mutant.tamper(plan, context),
        )


def _remarks(target: ModelFile, models: dict[int, ModelFile], mutant: Mutant | None) -> list[str]:
    remarks = []
    some = next(iter(models.values()))
    if mutant is not None:
        remarks.append(f"With a deliberate mistake: {mutant.what}")
    if target.attention_dropout or target.hidden_dropout:
        remarks.append("Dropout is off in the check, so that differences are not its own.")
    if some.transformer_impl != target.transformer_impl:
        remarks.append("No GPU, so no Transformer Engine: the models are built with transformer_impl local.")
    return remarks
