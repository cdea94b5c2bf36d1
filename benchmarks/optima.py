"""Where the best learning rate is, and whether it stays there: one table for each question.

    python benchmarks/optima.py [--tables experts latent choices depth muon] [--seeds 2] [--steps 100] [-o PATH]

Tables:

    experts    a GPT with experts that grow with width or stay, over widths 128 to 512, with μP and in standard
               parametrization
    latent     the same of latent attention, whose ranks grow or stay, with the defaults of a recipe at the base
    choices    at one width: other numbers of experts, of those that see a token, and sizes of one
    depth      at width 64 over 2 to 16 layers: no rule of depth, and CompleteP with α = 1 and ½
    muon       a GPT that Muon trains, over widths 64 to 256: two scale modes with μP, μP that leaves Muon's matrices
               alone, as Megatron's own does, and standard parametrization

Each column of a table is a basin: real training of Megatron-Core on the embedded text (quickstart's), at whole octaves
around the base's learning rate and beyond, until the best is not at an end. Its place is the vertex of a parabola, as
in `check --level full`. Finished runs are lines of `runs.jsonl`, and not repeated; pictures are beside it.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from many_runs import KeptRuns, basin_panels, bracketed, start_worker
from small_models import TUNED, deep, dense, experts, latent

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.transfer import EXTENSIONS, at_rate, learning_rates
from mup_megatron.check.verdict.basins import TransferResult, judge_transfer
from mup_megatron.recipe import Hyperparameters, Parametrization, PerParameter, Recipe, Schedule
from mup_megatron.training.options import TrainingOptions

LEARNING_RATE = 2.0**-7
RATES = 5
BATCH = 8
MATRICES = ("*.linear_qkv.weight", "*.linear_proj.weight", "*.linear_fc1.weight", "*.linear_fc2.weight")
"""All that Muon steps in a GPT without positions; with `spectral` μP's factor of each is 1/√r."""


@dataclass(frozen=True)
class Row:
    """Basins that are compared: targets of one base."""

    name: str
    base: ModelFile
    targets: Mapping[str, ModelFile]
    """By what a column says of it; the first is what the others are compared with."""
    rule: str = "mup"
    alpha: float | None = None
    """Of the rule of depth; None without one."""
    scale_mode: str | None = None
    """Muon's; None where Adam steps everything."""
    alone: bool = False
    """Whether Muon's matrices keep the base's learning rate at every width."""
    tuned: bool = True
    """Whether its base has the values of TUNED, else the defaults."""

    def recipe(self, column: str) -> Recipe:
        """Returns the recipe of the base for a column, at the middle of its learning rates."""
        values: dict[str, Any] = {**TUNED} if self.tuned else {}
        values |= {} if self.scale_mode is None else {"muon_scale_mode": self.scale_mode}
        growth = self.targets[column].hidden_size / self.base.hidden_size
        undone = [PerParameter(match=pattern, lr_mult=growth**0.5) for pattern in MATRICES] if self.alone else []
        return Recipe(
            base=self.base,
            hyperparameters=Hyperparameters.model_validate(
                {"lr": LEARNING_RATE, "min_lr": LEARNING_RATE / 10, "weight_decay": 0.01, **values}
            ),
            schedule=Schedule(lr_decay_style="linear", lr_warmup_fraction=0.1),
            parametrization=Parametrization.model_validate(
                {
                    "rule": self.rule,
                    "depth": None if self.alpha is None else {"alpha": self.alpha},
                    "optimizer": "adam" if self.scale_mode is None else "muon",
                }
            ),
            per_parameter=tuple(undone),
        )


WIDTHS = (128, 256, 512)
NARROW = (64, 128, 256)
DEPTHS = (2, 4, 8, 16)
RULES = {"mup": "μP", "standard": "standard"}


def _over_depths(name: str, alpha: float | None) -> Row:
    return Row(name, deep(DEPTHS[0]), {f"L {layers}": deep(layers) for layers in DEPTHS}, alpha=alpha)


def _over_widths(
    name: str, model: Callable[[int], ModelFile], rules: Sequence[str] = tuple(RULES), *, tuned: bool = True
) -> list[Row]:
    targets = {f"{width}": model(width) for width in WIDTHS}
    return [Row(f"{name}, {RULES[rule]}", model(WIDTHS[0]), targets, rule, tuned=tuned) for rule in rules]


def _with_muon(name: str, mode: str, rule: str = "mup", *, alone: bool = False) -> Row:
    targets = {f"{width}": dense(width) for width in NARROW}
    return Row(name, dense(NARROW[0]), targets, rule, scale_mode=mode, alone=alone)


TABLES: dict[str, Callable[[], Sequence[Row]]] = {
    "experts": lambda: [
        *_over_widths("experts grow", experts),
        *_over_widths("experts of 128", lambda width: experts(width, size=128), ["mup"]),
    ],
    "latent": lambda: [
        *_over_widths("ranks grow", lambda width: latent(width, rank=width // 2), tuned=False),
        *_over_widths("ranks of 64", lambda width: latent(width, rank=64), ["mup"], tuned=False),
    ],
    "choices": lambda: [
        Row(
            "width 128",
            experts(128),
            {
                "E8 k2 f128": experts(128),
                "E32 k2": experts(128, number=32),
                "E16 k8": experts(128, number=16, chosen=8),
                "E32 k8": experts(128, number=32, chosen=8),
                "E8 k2 f32": experts(128, size=32),
                "E32 k8 f32": experts(128, number=32, chosen=8, size=32),
            },
        )
    ],
    "depth": lambda: [_over_depths("no rule", None), _over_depths("α = 1", 1.0), _over_depths("α = ½", 0.5)],
    "muon": lambda: [
        _with_muon("μP, spectral", "spectral"),
        _with_muon("μP, unit_rms_norm", "unit_rms_norm"),
        _with_muon("μP, Muon's matrices alone, spectral", "spectral", alone=True),
        _with_muon("standard, spectral", "spectral", "standard"),
    ],
}


@dataclass(frozen=True)
class Length:
    """How long and how often each model is trained."""

    steps: int
    seeds: int


@dataclass(frozen=True)
class Job:
    """A basin."""

    table: str
    row: Row = field(repr=False)
    column: str
    length: Length


def main() -> None:
    """Runs what is missing, prints the tables and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/optima"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    length = Length(arguments.steps, arguments.seeds)
    rows = {table: TABLES[table]() for table in arguments.tables}
    jobs = [Job(table, row, column, length) for table in rows for row in rows[table] for column in row.targets]
    found = _run(jobs, arguments.output, arguments.jobs)
    for table, of_table in rows.items():
        results = {row.name: _judged(row, found) for row in of_table}
        print("\n".join(["", f"{table}:", "", *markdown(of_table, results)]))
        (arguments.output / f"{table}.png").write_bytes(picture(of_table, results))


def _judged(row: Row, found: Mapping[tuple[str, str], Mapping[float, Sequence[float]]]) -> TransferResult:
    return judge_transfer({index: found[row.name, column] for index, column in enumerate(row.targets)})


# ---- running -------------------------------------------------------------------------------------------------------


def _run(jobs: Sequence[Job], output: Path, workers: int) -> dict[tuple[str, str], Mapping[float, Sequence[float]]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from mup_megatron.training.data.embedded import embedded_data

    data = embedded_data()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: dict[tuple[str, str], Mapping[float, Sequence[float]]] = {}
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(output / "runs.log",),
            max_tasks_per_child=1,  # Megatron's wrappers hold on to a run's memory and threads
        ) as pool,
    ):
        task = progress.add_task("basins", total=len(jobs))
        # The long ones first, so that no process waits for one at the end.
        ordered = sorted(jobs, key=lambda job: -_work(job.row.targets[job.column]))
        pending = {pool.submit(basin, job, data, output): job for job in ordered}
        for future in as_completed(pending):
            job = pending[future]
            found[job.row.name, job.column] = future.result()
            progress.advance(task)
    return found


def _work(model: ModelFile) -> int:
    return model.num_layers * model.hidden_size**2


def basin(job: Job, data: Path, output: Path) -> dict[float, list[float]]:
    """Returns learning rate → the final losses of its seeds, at rates on either side of the best."""
    from mup_megatron.training.train import run_training

    kept, target, steps = KeptRuns(output / "runs.jsonl"), job.row.targets[job.column], job.length.steps

    def trained(lr: float, seed: int) -> float:
        recipe = at_rate(job.row.recipe(job.column), lr)
        options = TrainingOptions(train_iters=steps, global_batch_size=BATCH, eval_iters=0, seed=seed)
        return kept.loss(
            [recipe.fingerprint, target.model_dump(mode="json"), steps, seed],
            lambda: run_training(target, recipe, data, options),
            table=job.table,
            row=job.row.name,
            column=job.column,
            lr=lr,
            seed=seed,
        )

    return bracketed(
        lambda lr: [trained(lr, seed) for seed in range(1, job.length.seeds + 1)],
        learning_rates(LEARNING_RATE, RATES),
        most=RATES + EXTENSIONS,
        mean=fmean,
    )


# ---- telling -------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], results: Mapping[str, TransferResult]) -> list[str]:
    """Returns a table: log2 of the best learning rate of each basin, with its loss, and how far the last one moved."""
    columns = list(rows[0].targets)
    lines = [
        f"| | {' | '.join(columns)} | moved by, octaves |",
        f"|---|{'---|' * (len(columns) + 1)}",
    ]
    for row in rows:
        result = results[row.name]
        first = result.optima[0].log2_lr
        cells = [
            f"{optimum.log2_lr:.2f} ({optimum.low:.2f} … {optimum.high:.2f}), {least:.3f}"
            for optimum, least in zip(result.optima.values(), map(_least, result.losses.values()), strict=True)
        ]
        moves = [optimum.log2_lr - first for index, optimum in result.optima.items() if index]
        far = max(moves, key=abs)
        lines.append(f"| {row.name} | {' | '.join(cells)} | {far:+.2f} |")
    return lines


def _least(losses: Mapping[float, Sequence[float]]) -> float:
    return min(fmean(values) for values in losses.values())


def picture(rows: Sequence[Row], results: Mapping[str, TransferResult]) -> bytes:
    """Returns a PNG: loss over learning rate, a panel for each row and a line for each basin."""

    def lines(row: Row) -> dict[str, tuple[Mapping[float, Sequence[float]], float]]:
        result = results[row.name]
        return {
            column: (result.losses[index], result.optima[index].log2_lr) for index, column in enumerate(row.targets)
        }

    return basin_panels({row.name: lines(row) for row in rows})


if __name__ == "__main__":
    main()
