"""`sweep`: a search on the proxy."""

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.table import Table

from mup_megatron.architectures.registry import load_model_file
from mup_megatron.cli.options import FILE, TRIAL_BATCH, TRIAL_ITERS, FiniteFloat
from mup_megatron.errors import InputError
from mup_megatron.recipe import load_recipe
from mup_megatron.search import (
    Ladder,
    Objectives,
    StudyRecord,
    StudySpec,
    default_storage,
    find_study,
    load_space,
    read_study,
    run_sweep,
    shown,
    write_results,
)
from mup_megatron.search.standing import standing
from mup_megatron.training.data.reading import check_prefix, require_vocab, small_vocabulary_warning
from mup_megatron.training.logs import require_wandb
from mup_megatron.training.options import TrainingOptions
from mup_megatron.training.ranks import preload
from mup_megatron.tuning import (
    DEFAULT_SPACE,
    SEARCHABLE,
    ProxyTraining,
    SearchSetup,
    at_rung,
    best_of,
    fixed_content,
    ladder_for,
    rung_names,
    settings_of,
)
from mup_megatron.tuning.memory import free_gpu_memory, free_memory, remark_on_memory

WORDS = ("report", "serve")
"""Words in place of the proxy's file, with a command each, in the module `sweep_WORD` beside this one."""

_GIVEN = "mup_megatron.sweep"
"""Where a context has the words that it was made of."""


class _SweepCommand(click.Command):
    """A search, or what one of the words is about. A file of such a name is written as ./report."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Returns the context of the command that the first word names."""
        if args and args[0] in WORDS:
            named: click.Command = importlib.import_module(f"mup_megatron.cli.sweep_{args[0]}").command
            return named.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        words = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[_GIVEN] = words
        return context


@click.command(cls=_SweepCommand)
@click.argument("proxy", type=FILE, metavar="PROXY.yaml")
@click.option("--data", type=FILE, required=True, metavar="D", help="Prefix of Megatron's .bin and .idx.")
@click.option("--trials", type=int, metavar="N", help="Size of the search, all calls together.")
@click.option("--budget", type=FiniteFloat(0, min_open=True), metavar="FLOPS",
              help="Instead of --trials: what a search over fidelities may cost.")  # fmt: skip
@click.option("--best", type=int, metavar="N", help="Instead of --trials: run the best N trials of another study …")
@click.option("--of", metavar="NAME", help="… which is this one, in the same --storage.")
@click.option("--accept-unfinished", is_flag=True, help="Although trials of that study have no result yet.")
@click.option("--study", required=True, metavar="NAME")
@click.option(
    "--storage",
    metavar="URL",
    help="sqlite:///FILE, journal:///FILE, grpc://HOST:PORT or a database. [default: sqlite:///results/NAME.db]",
)
@click.option("--space", type=FILE, metavar="FILE", help="What is searched. [default: as TP5 for GPT-3]")
@click.option("--recipe", "recipe_path", type=FILE, metavar="R", help="Values of what is not searched.")
@click.option("--sampler", type=click.Choice(["random", "tpe"]), help="[default: random]")
@click.option("--workers", type=int, default=1, show_default=True, help="Trials at a time on this machine.")
@click.option("--ray", is_flag=True, help="So many trials at a time on a Ray cluster instead.")
@click.option("--train-iters", type=int, default=TRIAL_ITERS, show_default=True)
@click.option("--global-batch-size", type=int, default=TRIAL_BATCH, show_default=True)
@click.option("--micro-batch-size", type=int, default=None)
@click.option(
    "--eval-iters", type=click.IntRange(1), default=10, show_default=True, help="Batches of the validation loss."
)
@click.option("--seed", type=int, default=1234, show_default=True, help="Of the draws, the weights and the data.")
@click.option("--bf16", is_flag=True)
@click.option("--wandb-project", metavar="NAME",
              help="Log each trial to Weights & Biases, as a run in a group named after the study.")  # fmt: skip
def command(
    proxy: Path,
    data: Path,
    trials: int | None,
    budget: float | None,
    best: int | None,
    of: str | None,
    accept_unfinished: bool,
    study: str,
    storage: str | None,
    space: Path | None,
    recipe_path: Path | None,
    sampler: Literal["random", "tpe"] | None,
    workers: int,
    ray: bool,
    train_iters: int,
    global_batch_size: int,
    micro_batch_size: int | None,
    eval_iters: int,
    seed: int,
    bf16: bool,
    wandb_project: str | None,
) -> None:
    """Search hyperparameters on PROXY. Stopped at any moment, the same command goes on.

    Every trial trains the proxy; its loss is the validation loss at the end. Start the command on several machines
    with one --storage to search in parallel.

    With --best N --of NAME a trial takes its hyperparameters from one of the best N of an earlier study, each once, to
    train longer or on other data.

    With --budget FLOPS most trials are of a narrower model and shorter; the best go on to longer ones of a wider model,
    and the last to whole ones of PROXY. What that comes to is shown before the first trial.

    `sweep report STUDY` shows what a search has found, also while it runs: see its --help.
    `sweep serve` is a storage for searches on many machines: see its --help.
    """
    _require_one_way(trials, budget, best, of)
    for_searches = {"--space": space, "--recipe": recipe_path, "--sampler": sampler}
    if of is not None and (dropped := [flag for flag, value in for_searches.items() if value is not None]):
        raise InputError(f"{dropped[0]}: with --of, all hyperparameters are those of study {of!r}. Drop it.")
    if of is None and accept_unfinished:
        raise InputError("--accept-unfinished: it is about the study that --of names. Drop it.")
    # Before torch is imported: trials beside each other must not fight for cores, and a trial's loss must not depend on
    # how many there are.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    model = load_model_file(proxy)
    own_storage = default_storage(study)  # refuses names that are no file names, also for what is written beside it
    searched = (
        _searched(space, recipe_path)
        if of is None
        else best_of(of, best or 0, study=study, storage=storage, proxy=model, accept_unfinished=accept_unfinished)
    )
    folder = Path("results") / study
    if wandb_project is not None:
        require_wandb()
    meta = check_prefix(data)
    require_vocab(meta, model.vocab_size, data=data, model=proxy)
    if (warning := small_vocabulary_warning(meta.vocab_size, model.vocab_size, data=data)) is not None:
        click.echo(warning, err=True)
    objective = ProxyTraining(
        proxy=model,
        fixed=searched.fixed,
        data=data,
        data_sha256=meta.bin_sha256,
        options=TrainingOptions(
            train_iters=train_iters,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
            eval_iters=eval_iters,
            bf16=bf16,
            output=None if wandb_project is None else folder / "wandb",
            wandb_project=wandb_project,
            wandb_group=study,
        ),
    )
    objective.require_possible(searched.space, source=str(space or "--space"))
    spec = StudySpec(
        name=study,
        storage=storage or own_storage,
        seed=seed,
        sampler="best" if searched.selection else sampler or "random",
        space=searched.space,
        context=objective.context(),
        selection=searched.selection,
    )
    objectives: Objectives = objective
    called: list[str] = []
    asked = trials or best or 0
    if budget is not None:
        found = find_study(spec.storage, study)
        ladder = ladder_for(objective, spec.space, budget, found, source=str(space or "--space"))
        spec, asked = replace(spec, ladder=ladder), ladder.trials
        objectives, called = [at_rung(objective, rung) for rung in ladder.rungs], rung_names(ladder)
        _show(ladder)
    csv_file, best_file = folder / "trials.csv", folder / "best.json"
    if ray:
        record = _run_on_ray(spec, workers)
        write_results(record, csv_file, best_file)
    else:
        free = free_memory if preload() else free_gpu_memory
        if (remark := remark_on_memory(model, objective.options, workers, free=free)) is not None:
            click.echo(remark, err=True)
        record = run_sweep(
            spec,
            objectives,
            asked,
            called=called,
            workers=workers,
            csv_file=csv_file,
            best_file=best_file,
            log_folder=folder / "logs",
            state_folder=folder / "checkpoints",
        ).record
    if record.best is None:
        remedy = (
            f"Their logs are in {folder / 'logs'}."
            if "failed" in record.unfinished
            else "Lower the learning rates of the space, under another --study."
        )
        click.echo(f"No trial is complete: all diverged or failed. {remedy}", err=True)
        sys.exit(1)
    click.echo(f"best: trial {record.best.number}, loss {record.best.loss:.6g}")
    for name, value in record.best.parameters.items():
        click.echo(f"  {name}: {value:.6g}")
    if budget is not None:
        click.echo(f"{standing(record).spent:.3g} of {budget:.3g} FLOPs spent", err=True)
    click.echo(f"All trials: {csv_file} and {shown(spec.storage)}", err=True)


def _require_one_way(trials: int | None, budget: float | None, best: int | None, of: str | None) -> None:
    """Raises InputError unless a search is told its size in one way."""
    if sum(each is not None for each in (trials, budget, best)) != 1 or (best is None) != (of is None):
        raise InputError(
            "How many trials? Either --trials N for a search, or --best N --of NAME for those of another. "
            "With --budget FLOPS the search decides it itself."
        )


def _run_on_ray(spec: StudySpec, workers: int) -> StudyRecord:
    """Has a Ray cluster run the study, and returns it. This machine need not be able to run a trial."""
    from mup_megatron.search.ray_tasks import run_on_ray

    words = [word for word in click.get_current_context().meta[_GIVEN] if word != "--ray"]
    if spec.storage.startswith("sqlite"):
        raise InputError("--ray: SQLite is for one machine. Give a --storage that all machines of the cluster reach.")
    run_on_ray(["sweep", *words, "--workers", "1"], workers, say=lambda text: click.echo(text, err=True))
    record = read_study(spec.storage, spec.name)
    if record.unfinished:
        missing = ", ".join(f"{count} {state}" for state, count in record.unfinished.items())
        click.echo(f"Trials without a result: {missing}. The same command tries again.", err=True)
    return record


def _show(ladder: Ladder) -> None:
    """Prints a ladder, on standard error."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("rung", "width", "steps", "trials", "FLOPs", "share"):
        table.add_column(title, justify="right")
    for number, rung in enumerate(ladder.rungs):
        settings = settings_of(rung)
        row = (number, settings.hidden_size, settings.train_iters, rung.trials)
        table.add_row(*map(str, row), f"{rung.cost:.3g}", f"{rung.cost / ladder.cost:.1%}")
    console = Console(stderr=True, highlight=False, width=1000)
    console.print(table)
    whole = ladder.rungs[-1].fidelity.cost
    console.print(
        f"{ladder.cost:.3g} FLOPs, as much as {ladder.cost / whole:.3g} whole trials. {ladder.candidates} of those "
        f"would be {ladder.candidates * whole:.3g}."
    )


def _searched(space: Path | None, recipe_path: Path | None) -> SearchSetup:
    """Returns what a search of its own varies, and what it leaves alone."""
    chosen = load_space(space, SEARCHABLE) if space else DEFAULT_SPACE
    given = load_recipe(recipe_path) if recipe_path else None
    if given is None and "lr" not in chosen.ranges:
        raise InputError(f"{space}: no lr in it. Search it, or give its value in a --recipe.")
    return SearchSetup(chosen, fixed_content(given))
