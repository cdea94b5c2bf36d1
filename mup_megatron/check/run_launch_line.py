"""A check of the model that a Megatron-LM launch line builds, in the layout that it has there: the line is run once for
each width and seed.

Importing this module imports neither torch nor Megatron.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.check.family.cost import rounded_duration
from mup_megatron.check.family.gpt import condensed, models_for, widths_for
from mup_megatron.check.family.sizes import DEPTH
from mup_megatron.check.gpt_family import GPTFamily
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import MeasuredRun, Measurements, Report, RunProtocol
from mup_megatron.check.reference import cache
from mup_megatron.check.subjects.launch_line import Execute, LaunchLine, LineBatch, result_of_line, run_line
from mup_megatron.check.subjects.run_request import RunRequest
from mup_megatron.check.verdict.judge import Expectation, Sides, judge
from mup_megatron.check.verdict.verdict import Verdict
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe, save_recipe
from mup_megatron.theory import Rule

WIDTHS = 3
"""Fewer than `levels.WIDTHS`: every run starts Megatron anew."""
SEEDS = 2
_OBJECTIVE = "next token"
"""The one whose batches are as the loop's own."""


def check_launch_line(
    words: Sequence[str],
    recipe: Recipe,
    *,
    level: Level = Level.QUICK,
    widths: Sequence[int] | None = None,
    seeds: int = SEEDS,
    first_seed: int = 1,
    references: Path | None = cache.FOLDER,
    report: Report | None = None,
    execute: Execute | None = None,
    tell: Callable[[str], None] | None = None,
) -> Verdict:
    """Returns a verdict on what a launch line would train with a recipe.

    Args:
        words: the line: launcher, script, flags.
        recipe: with which it is to be trained.
        level: how much is looked at; transfer is not, which the target's model file can be checked for.
        widths: hidden sizes of the models.
        seeds: of each width.
        first_seed: the first of them.
        references: folder of references that were measured before; None keeps none.
        report: called as models are done.
        execute: runs a command line; by default as a process of its own.
        tell: called before the first run, with how many there will be; and after it, with how long they take.

    Raises:
        InputError: the line cannot be read, its model does not go with the recipe, or it does not run.
    """
    begun = time.monotonic()
    line = LaunchLine.of(words)
    # The reference has its norms outside, as local layers do, and so have the names of what is measured.
    whole = line.model().model_copy(update={"transformer_impl": "local"})
    _require_own_data(whole)
    whole.require_tensor_parallel(line.tensor_parallel)
    target, recipe_here = condensed(
        whole,
        _local(recipe),
        tensor_parallel=line.tensor_parallel,
        stages=line.pipeline_parallel,
        depth=DEPTH if line.depth_is_free else None,
    )
    chosen = list(widths or widths_for(target, recipe_here, WIDTHS, tensor_parallel=line.tensor_parallel))
    models = models_for(target, recipe_here, chosen)
    for model in models.values():
        model.require_tensor_parallel(line.tensor_parallel)
    batch = line.batch(levels.EARLY.batch_size)
    family = GPTFamily(recipe=recipe_here, models=models, cache=references)

    def protocol_of(protocol: RunProtocol) -> RunProtocol:
        return replace(protocol, batch_size=batch.whole)

    with tempfile.TemporaryDirectory(prefix="mup-check-") as folder:
        runner = _Runner(line, recipe, family, Path(folder), batch, execute or run_line, report, tell)
        early = family.correct(protocol_of(levels.EARLY))
        verdict = judge(
            Sides(
                subject=lambda p: runner.measured(protocol_of(p), range(first_seed, first_seed + seeds)),
                reference=lambda p: family.reference(protocol_of(p), report=report),
                control=lambda p: family.reference(protocol_of(p), rule=Rule.STANDARD, report=report),
            ),
            Expectation(recipe=early, plans={w: early.plan(m) for w, m in models.items()}, models=models),
            level=level,
            fingerprint=recipe.fingerprint,
            remarks=_remarks(line, level),
        )
    return replace(verdict, seconds=time.monotonic() - begun)


def _require_own_data(model: ModelFile) -> None:
    """Raises InputError for a task whose batches the check cannot give to Megatron-LM's loop."""
    own = architecture_of(model)
    if own.objective != _OBJECTIVE:
        raise InputError(
            f"the launch line trains {own.description}, on batches that its script makes itself, and a check gives its "
            "own. Check its model file instead: mup-megatron check FILE --recipe RECIPE."
        )


def _local(recipe: Recipe) -> Recipe:
    base = recipe.megatron_base.model_copy(update={"transformer_impl": "local"})
    return recipe.model_copy(update={"base": base})


def _remarks(line: LaunchLine, level: Level) -> list[str]:
    remarks = ["Data, vocabulary and sequence length are the check's; the line's own were not read."]
    if any(word in ("--bf16", "--fp16") for word in line.flags):
        remarks.append("Trained in fp32: in half precision the movement of a weight could not be read.")
    if "--use-distributed-optimizer" in line.flags:
        remarks.append(
            "With the distributed optimizer over several data-parallel ranks no rank has whole gradients, so learning "
            "rates, eps and weight decay are not read from movements there."
        )
    if level is Level.FULL:
        remarks.append("Transfer of the learning rate was not tried: check the model file with --level full for that.")
    return remarks


@dataclass(frozen=True, slots=True)
class _Runner:
    line: LaunchLine
    recipe: Recipe
    family: GPTFamily
    folder: Path
    batch: LineBatch
    execute: Execute
    report: Report | None
    tell: Callable[[str], None] | None

    def measured(self, protocol: RunProtocol, seeds: Sequence[int]) -> Measurements:
        """Returns the line's runs, one after the other."""
        # As the user's own recipe, whose base may have Transformer Engine as the line has.
        stress = self.family.at(protocol)
        own = {"transformer_impl": self.recipe.megatron_base.transformer_impl}
        stress = stress.model_copy(update={"base": stress.megatron_base.model_copy(update=own)})
        path = self.folder / "check.recipe.yaml"
        save_recipe(stress.settled(), path)  # the line is run shorter than the recipe's horizon
        runs: list[MeasuredRun] = []
        total = len(self.family.models) * len(seeds)
        begun = time.monotonic()
        self._tell(f"{total} runs of the line, of {protocol.steps} steps each; the first one shows how long they take")
        for index, (width, model) in enumerate(self.family.models.items()):
            for seed in seeds:
                request = self.folder / f"{protocol.steps}-{width}-{seed}.json"
                RunRequest(width=width, seed=seed, protocol=protocol).write(request)
                words = self.line.measuring(
                    model,
                    path,
                    request,
                    seed=levels.run_seed(seed, index),
                    batch=self.batch,
                    steps=protocol.steps,
                )
                runs.append(result_of_line(words, request, self.execute(words)))
                if len(runs) == 1:
                    self._tell(f"{total - 1} more: {rounded_duration((total - 1) * (time.monotonic() - begun))}")
                if self.report is not None:
                    self.report("launch line", len(runs), total)
        return Measurements(tuple(runs))

    def _tell(self, what: str) -> None:
        if self.tell is not None:
            self.tell(what)
