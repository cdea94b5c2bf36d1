"""Learning rate × width on real text, four parametrizations side by side: if the best rate stays, and what it costs.

    python benchmarks/lr_width.py --published | --sixteenfold [-o results/lr_width]
    python benchmarks/lr_width.py --like megatron-3058 | --like nanogpt-mup
    python benchmarks/lr_width.py [--shapes …] [--arms …] [--widths 64 128 256 512 1024] [--seeds 3] [--jobs 2]
    python benchmarks/lr_width.py … --from benchmarks/tables/lr_width/runs.jsonl.gz

`--like` is the protocol of a sweep that others have published, on the proportional shape, at an eighth or a sixteenth
of its widths: rates an octave apart, as many as there, three seeds, and its arms with ours beside them.

Hyperparameters and schedule are those of `tables/lr_width/base.recipe.yaml`, unless `--recipe` says others. The search
that found them, for the proportional shape at width 64, is in docs/results/lr_width.md.

Shapes of a GPT, and one of BERT, each from a base of the first width on. A head has 32 channels, or all where a base
has fewer; what stays is what the base has:

    proportional    all widths grow
    ffn             the MLP stays as wide as the base's: 256 for a base of 64
    groups          the key/value heads stay, two for a base of 64, however many query heads
    heads           the number of heads stays, and they grow
    deeper          two layers, then as the root of width, with CompleteP's rule in ours
    experts         eight experts as wide as the stream, two of which see a token
    latent          latent attention whose ranks stay, half the base's width
    muon            proportional, stepped by Muon
    bert            a BERT, three and four times as wide as its base, as base and large are of the 256 wide proxy of TP5

Arms: `arms.py`. Each column is a basin: final losses over learning rates half an octave apart, until the best is not at
an end, each on several seeds. All arms of a rate and seed are trained in one process on the same batches; at the base
they have to agree, and the command fails if they do not. Its end says for each shape where optima are (vertices of
parabolas, with 95 % intervals from the seeds), by how many octaves they move, what the base's best rate costs in
percent of the loss, and if wider is better, at the best rate and at the base's in each tenth of training.

Finished runs are lines of `runs.jsonl`, and not repeated where machine and packages are the same. `lr_width.json` and a
picture for each shape are beside it; of `--like` and `--sixteenfold` one of each, with their name.
`--from` trains nothing: it tells what such a file says, wherever it was made.
"""

import argparse
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from lr_width_table import (
    ARM,
    EXACT,
    EXACT_AT_POWERS_OF_2,
    Agreement,
    Basin,
    Summary,
    agreement,
    agreement_lines,
    best_rate,
    broken,
    final,
    markdown,
    mean_final,
    overview,
    summary,
)
from many_runs import KeptRuns, basin_panels, counting, forked_workers, read_runs
from small_models import HEAD_SIZE, bert, dense, experts, latent

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.transfer import at_rate
from mup_megatron.recipe import Hyperparameters, Parametrization, Recipe, load_recipe

ARMS = ("standard", "native", "microsoft", "ours")
WIDTHS = (64, 128, 256, 512, 1024)
PUBLISHED = {
    **dict.fromkeys(("proportional", "ffn", "groups", "heads", "deeper", "experts", "latent", "muon"), (64, 128, 256)),
    "bert": (64, 192, 256),
}
"""Shape → the widths of the published tables."""
SIXTEENFOLD = {shape: (16, 64, 256) for shape in PUBLISHED if shape != "bert"}
"""Shape → widths from a base that is a quarter as wide. A BERT learns too little even at the published ones."""
PUBLISHED_RATES = 3
RECIPE = Path(__file__).parent / "tables" / "lr_width" / "base.recipe.yaml"
OCTAVE = 2
"""Rates in one."""


@dataclass(frozen=True)
class Protocol:
    """A sweep that others have published, in small."""

    widths: tuple[int, ...]
    octaves: tuple[int, int]
    """From the recipe's learning rate to the lowest and to the highest."""
    arms: tuple[str, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Returns the rates, in half octaves from the recipe's."""
        low, high = self.octaves
        return tuple(OCTAVE * octave for octave in range(low, high + 1))


PROTOCOLS = {
    # Widths 128 to 2048 there, and rates an octave apart; one seed, of which nothing has an interval.
    "megatron-3058": Protocol((16, 32, 64, 128, 256), (-5, 2), ("standard", "native", "ours")),
    # Widths 256 to 2048, twelve rates and three seeds there.
    "nanogpt-mup": Protocol((16, 32, 64, 128), (-8, 3), ("standard", "microsoft", "ours")),
}
PROTOCOLS_SHAPE = "proportional"
PROTOCOLS_SEEDS = 3
MOST = 10
"""Rates beyond the first ones, at one width."""
TIMED = 4
"""Steps of the runs by which the time is estimated."""
FEWEST = 3
"""Widths, and rates at each, from which an optimum and how it moves can be told."""
NARROWEST = 8
"""Of which a quarter is an even number of channels, as positions in latent attention need."""
NEAR = 1.5
"""Octaves from the base's best rate, in the picture of many shapes."""
FARTHEST = 40
"""Half octaves from the recipe's learning rate: beyond, no run is looked for in a file."""


@dataclass(frozen=True)
class Shape:
    """How a model grows."""

    model: Callable[[int, int], ModelFile]
    """By width, and the base's."""
    alpha: float | None = None
    """Of the rule of depth, in ours."""
    optimizer: str = "adam"

    def recipe(self, base: ModelFile, tuned: Recipe, rate: int) -> Recipe:
        """Returns the recipe of a base; `rate` counts half octaves from the learning rate that was tuned."""
        mode = {"muon_scale_mode": "unit_rms_norm"} if self.optimizer == "muon" else {}
        found = Recipe(
            base=base,
            hyperparameters=Hyperparameters.model_validate({**tuned.moved.model_dump(), **mode}),
            schedule=tuned.schedule,
            parametrization=Parametrization.model_validate(
                {"optimizer": self.optimizer, "depth": None if self.alpha is None else {"alpha": self.alpha}}
            ),
        )
        return at_rate(found, found.hyperparameters.lr * 2.0 ** (rate / OCTAVE))


def _head(base: int) -> int:
    return min(HEAD_SIZE, base)


def _proportional(width: int, base: int, **own: Any) -> ModelFile:
    return dense(width, head=_head(base), **own)


SHAPES: dict[str, Shape] = {
    "proportional": Shape(_proportional),
    "ffn": Shape(lambda width, base: _proportional(width, base, ffn_hidden_size=4 * base)),
    "groups": Shape(
        lambda width, base: _proportional(width, base, group_query_attention=True, num_query_groups=base // _head(base))
    ),
    "heads": Shape(lambda width, base: dense(width, num_attention_heads=base // _head(base))),
    "deeper": Shape(
        lambda width, base: _proportional(width, base, num_layers=round(2 * math.sqrt(width / base))), alpha=1.0
    ),
    "experts": Shape(lambda width, base: experts(width, head=_head(base))),
    "latent": Shape(lambda width, base: latent(width, rank=base // 2, head=_head(base))),
    "muon": Shape(_proportional, optimizer="muon"),
    "bert": Shape(lambda width, base: bert(width, head=_head(base))),
}


@dataclass(frozen=True)
class Settings:
    """All that is the same for every run."""

    widths: Mapping[str, tuple[int, ...]]
    """By shape; the first is the base's."""
    arms: tuple[str, ...]
    seeds: int
    rates: int
    steps: int
    batch: int
    tuned: Recipe
    grid: tuple[int, ...] = ()
    """The rates at every width, in half octaves from the recipe's; empty: as many as it takes."""

    def model(self, shape: str, width: int) -> ModelFile:
        """Returns a shape's model of a width."""
        return SHAPES[shape].model(width, self.widths[shape][0])

    def recipe(self, shape: str, rate: int) -> Recipe:
        """Returns a shape's recipe at a rate, in half octaves from the one that was tuned."""
        return SHAPES[shape].recipe(self.model(shape, self.widths[shape][0]), self.tuned, rate)


@dataclass
class Found:
    """The runs of a shape: of each arm and width, rows by rate and seed."""

    rows: dict[str, dict[int, dict[tuple[int, int], dict[str, Any]]]]
    refused: dict[str, str] = field(default_factory=dict)

    def basins(self, arm: str) -> dict[int, Basin]:
        """Returns the arm's basins by width."""
        basins: dict[int, dict[float, list[Any]]] = {}
        for width, rows in self.rows[arm].items():
            for row in rows.values():
                basins.setdefault(width, {}).setdefault(row["lr"], []).append(row["curve"])
        return {width: dict(sorted(basin.items())) for width, basin in basins.items()}

    def agreements(self, widths: Sequence[int]) -> dict[str, Agreement]:
        """Returns how each other arm's runs at these widths compare with ours; nothing where ours are not there."""

        def at(arm: str) -> dict[Any, dict[str, Any]]:
            return {(w, *key): row for w in widths for key, row in self.rows[arm].get(w, {}).items()}

        return {arm: agreement(at(ARM), at(arm)) for arm in self.rows if arm != ARM and ARM in self.rows}


def main() -> None:
    """Estimates, runs what is missing, prints the tables and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="[default: all]")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), help="three or more")
    asked.add_argument(
        "--published", action="store_true", help="widths and rates of the published tables: --estimate says how long"
    )
    asked.add_argument(
        "--sixteenfold",
        action="store_true",
        help="widths 16, 64 and 256, on every shape but BERT; rates as for --published; one picture of all",
    )
    asked.add_argument("--like", choices=PROTOCOLS, help="a published sweep in small, whatever else is said")
    parser.add_argument("--seeds", type=int, default=3, help="two or more")
    parser.add_argument("--rates", type=int, default=5, help="learning rates at first, at each width")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 64 tokens")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="whose hyperparameters and schedule the bases have")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and no more")
    parser.add_argument("--from", dest="kept", type=Path, metavar="RUNS", help="tell of the runs in a file, train none")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/lr_width"))
    arguments = parser.parse_args()
    if len(set(arguments.widths)) < FEWEST or arguments.seeds < 2 or arguments.rates < 1:
        parser.error("three widths, two seeds and a rate at least")
    base, *wider = sorted(set(arguments.widths))
    if base < NARROWEST or any(width % _head(base) for width in (base, *wider)):
        parser.error(f"widths are {NARROWEST} or more, and whole heads of {_head(base)}")
    like = None if arguments.like is None else PROTOCOLS[arguments.like]
    fixed = PUBLISHED if arguments.published else SIXTEENFOLD if arguments.sixteenfold else None
    widths = fixed or dict.fromkeys(SHAPES, (base, *wider))
    shapes = [PROTOCOLS_SHAPE] if like is not None else arguments.shapes or list(widths)
    if not widths.keys() >= {*shapes}:
        parser.error(f"--sixteenfold is for {', '.join(widths)}")
    settings = Settings(
        widths=widths,
        arms=tuple(arm for arm in ARMS if arm in arguments.arms),
        seeds=arguments.seeds,
        rates=PUBLISHED_RATES if fixed else arguments.rates,
        steps=arguments.steps,
        batch=arguments.batch,
        tuned=load_recipe(arguments.recipe),
    )
    if like is not None:
        own = {"widths": {PROTOCOLS_SHAPE: like.widths}, "arms": like.arms, "seeds": PROTOCOLS_SEEDS, "grid": like.grid}
        settings = replace(settings, **own)
    name = arguments.like or ("sixteenfold" if arguments.sixteenfold else "lr_width")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.kept is not None:
        _tell(_read(arguments.kept, shapes, settings), settings, arguments.output, name)
        return
    from mup_megatron.training.data.embedded import embedded_data

    with forked_workers(arguments.jobs, arguments.output / "runs.log") as pool:
        platform = _platform()  # before the data, which Megatron writes
        runs = Runs(settings, KeptRuns(arguments.output / "runs.jsonl"), pool, embedded_data(), platform)
        estimates = runs.estimates(shapes)
        print("\n".join(_estimate_lines(estimates, arguments.jobs)), flush=True)
        if arguments.estimate:
            return
        found = _swept(runs, estimates)
    _tell(found, settings, arguments.output, name)


def _read(file: Path, shapes: Sequence[str], settings: Settings) -> dict[str, Found]:
    """Returns the runs of a file that these settings ask for; no arms and shapes with too few of them for a verdict."""
    rows = read_runs(file)
    found = {}
    for shape in shapes:
        known: dict[str, dict[int, dict[tuple[int, int], dict[str, Any]]]] = {}
        rates = settings.grid or range(-FARTHEST, FARTHEST + 1)
        at = {settings.recipe(shape, rate).fingerprint: rate for rate in rates}
        models = {width: settings.model(shape, width).model_dump(mode="json") for width in settings.widths[shape]}
        for row in rows:
            arm, tuned, model, steps, batch, *_ = row["key"]
            asked = tuned in at and row["seed"] <= settings.seeds and (steps, batch) == (settings.steps, settings.batch)
            # Shapes may have a base in common, which is there once. A later model file may have more keys.
            own = models.get(row["width"])
            if asked and own is not None and all(own.get(key) == value for key, value in model.items()):
                known.setdefault(arm, {}).setdefault(row["width"], {})[at[tuned], row["seed"]] = row
        enough = {arm: _with_basins(known.get(arm, {}), settings.seeds) for arm in settings.arms}
        base = settings.widths[shape][0]
        if runs := {arm: of for arm, of in enough.items() if base in of and len(of) >= FEWEST}:
            found[shape] = Found(runs)
    return found


def _with_basins(of_arm: Mapping[int, dict[tuple[int, int], Any]], seeds: int) -> dict[int, dict[tuple[int, int], Any]]:
    """Returns the widths at which enough rates were run on every seed, in order, and of each those rates alone."""
    found = {}
    for width, rows in sorted(of_arm.items()):
        run = Counter(rate for rate, _ in rows)
        whole = {(rate, seed): row for (rate, seed), row in rows.items() if run[rate] == seeds}
        if len({rate for rate, _ in whole}) >= FEWEST:
            found[width] = whole
    return found


def _swept(runs: "Runs", estimates: Mapping[str, "Estimate"]) -> dict[str, Found]:
    """Returns the runs of every shape, those that were missing trained."""
    # The longest first, so that no process waits for one at the end.
    ordered = sorted(estimates, key=lambda shape: -estimates[shape].seconds)
    total = sum(estimate.runs for estimate in estimates.values())
    with counting("runs", total) as runs.done, ThreadPoolExecutor(len(ordered)) as threads:
        futures = {shape: threads.submit(runs.sweep, shape, estimates[shape].refused) for shape in ordered}
        return {shape: futures[shape].result() for shape in estimates}


# ---- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a shape's sweep will take."""

    runs: int
    seconds: float
    """Of one core."""
    refused: Mapping[str, str]
    """Arms that cannot be had, with why."""


class Runs:
    """Runs of all shapes: those that are kept, and new ones by worker processes. Threads may share it."""

    def __init__(self, settings: Settings, kept: KeptRuns, pool: Executor, data: Path, platform: Sequence[str]) -> None:
        self._settings, self._kept, self._pool, self._data = settings, kept, pool, data
        self._lock = threading.Lock()
        self._platform = platform
        self.done: Callable[[int], None] = lambda _runs: None
        """Is told how many more runs there are."""

    def estimates(self, shapes: Sequence[str]) -> dict[str, Estimate]:
        """Returns what each shape's sweep will take, from a few steps of every arm at every width."""
        s = self._settings
        at = [(shape, width) for shape in shapes for width in s.widths[shape]]
        started = [self._started(shape, width, 0, 1, s.arms, TIMED) for shape, width in at]
        measured = {key: future.result() for key, future in zip(at, started, strict=True)}
        return {shape: self._estimate([measured[shape, width] for width in s.widths[shape]]) for shape in shapes}

    def _estimate(self, measured: Sequence[Mapping[str, Mapping[str, Any]]]) -> Estimate:
        s = self._settings
        refused = {arm: row["refused"] for arms in measured for arm, row in arms.items() if "refused" in row}
        times = [row for arms in measured for arm, row in arms.items() if arm not in refused]
        # A rate more than at first, on average: the best is rarely in the middle at once.
        of_each = s.seeds * (len(s.grid) or s.rates + 1)
        seconds = sum(row["seconds"] + (s.steps - TIMED) * row["seconds_a_step"] for row in times)
        return Estimate(of_each * len(times), of_each * seconds, refused)

    def sweep(self, shape: str, refused: Mapping[str, str]) -> Found:
        """Returns the runs of a shape, one width after the other."""
        s = self._settings
        arms = [arm for arm in s.arms if arm not in refused]
        found = Found({arm: {} for arm in arms}, dict(refused))
        for width in s.widths[shape]:
            for arm in arms:
                found.rows[arm][width] = {}
            todo = {arm: set(s.grid) or self._first_rates(found.rows[arm]) for arm in arms}
            while any(todo.values()):
                self._train(shape, width, todo, found)
                most = len(s.grid) or s.rates + MOST
                todo = {arm: _further(found.rows[arm][width], most=most) for arm in arms}
        return found

    def _first_rates(self, rows: Mapping[int, Mapping[tuple[int, int], Mapping[str, Any]]]) -> set[int]:
        """Returns rates around the best of the width before, with the base's best among them."""
        widths = [width for width, found in rows.items() if found]
        middle = _best(rows[widths[-1]]) if widths else 0
        around = {middle + step - self._settings.rates // 2 for step in range(self._settings.rates)}
        return around | ({_best(rows[widths[0]])} if widths else set())

    def _train(self, shape: str, width: int, todo: Mapping[str, set[int]], found: Found) -> None:
        """Adds the runs of these rates, on all seeds."""
        started = []
        for rate in sorted(set().union(*todo.values())):
            for seed in range(1, self._settings.seeds + 1):
                wanted = [arm for arm, rates in todo.items() if rate in rates]
                known = {arm: self._kept.found(self._key(shape, width, rate, seed, arm)) for arm in wanted}
                missing = tuple(arm for arm in wanted if known[arm] is None)
                future = self._started(shape, width, rate, seed, missing, self._settings.steps) if missing else None
                started.append((rate, seed, known, future))
        for rate, seed, known, future in started:
            new = {} if future is None else future.result()
            for arm, row in known.items():
                row = row or self._keep(shape, width, rate, seed, arm, new[arm])
                found.rows[arm][width][rate, seed] = row
            self.done(len(known))

    def _keep(self, shape: str, width: int, rate: int, seed: int, arm: str, row: dict[str, Any]) -> dict[str, Any]:
        assert "refused" not in row, (shape, width, arm, row)
        recipe = self._settings.recipe(shape, rate)
        told = {"shape": shape, "arm": arm, "width": width, "lr": recipe.hyperparameters.lr, "seed": seed}
        with self._lock:
            return self._kept.add(self._key(shape, width, rate, seed, arm), **told, **row)

    def _key(self, shape: str, width: int, rate: int, seed: int, arm: str) -> list[Any]:
        s = self._settings
        model = s.model(shape, width).model_dump(mode="json")
        run = [s.steps, s.batch, seed, self._data.parent.name]
        return [arm, s.recipe(shape, rate).fingerprint, model, *run, *self._platform]

    def _started(
        self, shape: str, width: int, rate: int, seed: int, arms: tuple[str, ...], steps: int
    ) -> "Future[dict[str, dict[str, Any]]]":
        s = self._settings
        run = (s.model(shape, width), s.recipe(shape, rate), steps, s.batch, seed)
        return self._pool.submit(train, arms, run, self._data)


def train(arms: tuple[str, ...], run: tuple[Any, ...], data: Path) -> dict[str, dict[str, Any]]:
    """Trains a model under each arm, in a worker process; `run` is what `arms.Task` takes."""
    from arms import Task, train_arms

    return train_arms(arms, Task(*run), data)


def _best(rows: Mapping[tuple[int, int], Mapping[str, Any]]) -> int:
    rates = sorted({rate for rate, _ in rows})
    return min(rates, key=lambda rate: mean_final(row["curve"] for (own, _), row in rows.items() if own == rate))


def _further(rows: Mapping[tuple[int, int], Mapping[str, Any]], *, most: int) -> set[int]:
    """Returns the rates beside the best one that are not there yet; none once there are `most`."""
    rates = {rate for rate, _ in rows}
    return set() if len(rates) >= most else {_best(rows) - 1, _best(rows) + 1} - rates


def _platform() -> list[str]:
    """Returns what else digits depend on: packages, and what they run on."""
    from mup_megatron.training import ranks

    on_cpu = ranks.enable_cpu()
    found = []
    for name in ("torch", "megatron-core", "emerging-optimizers", "mup"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} –")
    return [*found, "cpu" if on_cpu else "gpu"]


# ---- telling -------------------------------------------------------------------------------------------------------


def _estimate_lines(estimates: Mapping[str, Estimate], jobs: int) -> list[str]:
    lines = [f"{shape}: about {e.runs} runs, {e.seconds / 60:.0f} minutes of a core" for shape, e in estimates.items()]
    seconds = sum(estimate.seconds for estimate in estimates.values())
    lines += [f"{shape}: no {arm}: {why}" for shape, e in estimates.items() for arm, why in e.refused.items()]
    return [*lines, f"in all about {seconds / 3600 / jobs:.1f} hours on {jobs} cores, less what is done already"]


def _tell(found: Mapping[str, Found], settings: Settings, output: Path, name: str) -> None:
    """Prints the tables, draws them, and exits where arms do not agree that have to."""
    problems, told, pictures = [], {}, {}
    of_arm: dict[str, dict[str, Summary]] = {arm: {} for arm in settings.arms}
    together = name == "sixteenfold"  # many shapes, of which most have ours alone
    for shape, runs in found.items():
        base, *wider = settings.widths[shape]
        basins = {arm: runs.basins(arm) for arm in runs.rows}
        summaries = {arm: summary(own) for arm, own in basins.items()}
        for arm, own in summaries.items():
            of_arm[arm][shape] = own
        if ARM in basins:
            pictures[shape] = basins[ARM]
        at_base, beyond = runs.agreements([base]), runs.agreements(wider)
        lines = [f"- {line}" for line in agreement_lines(base, at_base, beyond)]
        print("\n".join(["", f"## {shape}", "", *markdown(summaries, runs.refused), "", *lines]), flush=True)
        if basins and not together:
            (output / f"{shape if name == 'lr_width' else name}.png").write_bytes(_picture(basins, summaries))
        problems += broken(shape, base, at_base, _exact(settings.tuned.moved))
        told[shape] = {
            "arms": {arm: {**summaries[arm].to_json(), "losses": _losses(own)} for arm, own in basins.items()},
            "refused": runs.refused,
        }
    for arm, by_shape in of_arm.items():
        if len(by_shape) > 1:
            print("\n".join(["", *overview(arm, by_shape)]), flush=True)
    if pictures and together:
        (output / f"{name}.png").write_bytes(_picture_of_costs(pictures, of_arm[ARM]))
    run = {"seeds": settings.seeds, "steps": settings.steps, "batch": settings.batch}
    content = json.dumps({**run, "shapes": told}, indent=1) + "\n"
    (output / f"{name}.json").write_text(content, encoding="utf-8")
    if problems:
        raise SystemExit("\n".join(problems))


def _exact(tuned: Hyperparameters) -> tuple[str, ...]:
    multipliers = (tuned.embedding_multiplier, tuned.output_multiplier)
    return EXACT_AT_POWERS_OF_2 if all(math.frexp(value)[0] == 0.5 for value in multipliers) else EXACT


def _losses(basins: Mapping[int, Basin]) -> dict[int, dict[float, list[float | None]]]:
    return {w: {lr: [c and c[-1] for c in curves] for lr, curves in basin.items()} for w, basin in basins.items()}


def _picture(basins: Mapping[str, Mapping[int, Basin]], summaries: Mapping[str, Summary]) -> bytes:
    return basin_panels(
        {
            arm: {
                f"{width}": ({lr: [*map(final, c)] for lr, c in basin.items()}, summaries[arm].optima[width].log2_lr)
                for width, basin in own.items()
            }
            for arm, own in basins.items()
        }
    )


def _picture_of_costs(basins: Mapping[str, Mapping[int, Basin]], summaries: Mapping[str, Summary]) -> bytes:
    """Returns a PNG: for each shape and width, what a rate near the base's best costs."""
    panels = {}
    for shape, own in basins.items():
        found = summaries[shape]
        near = math.log2(best_rate(next(iter(own.values()))))
        panels[shape] = {
            f"{width}": (
                {
                    lr: [100 * (mean_final(curves) / found.least[width] - 1)]
                    for lr, curves in basin.items()
                    if abs(math.log2(lr) - near) <= NEAR
                },
                found.optima[width].log2_lr,
            )
            for width, basin in own.items()
        }
    return basin_panels(panels, what="above the width's best loss, %")


if __name__ == "__main__":
    main()
