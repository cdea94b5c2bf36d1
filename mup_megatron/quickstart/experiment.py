"""The runs: a search and a grid of learning rates on the proxy, then the same grid at the wide model.

What is transferred is the best trial of the search with the best learning rate of the proxy's grid. Grid and seed are
fixed before the first run, and every run is reported. Not how it is shown: that is `report.py` and `picture.py`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.recipe import Recipe, save_recipe
from mup_megatron.search import ReportFn, Space, StudySpec, TrialOutcome, default_storage, run_sweep
from mup_megatron.search.jobs import run_jobs
from mup_megatron.search.space import SearchRange
from mup_megatron.search.worker import TrialJob
from mup_megatron.training.data.reading import check_prefix
from mup_megatron.training.options import TrainingOptions
from mup_megatron.tuning import ProxyTraining, transferred
from mup_megatron.validation import Strict, brief
from mup_megatron.yaml_io import dump_yaml

SPACE = Space(
    {
        "lr": SearchRange(2.0**-9, 2.0**-5, log=True),
        "embedding_multiplier": SearchRange(2.0, 16.0, log=True),
        "output_multiplier": SearchRange(1.0, 8.0, log=True),
    }
)
FIXED = {
    "hyperparameters": {"weight_decay": 0.1, "adam_beta2": 0.95},
    "schedule": {"lr_decay_style": "linear", "lr_warmup_fraction": 0.05},
}


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
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
        """Returns the model of a width: heads of one size, ffn 4× the width."""
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
        """Returns the options of every run."""
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
    """The result of a cell. A diverged run has a reason instead of a loss."""

    cell: Cell
    loss: float | None
    reason: str | None

    def row(self) -> dict[str, Any]:
        """Returns the run as JSON and CSV hold it."""
        return {**asdict(self.cell), "loss": self.loss, "reason": self.reason}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that was found."""

    settings: ExperimentSettings
    recipe: Recipe
    results: tuple[Result, ...]

    @property
    def lr(self) -> float:
        """The learning rate that is transferred."""
        return self.recipe.hyperparameters.lr

    def curve(self, width: int, rule: str) -> dict[float, float]:
        """Returns learning rate → loss of the runs that have one. At the proxy's width both rules are the same runs."""
        return curve(self.results, width, "mup" if width == self.settings.width else rule)


def curve(results: Iterable[Result], width: int, rule: str) -> dict[float, float]:
    """Returns learning rate → loss, of the runs at one width under one rule that have a loss."""
    return {
        result.cell.lr: result.loss
        for result in results
        if (result.cell.width, result.cell.rule) == (width, rule) and result.loss is not None
    }


Say = Callable[[str], None]
Tick = Callable[[int, int, str], None]


def run(
    settings: ExperimentSettings, data: Path, folder: Path, *, cache: Path, workers: int, say: Say, tick: Tick
) -> Experiment:
    """Runs the experiment, or what is left of it, into `folder`. Call `training.ranks.preload` before.

    Args:
        settings: the experiment's size and seed.
        data: prefix of the text.
        folder: gets everything. What an earlier call has finished there is not run again.
        cache: for Megatron's sample indices.
        workers: runs at a time.
        say: told of each part.
        tick: told of each run of the grid: how many are done, of how many, and what came of it.

    Raises:
        InputError: `folder` holds another experiment, or cannot be written; or every learning rate diverges on the
            proxy. What was in the folder is unchanged.
    """
    proxy, target = settings.model(settings.width), settings.model(settings.wide)
    options = settings.options(cache)
    objective = ProxyTraining(
        proxy=proxy, fixed=FIXED, data=data, data_sha256=check_prefix(data).bin_sha256, options=options
    )
    experiment = described(settings, objective)
    claim(folder, experiment)
    for name, model in (("proxy", proxy), ("target", target)):
        write_atomically(folder / f"{name}.yaml", dump_yaml(model.model_dump(mode="json", exclude_defaults=True)))
    say(f"1/3  tuning on the proxy, width {settings.width}: a search of {settings.trials} trials")
    searched = _searched(settings, objective, folder, workers)
    say(f"     and a grid of {len(settings.learning_rates)} learning rates with the best trial's other values")
    stored = GridFile(folder / "grid.json", {"experiment": experiment, "recipe": searched.fingerprint})
    narrow = grid(settings, settings.width, "mup")
    found = run_grid(GridTraining(settings, searched, data, options, narrow), stored, folder / "logs", workers, tick)
    recipe = with_best_lr(searched, curve(found, settings.width, "mup"))
    save_recipe(recipe, folder / "quickstart.recipe.yaml")
    say(f"2/3  the same grid at width {settings.wide}, with μP and with standard parametrization")
    wide = (*grid(settings, settings.wide, "mup"), *grid(settings, settings.wide, "standard"))
    found += run_grid(GridTraining(settings, searched, data, options, wide), stored, folder / "logs", workers, tick)
    return Experiment(settings=settings, recipe=recipe, results=found)


def described(settings: ExperimentSettings, objective: ProxyTraining) -> dict[str, Any]:
    """Returns all that the results depend on, as JSON gives it back. Another Python version has another text."""
    content = {
        **asdict(settings),
        "data_sha256": objective.data_sha256,
        "space": SPACE.to_json(),
        "fixed": dict(objective.fixed),
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def claim(folder: Path, experiment: Mapping[str, Any]) -> None:
    """Makes a folder this experiment's. A folder holds one: going on with another would mix the two.

    Raises:
        InputError: the folder is another experiment's, or it is not known whose. It is unchanged.
    """
    file = folder / "settings.json"
    remedy = f"Give another --output, or move {folder} away."
    if not file.exists():
        for name in ("study.db", "grid.json"):
            if (folder / name).exists():
                raise InputError(f"{folder / name}: there is no settings.json that says what it belongs to. {remedy}")
        write_atomically(file, json.dumps(experiment, indent=1))
        return
    recorded = _read_json(file)
    if not isinstance(recorded, dict):
        raise _not_of_the_quickstart(file)
    if recorded != experiment:
        changed = [
            f"{brief(key, 40)} was {brief(repr(recorded.get(key)), 80)} and is {brief(repr(experiment.get(key)), 80)}"
            for key in sorted({*recorded, *experiment})
            if recorded.get(key) != experiment.get(key)
        ]
        raise InputError(f"{file}: holds another experiment: {brief('; '.join(changed), 250)}. {remedy}")


def grid(settings: ExperimentSettings, width: int, rule: str) -> tuple[Cell, ...]:
    """Returns a run for every learning rate."""
    return tuple(Cell(width=width, rule=rule, lr=lr) for lr in settings.learning_rates)


def with_best_lr(searched: Recipe, narrow: Mapping[float, float]) -> Recipe:
    """Returns the recipe to transfer: the search's, with the best learning rate of the proxy's grid.

    Raises:
        InputError: every run of the grid diverged.
    """
    if not narrow:
        raise InputError("Every learning rate of the grid diverges on the proxy. Give another --seed and --output.")
    best = min(narrow, key=lambda lr: narrow[lr])
    return searched.model_copy(
        update={
            "hyperparameters": searched.hyperparameters.model_copy(update={"lr": best}),
            "provenance": {
                # The search's trial had a learning rate, and so a loss, of its own.
                "search": {**searched.provenance, "lr": searched.hyperparameters.lr},
                "lr_grid": {"lr": best, "loss": narrow[best]},
            },
        }
    )


@dataclass(frozen=True)
class GridTraining:
    """The objective of the grid: trains the cell whose index it is given."""

    settings: ExperimentSettings
    recipe: Recipe
    data: Path
    options: TrainingOptions
    cells: tuple[Cell, ...]

    def __call__(self, parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
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
        return TrialOutcome(loss=result.validation_loss, diverged=result.status == "diverged", reason=result.reason)


class _Row(Strict):
    """A run as the file has it."""

    width: int
    rule: str
    lr: float
    loss: float | None
    reason: str | None


@dataclass(frozen=True)
class GridFile:
    """The runs of the grid on disk, with what they belong to."""

    path: Path
    belongs_to: Mapping[str, Any]
    """As JSON gives it back. Runs of anything else are neither used nor lost: the file is refused."""

    def read(self) -> dict[Cell, Result]:
        """Returns the runs that are done so far.

        Raises:
            InputError: the file is of another experiment or recipe, or is not a grid at all.
        """
        if not self.path.exists():
            return {}
        content = _read_json(self.path)
        try:
            if content["belongs_to"] != self.belongs_to:
                raise InputError(
                    f"{self.path}: its runs belong to another experiment or another search than {self.path.parent} "
                    "holds. Move it away to have them run again, or give another --output."
                )
            rows = [_Row.model_validate(row) for row in content["runs"]]
        except (KeyError, TypeError, ValidationError):
            raise _not_of_the_quickstart(self.path) from None
        results = [
            Result(cell=Cell(width=row.width, rule=row.rule, lr=row.lr), loss=row.loss, reason=row.reason)
            for row in rows
        ]
        return {result.cell: result for result in results}

    def write(self, results: Iterable[Result]) -> None:
        """Replaces the file, whole or not at all."""
        content = {"belongs_to": self.belongs_to, "runs": [result.row() for result in results]}
        write_atomically(self.path, json.dumps(content, indent=1))


def _searched(settings: ExperimentSettings, objective: ProxyTraining, folder: Path, workers: int) -> Recipe:
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
    # A search without them could have another winner once they are run, and the grid would belong to the old one.
    if result.given_up:
        raise InputError(
            f"{folder / 'study.db'}: {len(result.given_up)} of {settings.trials} trials crashed, the last one with: "
            f"{result.given_up[-1].reason}. See {folder / 'logs' / 'search'}; the same command tries again."
        )
    if result.best is None:
        raise InputError(
            f"{folder / 'study.db'}: every trial of the search diverged. Give another --seed and --output."
        )
    return transferred(result.record)


def run_grid(objective: GridTraining, stored: GridFile, logs: Path, workers: int, tick: Tick) -> tuple[Result, ...]:
    """Runs the cells that are not stored yet, each stored as it ends; returns the results of all."""
    cells = objective.cells
    found = stored.read()

    def ended(job: TrialJob, outcome: TrialOutcome) -> None:
        cell = cells[job.number]
        outcome = outcome.checked()
        found[cell] = Result(cell=cell, loss=outcome.loss, reason=outcome.reason)
        stored.write(found.values())
        shown = f"loss {outcome.loss:.4f}" if outcome.loss is not None else f"diverged: {outcome.reason}"
        done = sum(cell in found for cell in cells)
        tick(done, len(cells), f"width {cell.width}, {cell.rule}, lr {cell.lr:.3g}: {shown}")

    missing = [TrialJob(index, {"cell": index}) for index, cell in enumerate(cells) if cell not in found]
    if missing:
        folder = logs / f"grid-{cells[0].width}"
        run_jobs(objective, missing, workers=workers, on_end=ended, log_folder=folder)
    return tuple(found[cell] for cell in cells)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}). Give another --output.") from None
    except (ValueError, RecursionError):
        raise _not_of_the_quickstart(file) from None


def _not_of_the_quickstart(file: Path) -> InputError:
    return InputError(f"{file}: not what the quickstart wrote. Give another --output, or move {file.parent} away.")
