"""A check of a Megatron-Core target from beginning to end."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.cost import BUILT, Shapes, affordable, prediction
from mup_megatron.check.family.gpt import at_width, condensed, models_for, widths_for
from mup_megatron.check.family.sizes import SEQUENCE, narrowest
from mup_megatron.check.family.stress import stressed
from mup_megatron.check.gpt_family import GPTFamily, counting
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import MeasuredRun, Measurements, Report, RunProtocol
from mup_megatron.check.measure.workers import WorkerJob, ignored_processes, one_thread, run_jobs, usable_processes
from mup_megatron.check.reference import cache
from mup_megatron.check.transfer import at_rate, transfer_section
from mup_megatron.check.verdict.depth import at_depth, with_depth
from mup_megatron.check.verdict.judge import Expectation, Measure, Sides, judge
from mup_megatron.check.verdict.verdict import WITHOUT_DROPOUT, Section, Verdict
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, Rule
from mup_megatron.training import ranks
from mup_megatron.training.options import TrainingOptions, require_possible

if TYPE_CHECKING:
    from mup_megatron.check.mutants import Mutant
    from mup_megatron.check.subjects.megatron import MegatronTrainee


ONE_PROCESS = TrainingOptions(train_iters=1, global_batch_size=1)


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """Megatron on a CPU if there is no GPU, which has to be said before torch is imported; torch with one thread."""
    ranks.enable_cpu()
    with one_thread():
        yield


@_on_one_thread()
def check_megatron(
    target: ModelFile,
    recipe: Recipe,
    *,
    level: Level = Level.QUICK,
    widths: Sequence[int] | None = None,
    seeds: int = levels.SEEDS,
    first_seed: int = 1,
    layout: TrainingOptions = ONE_PROCESS,
    mutant: "Mutant | None" = None,
    references: Path | None = cache.FOLDER,
    report: Report | None = None,
    processes: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Verdict:
    """Returns a verdict on a target that is trained on Megatron-Core with a recipe. Collective under torchrun.

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
        processes: how many train at once, where no ranks have joined; by default as many as there are cores.
        tell: called before the first model is trained, with how many there will be and about how long it takes.

    Raises:
        InputError: a model of a width cannot be built, or the layout is not possible.
    """
    begun = time.monotonic()
    from mup_megatron.training.build import available_model

    target, recipe, without = _possible(target, recipe)
    shared, per_stage = layout.tensor_model_parallel_size, layout.num_layers_per_virtual_pipeline_stage
    target.require_tensor_parallel(shared)
    # A virtual pipeline has at least two stages on each rank, of so many layers each.
    stages = layout.pipeline_model_parallel_size * 2 * per_stage if per_stage else layout.pipeline_model_parallel_size
    small, small_recipe = condensed(target, recipe, tensor_parallel=shared, stages=stages)
    chosen, fewer = [*(widths or ())], []  # type: tuple[list[int], list[str]]
    if not chosen:
        chosen, fewer = usual_widths(small, small_recipe, tensor_parallel=shared)
    models = {w: available_model(m, layout) for w, m in models_for(small, small_recipe, chosen).items()}
    world = ranks.world_size()
    family = GPTFamily(recipe=small_recipe, models=models, cache=references, processes=usable_processes(processes))
    possible = replace(layout, train_iters=levels.EARLY.steps, global_batch_size=levels.EARLY.batch_size)
    deep = _Deep.of(target, recipe, chosen, layout)
    for model in (*models.values(), deep.model):
        # The models of a check are not trained over the recipe's horizon.
        require_possible(model, small_recipe.settled(), possible, world)
    subject = _Subject(family, layout, world, mutant, report, first_seed)
    alone = family.processes == 1
    with ranks.met() if alone else nullcontext(), ExitStack() as groups:
        if alone:
            groups.enter_context(subject.joined())

        def correct(rule: Rule) -> Measure:
            return lambda protocol: ranks.on_first_rank(lambda: family.reference(protocol, rule=rule, report=report))

        early = ranks.on_first_rank(lambda: family.correct(levels.EARLY))
        if tell is not None:
            tell(ranks.on_first_rank(lambda: _prediction(family, deep, level, seeds)))
        verdict = judge(
            Sides(
                subject=lambda protocol: subject.measured(protocol, range(first_seed, first_seed + seeds)),
                reference=correct(Rule.MUP),
                control=correct(Rule.STANDARD),
            ),
            Expectation(recipe=early, plans={w: early.plan(m) for w, m in family.plain.items()}, models=family.plain),
            level=level,
            fingerprint=recipe.fingerprint,
            extra=[lambda: subject.transfer()] if level is Level.FULL else [],
            remarks=[
                *without,
                *fewer,
                *_remarks(target, models, mutant),
                *ignored_processes(processes, family.processes),
            ],
        )
        groups.close()
        verdict = with_depth(verdict, subject.at_depth(deep))
    return replace(verdict, fingerprint=recipe.fingerprint, seconds=time.monotonic() - begun)


def usual_widths(target: ModelFile, recipe: Recipe, *, tensor_parallel: int) -> tuple[list[int], list[str]]:
    """Returns the widths of a check that nobody has chosen, and what is to be said of them.

    Args:
        target: as `condensed` leaves it.
        recipe: likewise.
        tensor_parallel: ranks that share heads and groups.

    Raises:
        InputError: as `affordable`.
    """
    return affordable(
        widths_for(target, recipe, levels.WIDTHS, tensor_parallel=tensor_parallel),
        lambda width: _shapes(at_width(target, recipe, width), recipe),
        tokens=SEQUENCE,
    )


def _possible(target: ModelFile, recipe: Recipe) -> tuple[ModelFile, Recipe, list[str]]:
    """Target and recipe without what this machine has no code for, and what is said of that."""
    from mup_megatron.megatron import cpu

    if not (cpu.is_enabled() and target.apply_layernorm_1p and recipe.megatron_base.apply_layernorm_1p):
        return target, recipe, []
    plain = {"apply_layernorm_1p": False}
    base = recipe.megatron_base.model_copy(update=plain)
    remark = (
        "apply_layernorm_1p: there is no such norm without a GPU. The models are built with gains that start at 1, "
        "which train alike; how the gains themselves are stored was not checked."
    )
    return target.model_copy(update=plain), recipe.model_copy(update={"base": base}), [remark]


def _prediction(family: GPTFamily, deep: "_Deep", level: Level, seeds: int) -> str:
    """Returns how many models there will be, and how long they take. The pilot has run."""
    some = next(iter(family.models.values()))
    return prediction(
        {width: _shapes(model, family.recipe) for width, model in family.plain.items()},
        tokens=some.seq_length,
        level=level,
        seeds=seeds,
        processes=family.processes,
        kept=family.is_kept,
        once=[([entry.shape for entry in deep.plan.entries], BUILT)],
        layers=f" of {some.num_layers} of {deep.model.num_layers} layers",
    )


def _shapes(model: ModelFile, recipe: Recipe) -> Shapes:
    return [entry.shape for entry in recipe.plan(model).entries]


@dataclass(frozen=True)
class _Deep:
    """A model of all of the target's layers, which is built and not trained."""

    model: ModelFile
    recipe: Recipe
    """Under stress."""
    plan: Plan
    """Of the model as the reference names its parameters."""

    @classmethod
    def of(cls, target: ModelFile, recipe: Recipe, widths: Sequence[int], layout: TrainingOptions) -> "_Deep":
        """At one of these widths, or at twice the widest: what is whole at a width is at twice it."""
        from mup_megatron.training.build import available_model

        small, small_recipe = condensed(target, recipe, tensor_parallel=layout.tensor_model_parallel_size, depth=None)
        possible = {w: at_width(small, small_recipe, w) for w in [*widths, 2 * max(widths)]}
        under_stress = stressed(small_recipe, steps=levels.EARLY.steps)
        local = {w: model.model_copy(update={"transformer_impl": "local"}) for w, model in possible.items()}
        width, plan = narrowest(possible, lambda width: under_stress.plan(local[width]))
        return cls(available_model(possible[width], layout), under_stress, plan)


@dataclass(frozen=True)
class _Subject:
    """Measures what is checked: in one process Megatron's groups have to be joined, and all of it is collective."""

    family: GPTFamily
    layout: TrainingOptions
    world_size: int
    mutant: "Mutant | None"
    report: Report | None
    first_seed: int

    def joined(self) -> AbstractContextManager[None]:
        """Megatron's groups."""
        return ranks.joined(
            tensor=self.layout.tensor_model_parallel_size,
            pipeline=self.layout.pipeline_model_parallel_size,
            virtual_stages=self.layout.virtual_stages(next(iter(self.family.models.values()))),
            seed=self.first_seed,
        )

    def measured(self, protocol: RunProtocol, seeds: Sequence[int]) -> Measurements:
        """Returns all runs of one length."""
        recipe = ranks.on_first_rank(lambda: self.family.at(protocol))
        jobs = [
            WorkerJob(width, partial(self._run, recipe, width, seed, protocol))
            for width in self.family.models
            for seed in seeds
        ]
        processes = self.family.processes
        within = nullcontext if processes == 1 else self.joined
        return Measurements(tuple(run_jobs(jobs, processes, counting(self.report, "subject", len(jobs)), within)))

    def _run(self, recipe: Recipe, width: int, seed: int, protocol: RunProtocol) -> MeasuredRun:
        from mup_megatron.check.measure.measuring import measure

        return measure(self._started(recipe, width, seed, protocol), protocol, width=width, seed=seed)

    def transfer(self) -> Section:
        """Returns the basins of the learning rate."""
        recipe = ranks.on_first_rank(lambda: self.family.at(levels.LATE))
        return self._apart(
            lambda: transfer_section(
                lambda width, seed, lr: self._started(at_rate(recipe, lr), width, seed, levels.LATE),
                [*self.family.models],
                recipe.hyperparameters.lr,
                self.first_seed,
                self.report,
            )
        )

    def _apart(self, work: Callable[[], Section]) -> Section:
        """Something that takes Megatron's groups: in a process of its own, if there are several at all."""
        if self.family.processes == 1:
            return work()
        [section] = run_jobs([WorkerJob(1, work)], self.family.processes, lambda _: None, self.joined)
        return section

    def _started(self, recipe: Recipe, width: int, seed: int, protocol: RunProtocol) -> "MegatronTrainee":
        """One model, freshly built, with its mistake."""
        seed = levels.run_seed(seed, list(self.family.models).index(width))
        return self._built(self.family.models[width], recipe, seed, protocol)

    def _built(self, model: ModelFile, recipe: Recipe, seed: int, protocol: RunProtocol) -> "MegatronTrainee":
        from mup_megatron.check.subjects.megatron import build_megatron

        plan, tamper = recipe.plan(model), None
        if self.mutant is not None:
            plan, tamper = self.mutant.mistaken(plan, recipe, model)
        return build_megatron(
            model,
            recipe,
            plan,
            seed=seed,
            protocol=protocol,
            layout=self.layout,
            world_size=self.world_size,
            tamper=tamper,
        )

    def at_depth(self, deep: _Deep) -> Section:
        """Returns all of the target's layers. Collective; Megatron's groups are joined anew, for its virtual stages."""
        width = deep.model.hidden_size
        alone = replace(self, family=replace(self.family, models={width: deep.model}))

        def compared() -> Section:
            trainee = alone._built(deep.model, deep.recipe, self.first_seed, levels.EARLY)
            return at_depth(deep.plan, width, trainee.parameters(), trainee.groups(), trainee.gathered)

        [section] = run_jobs([WorkerJob(1, compared)], self.family.processes, lambda _: None, alone.joined)
        return section


def _remarks(target: ModelFile, models: dict[int, ModelFile], mutant: "Mutant | None") -> list[str]:
    remarks = []
    some = next(iter(models.values()))
    if mutant is not None:
        remarks.append(f"With a deliberate mistake: {mutant.what}")
    if target.attention_dropout or target.hidden_dropout:
        remarks.append(WITHOUT_DROPOUT)
    if some.transformer_impl != target.transformer_impl:
        remarks.append("No GPU, so no Transformer Engine: the models are built with transformer_impl local.")
    return remarks
