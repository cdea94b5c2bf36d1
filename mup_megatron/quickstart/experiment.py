"""What is run: a search and a grid of learning rates on the proxy, then the same grid at the wide model.

What is transferred is the best trial of the search with the best learning rate of the proxy's grid. Grid and seed are
fixed before the first run, and every run is reported. Not how it is shown: that is `report.py` and `picture.py`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.models.model_file import ModelFile
from mup_megatron.recipe import Recipe, save_recipe
from mup_megatron.search import Outcome, ReportFn, Space, StudySpec, default_storage, run_sweep
from mup_megatron.search.jobs import run_jobs
from mup_megatron.search.space import Dimension
from mup_megatron.search.worker import Job
from mup_megatron.training.data.indexed import check_prefix
from mup_megatron.training.options import TrainingOptions
from mup_megatron.tuning import ProxyTraining, transferred
from mup_megatron.yaml_io import dump_yaml

SPACE = Space(
    {
        "lr": Dimension(2.0**-9, 2.0**-5, log=True),
        "embedding_multiplier": Dimension(2.0, 16.0, log=True),
        "output_multiplier": Dimension(1.0, 8.0, log=True),
    }
)
FIXED = {
    "hyperparameters": {"weight_decay": 0.1, "adam_beta2": 0.95},
    "schedule": {"lr_decay_style": "linear", "lr_warmup_fraction": 0.05},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the experiment. Defaults fit two CPU cores and a few minutes."""

    seed: int = 1
    width: int = 64
    widening: int = 4
    trials: int = 16
    learning_rates: tuple[float, ...] = tuple(2.0**power for power in range(-11, -3))
    """The grid, the same at both widths."""
    num_layers: int = 2
    head_size: int = 32
    vocab_size: int = 1024
    seq_length: int = 64
    train_iters: int = 150
    global_batch_size: int = 8
    eval_iters: int = 20

    def model(self, width: int) -> ModelFile:
        """The model of a width: heads of one size, ffn 4× the width."""
        return ModelFile(
            num_layers=self.num_layers,
            hidden_size=width,
            num_attention_heads=width // self.head_size,
            vocab_size=self.vocab_size,
            seq_length=self.seq_length,
            untie_embeddings_and_output_weights=True,
            transformer_impl="local",
        )

    @property
    def wide(self) -> int:
        """The target's width."""
        return self.width * self.widening

    def options(self, cache: Path) -> TrainingOptions:
        """How every run is trained."""
        return TrainingOptions(
            train_iters=self.train_iters,
            global_batch_size=self.global_batch_size,
            eval_iters=self.eval_iters,
            seed=self.seed,
            data_cache_path=cache,
        )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid."""

    width: int
    rule: str
    lr: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a cell came to. A diverged run has no loss."""

    cell: Cell
    loss: float | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that was found."""

    settings: Settings
    recipe: Recipe
    results: tuple[Result, ...]

    @property
    def lr(self) -> float:
        """The learning rate that is transferred."""
        return self.recipe.hyperparameters.lr

    def curve(self, width: int, rule: str) -> dict[float, float]:
        """Learning rate → loss, of the runs that have one. At the proxy's width both rules are the same runs."""
        return curve(self.results, width, "mup" if width == self.settings.width else rule)


def curve(results: Iterable[Result], width: int, rule: str) -> dict[float, float]:
    """Learning rate → loss, of the runs at one width under one rule that have a loss."""
    return {
        result.cell.lr: result.loss
        for result in results
        if (result.cell.width, result.cell.rule) == (width, rule) and result.loss is not None
    }


Say = Callable[[str], None]
Tick = Callable[[int, int, str], None]


def run(settings: Settings, data: Path, folder: Path, *, cache: Path, workers: int, say: Say, tick: Tick) -> Experiment:
    """Runs the experiment, or what is left of it, into `folder`. Call `training.ranks.preload` before.

    Raises:
        InputError: `folder` holds an experiment with other settings, or cannot be written.
    """
    _require_same(settings, folder)
    proxy, target = settings.model(settings.width), settings.model(settings.wide)
    for name, model in (("proxy", proxy), ("target", target)):
        write_atomically(folder / f"{name}.yaml", dump_yaml(model.model_dump(mode="json", exclude_defaults=True)))
    options = settings.options(cache)
    say(f"1/3  tuning on the proxy, width {settings.width}: a search of {settings.trials} trials")
    searched = _searched(settings, proxy, data, options, folder, workers)
    say(f"     and a grid of {len(settings.learning_rates)} learning rates with the best trial's other values")
    narrow = grid(settings, settings.width, "mup")
    found = _run_grid(narrow, GridTraining(settings, searched, data, options, narrow), folder, workers, tick)
    recipe = with_best_lr(searched, curve(found, settings.width, "mup"))
    save_recipe(recipe, folder / "quickstart.recipe.yaml")
    say(f"2/3  the same grid at width {settings.wide}, with μP and with standard parametrization")
    wide = (*grid(settings, settings.wide, "mup"), *grid(settings, settings.wide, "standard"))
    found += _run_grid(wide, GridTraining(settings, searched, data, options, wide), folder, workers, tick)
    return Experiment(settings=settings, recipe=recipe, results=found)


def grid(settings: Settings, width: int, rule: str) -> tuple[Cell, ...]:
    """A run for every learning rate."""
    return tuple(Cell(width=width, rule=rule, lr=lr) for lr in settings.learning_rates)


def with_best_lr(searched: Recipe, narrow: Mapping[float, float]) -> Recipe:
    """The recipe to transfer: the search's, with the best learning rate of the proxy's grid.

    Raises:
        InputError: every run of the grid diverged.
    """
    if not narrow:
        raise InputError("Every learning rate of the grid diverges on the proxy. Give another --seed.")
    best = min(narrow, key=lambda lr: narrow[lr])
    return searched.model_copy(
        update={
            "hyperparameters": searched.hyperparameters.model_copy(update={"lr": best}),
            "provenance": {**searched.provenance, "lr": f"best of a grid on the proxy, loss {narrow[best]!r}"},
        }
    )


@dataclass(frozen=True)
class GridTraining:
    """The objective of the grid: trains the cell whose index it is given."""

    settings: Settings
    recipe: Recipe
    data: Path
    options: TrainingOptions
    cells: tuple[Cell, ...]

    def __call__(self, parameters: Mapping[str, float], report: ReportFn) -> Outcome:
        """Runs one cell, in a process of its own."""
        from mup_megatron.training.train import run_training

        cell = self.cells[int(parameters["cell"])]
        recipe = self.recipe.model_copy(
            update={
                "hyperparameters": self.recipe.hyperparameters.model_copy(update={"lr": cell.lr}),
                "parametrization": self.recipe.parametrization.model_copy(update={"rule": cell.rule}),
            }
        )
        result = run_training(self.settings.model(cell.width), recipe, self.data, self.options)
        return Outcome(loss=result.validation_loss, diverged=result.status == "diverged", reason=result.reason)


def _searched(
    settings: Settings, proxy: ModelFile, data: Path, options: TrainingOptions, folder: Path, workers: int
) -> Recipe:
    objective = ProxyTraining(
        proxy=proxy, fixed=FIXED, data=data, data_sha256=check_prefix(data).bin_sha256, options=options
    )
    spec = StudySpec(
        name="quickstart",
        storage=default_storage("study", folder),
        seed=settings.seed,
        sampler="random",
        space=SPACE,
        context=objective.context(),
    )
    result = run_sweep(
        spec,
        objective,
        settings.trials,
        workers=workers,
        csv_file=folder / "trials.csv",
        log_folder=folder / "logs" / "search",
    )
    return transferred(result.record)


def _run_grid(
    cells: tuple[Cell, ...], objective: GridTraining, folder: Path, workers: int, tick: Tick
) -> tuple[Result, ...]:
    file = folder / "grid.json"
    found = _read_results(file)

    def ended(job: Job, outcome: Outcome) -> None:
        cell = cells[job.number]
        outcome = outcome.checked()
        found[cell] = Result(cell=cell, loss=outcome.loss, reason=outcome.reason)
        write_atomically(file, json.dumps([asdict(result) for result in found.values()], indent=1))
        shown = f"loss {outcome.loss:.4f}" if outcome.loss is not None else f"diverged: {outcome.reason}"
        done = sum(cell in found for cell in cells)
        tick(done, len(cells), f"width {cell.width}, {cell.rule}, lr {cell.lr:.3g}: {shown}")

    missing = [Job(index, {"cell": index}) for index, cell in enumerate(cells) if cell not in found]
    if missing:
        run_jobs(objective, missing, workers=workers, on_end=ended, log_folder=folder / "logs" / "grid")
    return tuple(found[cell] for cell in cells)


def _read_results(file: Path) -> dict[Cell, Result]:
    if not file.exists():
        return {}
    try:
        content: list[dict[str, Any]] = json.loads(file.read_text())
        results = [Result(**{**entry, "cell": Cell(**entry["cell"])}) for entry in content]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f"{file}: not what the quickstart wrote. Remove it; its runs are then done again.") from None
    return {result.cell: result for result in results}


def _require_same(settings: Settings, folder: Path) -> None:
    """A folder holds one experiment: going on with other settings would mix two."""
    file = folder / "settings.json"
    wanted = json.dumps(asdict(settings), indent=1)
    if file.exists() and file.read_text() != wanted:
        raise InputError(f"{folder}: holds an experiment with other settings. Give another --output, or remove it.")
    write_atomically(file, wanted)
