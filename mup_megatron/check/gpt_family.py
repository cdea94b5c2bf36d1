"""The models of a check of a GPT, the recipe under stress, and the correct runs of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.stress import PILOT, Pilot, pilot_recipe, stressed_after, under_rule
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.measurements import MeasuredRun, Measurements, Report, RunProtocol
from mup_megatron.check.measure.workers import WorkerJob, run_jobs
from mup_megatron.check.reference import cache
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, Rule


@dataclass(frozen=True, kw_only=True)
class GPTFamily:
    """The models that a check trains: those of a target's shape, and the recipe under stress."""

    recipe: Recipe
    """The user's, with the base of the check."""
    models: dict[int, ModelFile]
    """Width → model, as it can be built here."""
    cache: Path | None
    processes: int = 1
    """How many train at once."""

    @cached_property
    def plain(self) -> dict[int, ModelFile]:
        """The same, with norms that are layers of their own, as the reference's are: the names of measurements."""
        return {w: model.model_copy(update={"transformer_impl": "local"}) for w, model in self.models.items()}

    def at(self, protocol: RunProtocol) -> Recipe:
        """Returns the recipe under stress for runs of this length."""
        return stressed_after(self._pilot, self.recipe, steps=protocol.steps)

    def correct(self, protocol: RunProtocol, rule: Rule = Rule.MUP) -> Recipe:
        """Returns the stressed recipe with the rules that are right, or with none."""
        return under_rule(self.at(protocol), rule)

    def reference(self, protocol: RunProtocol, *, rule: Rule = Rule.MUP, report: Report | None = None) -> Measurements:
        """Returns the correct runs, or those in standard parametrization: from the cache, or trained."""
        return self._kept(self._correct_runs(protocol, rule), report)

    def is_kept(self, protocol: RunProtocol, rule: Rule) -> bool:
        """Returns whether its correct runs are in the cache."""
        return cache.has(self.cache, self._correct_runs(protocol, rule).facts)

    def _correct_runs(self, protocol: RunProtocol, rule: Rule) -> "_Correct":
        what = "reference" if rule is Rule.MUP else "control"
        seeds = range(levels.FIRST_REFERENCE_SEED, levels.FIRST_REFERENCE_SEED + levels.correct_seeds(rule))
        return _Correct(self.plain, self.correct(protocol, rule), protocol, seeds, what)

    def _kept(self, runs: "_Correct", report: Report | None) -> Measurements:
        return cache.cached(self.cache, runs.facts, lambda: runs.trained(self.processes, report))

    @cached_property
    def _pilot(self) -> Pilot:
        recipe = pilot_recipe(self.recipe)
        width, model = next(iter(self.plain.items()))
        seeds = range(levels.FIRST_REFERENCE_SEED, levels.FIRST_REFERENCE_SEED + 1)
        [run] = self._kept(_Correct({width: model}, recipe, PILOT, seeds, "pilot"), None).runs
        return Pilot(run, recipe, recipe.plan(model))


@dataclass(frozen=True)
class _Correct:
    """Runs of the reference or of the control."""

    models: dict[int, ModelFile]
    recipe: Recipe
    protocol: RunProtocol
    seeds: Sequence[int]
    what: str

    @property
    def facts(self) -> object:
        """Returns what they follow from."""
        shapes = [model.model_dump(mode="json") for model in self.models.values()]
        return [self.recipe.fingerprint, shapes, self.protocol.fingerprint(), list(self.seeds)]

    def trained(self, processes: int, report: Report | None) -> Measurements:
        """Returns all of them."""
        plans = {width: self.recipe.plan(model) for width, model in self.models.items()}
        jobs = [
            WorkerJob(width, partial(self._run, plans[width], index, width, seed))
            for index, width in enumerate(self.models)
            for seed in self.seeds
        ]
        return Measurements(tuple(run_jobs(jobs, processes, counting(report, self.what, len(jobs)))))

    def _run(self, plan: Plan, index: int, width: int, seed: int) -> MeasuredRun:
        from mup_megatron.check.measure.measuring import measure
        from mup_megatron.check.reference.gpt import Reference

        model = self.models[width]
        trainee = Reference(
            model,
            self.recipe,
            plan,
            seed=levels.run_seed(seed, index),
            steps=self.protocol.steps,
            batch_size=self.protocol.batch_size,
        )
        return measure(trainee, self.protocol, width=width, seed=seed)


def counting(report: Report | None, what: str, total: int) -> Callable[[int], None]:
    """Returns what tells that so many of all models are done."""
    return lambda count: None if report is None else report(what, count, total)
