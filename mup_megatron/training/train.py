"""A training run from beginning to end: the one entry for the command line, a search's trials and the quickstart.

Says in which order things happen; how, is in the modules beside this one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mup_megatron.errors import InputError
from mup_megatron.models.model_file import ModelFile
from mup_megatron.recipe import Recipe
from mup_megatron.training import ranks
from mup_megatron.training.metrics import Row, divergence, train_loss
from mup_megatron.training.options import TrainingOptions, batch_sizes, require_possible

Report = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run came to; the same on every rank."""

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
    """Of this process, from the first iteration it did to the last, validation in between included."""


def run_training(
    model: ModelFile,
    recipe: Recipe,
    data: Path,
    options: TrainingOptions,
    *,
    report: Report | None = None,
) -> TrainingResult:
    """Trains `model` with `recipe` on the data at the prefix `data`. Collective under torchrun.

    Without torchrun it is a run of one process, which needs no port and leaves nothing behind, so that any number may
    follow each other in one process or go on beside each other in forked ones. It seeds the process's random numbers.

    Args:
        model: the target.
        recipe: tuned at a base; with `parametrization.rule: standard`, what is compared with it.
        data: what `mup-megatron data` made.
        options: all else.
        report: called on the first rank with iteration (from 1) and its loss, at every `log_interval`-th iteration and
            at the last; whatever it raises ends the run.

    Raises:
        InputError, theory.PlanError: the run is not possible; on every rank, and before anything is written.
    """
    ranks.enable_cpu()
    require_possible(model, recipe, options, ranks.world_size())
    with ranks.joined(
        tensor=options.tensor_model_parallel_size,
        pipeline=options.pipeline_model_parallel_size,
        virtual_stages=options.virtual_stages(model),
        seed=options.seed,
    ):
        return _run(model, recipe, data, options, report)


def _run(
    model: ModelFile, recipe: Recipe, data: Path, options: TrainingOptions, report: Report | None
) -> TrainingResult:
    from mup_megatron.training.build import available_model, build
    from mup_megatron.training.data.dataset import build_datasets
    from mup_megatron.training.loop import train_iteration, validation_loss

    model = available_model(model, options)
    plan = recipe.plan(model)
    ranks.on_first_rank(lambda: _require_vocabulary(model, data))
    sizes = batch_sizes(options, ranks.world_size())
    train_data, valid_data = build_datasets(
        data,
        seq_length=model.seq_length,
        train_samples=options.train_iters * options.global_batch_size,
        valid_samples=options.eval_iters * options.global_batch_size,
        seed=options.seed,
        split=options.split,
        cache_dir=options.data_cache_path,
    )
    built = build(model, recipe, plan, options, initialize=True)
    rows: list[Row] = []
    reason = None
    started = time.perf_counter()
    while reason is None and len(rows) < options.train_iters:
        lr = built.scheduler.get_lr({})
        measured = train_iteration(built, train_data, len(rows), sizes, problem=False)
        built.scheduler.step(increment=1)
        rows.append(Row(len(rows) + 1, measured.loss, lr, measured.grad_norm))
        reason = divergence(rows)
        last = reason is not None or len(rows) == options.train_iters
        if report is not None and ranks.is_first() and (last or len(rows) % options.log_interval == 0):
            report(len(rows), measured.loss)
    validation = None
    if reason is None and valid_data is not None:
        validation = validation_loss(built, valid_data, options.eval_iters, sizes)
    return TrainingResult(
        status="complete" if reason is None else "diverged",
        reason=reason,
        train_loss=train_loss(rows),
        validation_loss=validation,
        losses=tuple(row.loss for row in rows),
        iterations=len(rows),
        tokens=len(rows) * options.global_batch_size * model.seq_length,
        seconds=time.perf_counter() - started,
    )


def _require_vocabulary(model: ModelFile, data: Path) -> None:
    """Raises InputError if the data hold tokens that the model does not know."""
    from mup_megatron.training.data.indexed import at, check_prefix

    found = check_prefix(data).vocab_size
    if found > model.vocab_size:
        raise InputError(
            f"vocab_size {model.vocab_size} of the model is smaller than {found}, that of the data "
            f"({at(data, '.json')}). Raise it in the model file and the recipe's base, or use a smaller tokenizer."
        )
