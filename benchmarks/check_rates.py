"""How often a check finds a deliberate mistake, how often it names the right cause, and how often it cries wolf.

    python benchmarks/check_rates.py [--round 1] [--of families] [--output results/check-rates-1] [--jobs 2]
                                     [--parts quick-correct ...] [--mutants NAME ...] [--correct 100] [--seeds 5]

Parts:

    tune               correct models of the two architectures that thresholds were set on, seeds below 100
    quick-correct      100 correct models, which have to pass
    quick-mutants      each mistake of `mup_megatron.check.mutants` on 5 seeds, one architecture each, in turn
    standard-mutants   those that quick did not always find, on 3 seeds
    standard-correct   20 correct models

With `--of families` the models have experts, latent attention or Mamba layers instead: no `tune`, 60 correct models at
quick, and the mistakes that such layers invite. With `--of matrices` Muon or Lion trains them, with `--of moved` they
are deeper than their base or trained for another number of tokens, by rules for that: 40 correct ones each, and the
mistakes that these invite.

All but `tune` are on other architectures and on seeds from 1000 on, others in each round: whoever has looked at the
checks of one round to mend something takes the next for the figures. A mistake counts where it changes anything: where
some weight differs after 20 steps. Each finished check is a line of `checks.jsonl`; a further call does not repeat it
as long as the code of the check is the same. Without parts it only prints the tables of what is there.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from many_runs import start_worker
from rates.architectures import FAMILIES, MOVED, REPORT, TUNING, Architecture
from rates.architectures import MATRICES as BY_MATRICES
from rates.tables import PARTS, caught, counted, of_part, tables

import mup_megatron
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family import gpt as family
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.measurements import RunProtocol
from mup_megatron.check.mutants import MUTANTS, Context, Mutant
from mup_megatron.check.mutants.depth import DEPTH
from mup_megatron.check.mutants.experts import EXPERTS
from mup_megatron.check.mutants.horizon import HORIZON
from mup_megatron.check.mutants.latent import LATENT
from mup_megatron.check.mutants.matrices import MATRICES
from mup_megatron.recipe import Recipe

TUNE_SEEDS, MUTANT_QUICK, MUTANT_STANDARD, CORRECT_STANDARD = 10, 5, 3, 20
FIRST_SEED = 1000
COUNTED = RunProtocol(steps=20, recorded=(20,), spectral=False)
TRAPS = (
    *(mutant.name for mutant in (*EXPERTS, *LATENT)),
    "convolution-as-matrix",
    "residual-init-as-gpt",
    "attention-sqrt-d",
    "attention-scale-stock",
    "attention-own-factor-dropped",
    "one-width-ratio",
)
"""Mistakes that experts, latent attention and state spaces invite."""


@dataclass(frozen=True)
class Series:
    """Which checks are counted together."""

    architectures: Mapping[str, Architecture]
    mutants: Sequence[str]
    correct: int
    """Right models at quick."""
    tuning: Mapping[str, Architecture] = field(default_factory=dict)
    seeds: int = MUTANT_QUICK
    """Of each mistake at quick."""


SERIES = {
    "dense": Series(architectures=REPORT, tuning=TUNING, mutants=[*MUTANTS], correct=100),
    "families": Series(architectures=FAMILIES, mutants=TRAPS, correct=60),
    "matrices": Series(
        architectures=BY_MATRICES,
        mutants=[*(mutant.name for mutant in MATRICES), "standard-parametrization", "weight-decay-uncompensated"],
        correct=40,
    ),
    "moved": Series(architectures=MOVED, mutants=[mutant.name for mutant in (*DEPTH, *HORIZON)], correct=40),
}


@dataclass(frozen=True)
class Job:
    """One check."""

    part: str
    architecture: str
    mutant: str | None
    level: str
    seed: int


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round", type=int, default=1, help="chooses the seeds")
    parser.add_argument("--output", type=Path, help="a folder of its own for each round")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mutants", nargs="+", choices=sorted(MUTANTS), metavar="NAME")
    parser.add_argument("--of", choices=SERIES, default="dense", help="which models and mistakes")
    parser.add_argument("--correct", type=int, help="how many correct models at quick")
    parser.add_argument("--seeds", type=int, default=MUTANT_QUICK, help="of each mistake at quick")
    arguments = parser.parse_args()
    usual = SERIES[arguments.of]
    series = replace(
        usual,
        mutants=arguments.mutants or usual.mutants,
        correct=arguments.correct or usual.correct,
        seeds=arguments.seeds,
    )
    name = f"check-rates-{arguments.of}-{arguments.round}"
    output: Path = arguments.output or Path("results") / name
    output.mkdir(parents=True, exist_ok=True)
    log = output / "checks.jsonl"
    for part in [part for part in PARTS if part in arguments.parts]:
        done = _done(log)
        jobs = _jobs(part, series, arguments.round, list(done.values()))
        _run([job for job in jobs if job not in done], log, arguments.jobs, part)
    print(tables(list(_done(log).values())))


# ---- which checks --------------------------------------------------------------------------------------------------


def _jobs(part: str, series: Series, round_: int, results: Sequence[dict[str, Any]]) -> list[Job]:
    match part:
        case "tune":
            return [Job(part, a, None, "quick", 10 * i) for a in series.tuning for i in range(TUNE_SEEDS)]
        case "quick-correct":
            return _correct(part, series, round_, "quick", series.correct)
        case "standard-correct":
            return _correct(part, series, round_, "standard", CORRECT_STANDARD)
        case "quick-mutants":
            return [job for name in series.mutants for job in _wrong(part, series, round_, name, series.seeds)]
        case _:
            quick = of_part(results, "quick-mutants")
            missed = [name for name in series.mutants if not all(map(caught, counted(quick, name)))]
            return [job for name in missed for job in _wrong(part, series, round_, name, MUTANT_STANDARD)]


def _correct(part: str, series: Series, round_: int, level: str, count: int) -> list[Job]:
    """So many that differ: two seeds may coincide."""
    jobs: dict[Job, None] = {}
    names = list(series.architectures)
    index = 0
    while len(jobs) < count:
        architecture = names[index % len(names)]
        jobs[Job(part, architecture, None, level, seed_of(round_, part, architecture, index))] = None
        index += 1
    return list(jobs)


def _wrong(part: str, series: Series, round_: int, name: str, count: int) -> list[Job]:
    possible = [a for a, architecture in series.architectures.items() if MUTANTS[name].when(architecture.context())]
    offset, level = list(MUTANTS).index(name), part.partition("-")[0]
    chosen = [possible[(offset + i) % len(possible)] for i in range(count)] if possible else []
    return [Job(part, a, name, level, seed_of(round_, part, name, i)) for i, a in enumerate(chosen)]


def seed_of(round_: int, *what: object) -> int:
    """Of its own for each check, and below those of the references. A check uses this one and the next ones."""
    return FIRST_SEED + 10 * (zlib.crc32(repr((round_, *what)).encode()) % 800)


_WHAT_COUNTS = ("check", "huggingface", "megatron", "architectures", "modules", "theory", "training", "recipe.py")


def code_of_check() -> str:
    """Changes whenever a check could come out otherwise."""
    package = Path(mup_megatron.__file__).parent
    files = [file for name in _WHAT_COUNTS for file in sorted((package / name).rglob("*.py")) or [package / name]]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _done(log: Path) -> dict[Job, dict[str, Any]]:
    if not log.exists():
        return {}
    code = code_of_check()
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {Job(**line["job"]): line for line in lines if line["code"] == code}


# ---- running them --------------------------------------------------------------------------------------------------


def _run(jobs: Sequence[Job], log: Path, workers: int, title: str) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not jobs:
        return
    code = code_of_check()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(log.with_suffix(".log"),),
        ) as pool,
        log.open("a", encoding="utf-8") as file,
    ):
        task = progress.add_task(title, total=len(jobs))
        pending: dict[Future[dict[str, Any]], Job] = {pool.submit(_check, job, log.parent): job for job in jobs}
        for future in as_completed(pending):
            progress.advance(task)
            if (error := future.exception()) is not None:
                progress.print(f"{pending[future]}: {type(error).__name__}: {error}")
                continue
            file.write(json.dumps({"code": code, "job": asdict(pending[future]), **future.result()}) + "\n")
            file.flush()


def _check(job: Job, output: Path) -> dict[str, Any]:
    from mup_megatron.check.measure.levels import Level
    from mup_megatron.check.run_megatron import check_megatron
    from mup_megatron.check.verdict.comparison import findings

    architecture = {**TUNING, **REPORT, **FAMILIES, **BY_MATRICES, **MOVED}[job.architecture]
    mutant = None if job.mutant is None else MUTANTS[job.mutant]
    verdict = check_megatron(
        architecture.target,
        architecture.recipe,
        level=Level(job.level),
        first_seed=job.seed,
        mutant=mutant,
        references=output / "references",
    )
    found = findings(verdict.comparison)
    return {
        "outcome": verdict.outcome.value,
        "culprit": verdict.culprit,
        "causes": [[cause.name, cause.share] for cause in verdict.causes],
        "failed": [section.name for section in verdict.sections if section.outcome == "fail"],
        "first": found[0].sentence if found else None,
        "quantity": found[0].key.quantity.value if found else None,
        "seconds": verdict.seconds,
        "change": None if mutant is None else counts(mutant, architecture, output),
    }


_RIGHT: dict[tuple[object, ...], dict[str, Any]] = {}


def counts(mutant: Mutant, architecture: Architecture, output: Path) -> float:
    """How far the farthest weight is from where the correct run has it after 20 steps, relative to its tensor; as far
    as can be, of a mistake that is not about training's first steps.
    """
    if mutant.trains_alike:
        return math.inf
    width = family.widths_for(architecture.target, architecture.recipe, levels.WIDTHS)[-1]
    # By what the recipe says, because a mistake is made on several seeds of one architecture.
    key = (architecture.recipe.fingerprint, width, str(architecture.target))
    if key not in _RIGHT:
        _RIGHT[key] = trained(None, architecture, output, width)
    return difference(_RIGHT[key], trained(mutant, architecture, output, width))


def difference(right: Mapping[str, Any], wrong: Mapping[str, Any]) -> float:
    """How far the farthest of the weights that both have is off, relative to the largest of its tensor."""
    return max(
        float((wrong[name] - weight).abs().max() / weight.abs().max().clamp(min=1e-12))
        for name, weight in right.items()
        if name in wrong and wrong[name].shape == weight.shape
    )


def trained(mutant: Mutant | None, architecture: Architecture, output: Path, width: int) -> dict[str, Any]:
    """The weights of a model of a width after 20 steps, by name."""
    from mup_megatron.check.gpt_family import GPTFamily
    from mup_megatron.training import ranks
    from mup_megatron.training.build import available_model

    model = available_model(family.at_width(architecture.target, architecture.recipe, width), _one_process())
    of_one = GPTFamily(recipe=architecture.recipe, models={width: model}, cache=output / "references")
    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=1):
        return _weights_after(model, of_one.at(COUNTED), width, mutant)


def _one_process() -> Any:
    from mup_megatron.check.run_megatron import ONE_PROCESS

    return ONE_PROCESS


def _weights_after(model: ModelFile, stressed: Recipe, width: int, mutant: Mutant | None) -> dict[str, Any]:
    from mup_megatron.check.subjects.megatron import build_megatron

    context = Context(base=stressed.megatron_base, target=model, recipe=stressed, width=width)
    plan = stressed.plan(model)
    if mutant is not None and mutant.plan is not None:
        plan = mutant.plan(plan, context)
    trainee = build_megatron(
        model,
        stressed,
        plan,
        seed=1,
        protocol=COUNTED,
        layout=_one_process(),
        world_size=1,
        tamper=None if mutant is None else mutant.tamper(plan, context),
    )
    for step in range(COUNTED.steps):
        trainee.step(step)
    return {name: parameter.detach().clone() for name, parameter in trainee.parameters()}


if __name__ == "__main__":
    main()
