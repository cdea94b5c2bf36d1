"""A training run from beginning to end: the one entry for the command line, a search's trials and the quickstart.

Says in which order things happen; how, is in the modules beside this one.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import remarks_on
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan
from mup_megatron.training import ranks
from mup_megatron.training.data.reading import small_vocabulary_warning
from mup_megatron.training.metrics import TrainingRow, ValidationRow, divergence, train_loss
from mup_megatron.training.options import BatchSizes, TrainingOptions, batch_sizes, require_possible

if TYPE_CHECKING:
    from mup_megatron.training.build import Built
    from mup_megatron.training.checkpoint import Found
    from mup_megatron.training.identity import Identity
    from mup_megatron.training.record import Record

Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Stop:
    """A way to stop a run, which goes on when the same is started again."""

    folder: Path
    """Where its state is kept; it need not exist."""
    requested: Callable[[], bool]
    """True once the run is to stop; asked between iterations."""


class Stopped(Exception):
    """The run has stopped as requested, and kept its state."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The result of a run; the same on every rank."""

    status: Literal["complete", "diverged"]
    reason: str | None
    """Why it diverged."""
    train_loss: float
    """Mean over the last tenth of the iterations, at least one."""
    validation_loss: float | None
    """At the end. None without validation, and for a run that diverged."""
    losses: tuple[float, ...]
    """Of every iteration since the first, those before a resume included."""
    iterations: int
    tokens: int
    """Trained on, over all iterations."""
    seconds: float
    """Of this process, from its first iteration to the end of the last, validations and checkpoints included."""


def run_training(
    model: ModelFile,
    recipe: Recipe,
    data: Path,
    options: TrainingOptions,
    *,
    report: Report | None = None,
    stop: Stop | None = None,
    show: bool = False,
) -> TrainingResult:
    """Trains `model` with `recipe` on the data at the prefix `data`. Collective under torchrun.

    Without torchrun it is a run of one process, which needs no port and leaves nothing behind, so that any number may
    follow each other in one process or go on beside each other in forked ones. It seeds the process's random numbers.

    Args:
        model: the target.
        recipe: tuned at a base; with `parametrization.rule: standard`, what is compared with it.
        data: what `mup-megatron data` made.
        options: all else.
        report: called on the first rank with iteration (from 1) and its loss, at every `log_interval`-th
            iteration and at the one that completes the run; whatever it raises ends the run.
        stop: stops a run of one process that neither saves nor loads otherwise, and has it go on from there.
        show: progress on standard error.

    Raises:
        InputError: the run is not possible, on every rank and before anything is written; or the disk is full.
        Stopped: it was told to stop.
    """
    assert stop is None or (options.save is None and options.load is None and ranks.world_size() == 1)
    require_possible(model, recipe, options, ranks.world_size())
    ranks.enable_cpu()
    with ranks.joined(
        tensor=options.tensor_model_parallel_size,
        pipeline=options.pipeline_model_parallel_size,
        virtual_stages=options.virtual_stages(model),
        seed=options.seed,
        experts=options.expert_model_parallel_size,
        tensor_of_experts=options.expert_tensor_parallel_size,
    ):
        return _run(model, recipe, data, options, report, stop, show=show)


def _run(
    model: ModelFile,
    recipe: Recipe,
    data: Path,
    options: TrainingOptions,
    report: Report | None,
    stop: Stop | None,
    *,
    show: bool,
) -> TrainingResult:
    # These import Megatron, which has to come after the CPU runtime.
    from mup_megatron.training.build import available_model, build
    from mup_megatron.training.checkpoint import restore
    from mup_megatron.training.data.dataset import build_datasets
    from mup_megatron.training.identity import identity_of
    from mup_megatron.training.record import Record, require_usable

    asked, model = model, available_model(model, options)
    plan = recipe.plan(model)
    identity = ranks.on_first_rank(lambda: identity_of(model, recipe, data, options))
    _require_vocabulary(model, identity, data)
    warning = small_vocabulary_warning(identity["data"]["vocab_size"], model.vocab_size, data=data)
    for sentence in filter(None, [warning, *remarks_on(recipe.megatron_base, model)] if show else []):
        if ranks.is_first():
            print(sentence, file=sys.stderr)
    found = _checkpoint(options, stop)
    record = Record() if found is None else _record(found, identity, recipe, plan, options)
    if options.output is not None:
        output = options.output
        ranks.on_first_rank(lambda: require_usable(output, identity, resumed=found is not None))
    datasets = build_datasets(
        data,
        seq_length=model.seq_length,
        train_samples=options.train_iters * options.global_batch_size,
        valid_samples=options.eval_iters * options.global_batch_size,
        seed=options.seed,
        split=options.split,
        cache_dir=options.data_cache_path,
    )
    built = build(model, recipe, plan, options, initialize=found is None)
    if found is not None:
        restore(found, built)
    sizes = batch_sizes(options, ranks.world_size())
    run = _TrainingRun(model, recipe, data, options, plan, identity, sizes, record, report, stop)
    run.open(show=show)
    if model is not asked:
        record.say("No GPU, so no Transformer Engine: the model is built with transformer_impl local.")
    if found is not None:
        record.say(f"Going on from {found.folder}, after iteration {found.iteration}.")
    failed = True
    try:
        result = run.train(built, *datasets)
        failed = result.status == "diverged"
        return result
    finally:
        record.close(failed=failed)


def _require_vocabulary(model: ModelFile, identity: "Identity", data: Path) -> None:
    """Raises InputError if the data hold tokens that the model does not know."""
    found = identity["data"]["vocab_size"]
    if found > model.vocab_size:
        raise InputError(
            f"vocab_size {model.vocab_size} of the model is smaller than {found}, that of the data ({data}.json). "
            "Raise it in the model file and the recipe's base, or use a smaller tokenizer."
        )


def _checkpoint(options: TrainingOptions, stop: Stop | None) -> "Found | None":
    """Returns the checkpoint to go on from, if there is one. Collective.

    Raises:
        InputError: it is damaged, or the run would write among the checkpoints of another.
    """
    from mup_megatron.training import checkpoint
    from mup_megatron.training.record import CHECKPOINTED

    save, load = options.save, options.load
    same = options.saves_where_it_loads
    if stop is not None:
        load, same = stop.folder, True

    def choose() -> int | None:
        if save is not None and not same and checkpoint.latest(save) is not None:
            raise InputError(
                f"--save {save}: holds checkpoints already. Go on from them with --load {save}, or save elsewhere."
            )
        iteration = checkpoint.latest(load) if load is not None else None
        if iteration is None and load is not None and not same:
            raise InputError(
                f"--load {load}: no checkpoint there ({checkpoint.TRACKER} is missing). Check the path, or drop the "
                "flag to begin a run."
            )
        return iteration

    iteration = ranks.on_first_rank(choose)
    if iteration is None:
        return None
    assert load is not None
    return checkpoint.find(load, iteration, extras=CHECKPOINTED)


def _record(found: "Found", identity: "Identity", recipe: Recipe, plan: Plan, options: TrainingOptions) -> "Record":
    """Returns what a checkpoint's run has measured so far.

    Raises:
        InputError: what it says of its run is damaged, or it is another run.
    """
    from mup_megatron.training.checkpoint import EXTRAS
    from mup_megatron.training.record import Record, require_same_run

    folder = found.folder / EXTRAS
    require_same_run(found.extras, identity, recipe, plan, folder=folder, checkpoint=found.folder, remedy=found.remedy)
    if found.iteration > options.train_iters:
        raise InputError(f"{found.folder}: beyond the run's {options.train_iters} iterations. {found.remedy}")
    return Record.from_texts(found.extras, source=folder, iteration=found.iteration, remedy=found.remedy)


@dataclass
class _TrainingRun:
    """A run under way, on one rank."""

    model: ModelFile
    recipe: Recipe
    data: Path
    options: TrainingOptions
    plan: Plan
    identity: "Identity"
    sizes: BatchSizes
    record: "Record"
    report: Report | None
    stop: Stop | None

    def open(self, *, show: bool) -> None:
        """Files and logs, on the first rank. Collective; raises InputError on every rank."""
        ranks.on_first_rank(lambda: self._open(show=show))

    def _open(self, *, show: bool) -> None:
        from mup_megatron.training.logs import Bar, Lines, WandB
        from mup_megatron.training.record import described

        options = self.options
        if options.output is not None:
            self.record.open(options.output, self._texts())
            if options.wandb_project is not None:
                config = described(self.model, self.recipe, self.plan, options, self.data)
                self.record.add_log(WandB(options, options.output, config))
        if show:
            done = len(self.record.rows)
            bar = sys.stderr.isatty()
            self.record.add_log(Bar(options.train_iters, done) if bar else Lines(options.train_iters))

    def _texts(self) -> dict[str, str]:
        """Returns what says which run this is: for the output folder and for every checkpoint."""
        from mup_megatron.training import identity
        from mup_megatron.training.record import PLAN, RECIPE, RUN

        return {
            RUN: identity.to_text(self.identity),
            RECIPE: self.recipe.to_yaml(),
            PLAN: json.dumps(self.plan.to_json()) + "\n",
        }

    def train(self, built: "Built", train_data: Any, valid_data: Any) -> TrainingResult:
        """Runs all iterations that are left, with what belongs between and after them, and returns what came of it."""
        options, rows = self.options, self.record.rows
        started = time.perf_counter()
        reason = None
        saved = begun = len(rows)
        while reason is None and len(rows) < options.train_iters:
            self._stop_as_requested(built, begun)
            self._iteration(built, train_data)
            reason = divergence(rows)
            done = len(rows)
            if reason is not None or done == options.train_iters:
                break
            if options.eval_interval is not None and done % options.eval_interval == 0:
                self._validate(built, valid_data)
            if options.save_interval is not None and done % options.save_interval == 0:
                self._save(built, options.save)
                saved = done
        validation = None
        if reason is None:
            self._stop_as_requested(built, begun)
            validation = self._validate(built, valid_data)
            if options.save is not None and (saved < len(rows) or not options.saves_where_it_loads):
                self._save(built, options.save)
        result = TrainingResult(
            status="complete" if reason is None else "diverged",
            reason=reason,
            train_loss=train_loss(rows),
            validation_loss=validation,
            losses=tuple(row.loss for row in rows),
            iterations=len(rows),
            tokens=len(rows) * options.global_batch_size * self.model.seq_length,
            seconds=time.perf_counter() - started,
        )
        self._stop_if_a_rank_has_to()
        ranks.on_first_rank(lambda: self._write(result))
        return result

    def _iteration(self, built: "Built", train_data: Any) -> None:
        from mup_megatron.megatron.schedule import lr_per_role
        from mup_megatron.training.loop import train_iteration

        record, iteration = self.record, len(self.record.rows) + 1
        logged = iteration == self.options.train_iters or iteration % self.options.log_interval == 0
        lr = built.scheduler.get_lr({})
        lrs = lr_per_role(self.plan, lr) if logged else None
        problem = record.problem is not None
        measured = train_iteration(built, train_data, iteration - 1, self.sizes, problem=problem)
        if measured.problems:
            self._stop_if_a_rank_has_to()
        built.scheduler.step(increment=1)
        row = TrainingRow(iteration, measured.loss, lr, measured.grad_norm)
        record.add(row, lrs)
        if self.report is not None and logged and ranks.is_first():
            self.report(row.iteration, row.loss)

    def _validate(self, built: "Built", valid_data: Any) -> float | None:
        """Returns the validation loss after the iterations done; measured once, also across a resume."""
        from mup_megatron.training.loop import validation_loss

        done = len(self.record.rows)
        if valid_data is None:
            return None
        if self.record.validations and self.record.validations[-1].iteration == done:
            return self.record.validations[-1].loss
        loss = validation_loss(built, valid_data, self.options.eval_iters, self.sizes)
        self.record.add_validation(ValidationRow(done, loss))
        return loss

    def _stop_as_requested(self, built: "Built", begun: int) -> None:
        """Keeps the state and raises Stopped, if the run is to stop. It is kept already if no iteration was done."""
        if self.stop is None or not self.stop.requested():
            return
        if len(self.record.rows) > begun:
            from mup_megatron.training import checkpoint

            self._save(built, self.stop.folder)
            checkpoint.remove_others(self.stop.folder, len(self.record.rows))
        raise Stopped

    def _save(self, built: "Built", folder: Path | None) -> None:
        from mup_megatron.training import checkpoint

        assert folder is not None
        done = len(self.record.rows)
        checkpoint.save(folder, done, built, {**self._texts(), **self.record.texts()})

    def _stop_if_a_rank_has_to(self) -> None:
        """Raises InputError on every rank if one could not write what it had to. Collective."""
        from mup_megatron.collectives import raise_together

        raise_together([self.record.problem] if self.record.problem is not None else [])

    def _write(self, result: TrainingResult) -> None:
        from mup_megatron.training.record import described

        outcome = {key: value for key, value in asdict(result).items() if key != "losses"}
        if not math.isfinite(result.train_loss):
            outcome["train_loss"] = None  # JSON has no such number
        what = described(self.model, self.recipe, self.plan, self.options, self.data)
        self.record.write_result({**outcome, **what})
