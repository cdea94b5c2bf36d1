"""How often a check finds a deliberate mistake, how often it names the right cause, and how often it cries wolf.

    python benchmarks/check_rates.py [--round 1] [--output results/check-rates-1] [--jobs 2] [--parts quick-correct ...]

Parts:

    tune               correct models of the two architectures that thresholds were set on, seeds below 100
    quick-correct      100 correct models, which have to pass
    quick-mutants      each mistake of `mup_megatron.check.mutants` on 5 seeds, one architecture each, in turn
    standard-mutants   those that quick did not always find, on 3 seeds
    standard-correct   20 correct models

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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import mup_megatron
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family import gpt as family
from mup_megatron.check.family.stress import stressed
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.measurements import RunProtocol
from mup_megatron.check.mutants import MUTANTS, Context, Mutant
from mup_megatron.recipe import Recipe, recipe

PARTS = ("tune", "quick-correct", "quick-mutants", "standard-mutants", "standard-correct")
TUNE_SEEDS, CORRECT_QUICK, CORRECT_STANDARD, MUTANT_QUICK, MUTANT_STANDARD = 10, 100, 20, 5, 3
FIRST_SEED = 1000
COUNTED = RunProtocol(steps=20, recorded=(20,), spectral=False)
CHANGED = 1e-5
"""What some weight differs by after 20 steps, relative to the largest of its tensor: more than rounding."""

_GPT = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512, "seq_length": 64}
_UNTIED = {"untie_embeddings_and_output_weights": True}
_LLAMA = {
    **_GPT,
    **_UNTIED,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 192,
}
_VALUES = {
    "lr": 0.004,
    "min_lr": 0.0004,
    "init_method_std": 0.05,
    "embedding_multiplier": 2.0,
    "output_multiplier": 3.0,
    "attention_multiplier": 1.5,
    "weight_decay": 0.1,
}
_WIDE = {"hidden_size": 512, "num_attention_heads": 32}


@dataclass(frozen=True)
class Architecture:
    """A target and the recipe that it would be trained with."""

    target: ModelFile
    recipe: Recipe

    def context(self) -> Context:
        """At the widest model of a check."""
        width = family.widths_for(self.target, self.recipe, levels.WIDTHS)[-1]
        model = family.at_width(self.target, self.recipe, width)
        under_stress = stressed(self.recipe, steps=levels.EARLY.steps)
        return Context(base=self.recipe.megatron_base, target=model, recipe=under_stress, width=width)


def architecture(base: dict[str, Any], target: dict[str, Any], per_parameter: object = (), **values: float) -> Any:
    """An architecture, by what its target has other than its base."""
    content = {"base": base, "hyperparameters": {**_VALUES, **values}, "per_parameter": per_parameter}
    return Architecture(ModelFile(**{**base, **target}), recipe(content, source="check_rates.py"))


TUNING = {
    "tune-gpt": architecture({**_GPT, **_UNTIED}, _WIDE),
    "tune-llama": architecture({**_LLAMA, "num_query_groups": 4}, {**_WIDE, "num_query_groups": 32}, lr=0.008),
}
REPORT = {
    "gpt": architecture({**_GPT, **_UNTIED, "hidden_size": 32, "num_attention_heads": 2}, _WIDE, output_multiplier=2.0),
    "gpt, tied, fixed ffn": architecture({**_GPT, "ffn_hidden_size": 192}, _WIDE, embedding_multiplier=4.0),
    "llama": architecture(_LLAMA, {**_WIDE, "ffn_hidden_size": 1536}, lr=0.006),
    "gpt, wider heads": architecture(
        {**_GPT, **_UNTIED, "hidden_size": 32, "num_attention_heads": 4}, {**_WIDE, "num_attention_heads": 16}
    ),
    "deep, q/k norm, overrides": architecture(
        {**_GPT, **_UNTIED, "qk_layernorm": True},
        {**_WIDE, "num_layers": 4},
        [{"match": "*.linear_fc2.weight", "lr_mult": 2.0}, {"match": "embedding.*", "lr_mult": 0.5}],
        attention_multiplier=2.0,
    ),
}
ARCHITECTURES: dict[str, Architecture] = {**TUNING, **REPORT}


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
    parser.add_argument("--mutants", nargs="+", choices=sorted(MUTANTS), default=list(MUTANTS), metavar="NAME")
    arguments = parser.parse_args()
    output: Path = arguments.output or Path(f"results/check-rates-{arguments.round}")
    output.mkdir(parents=True, exist_ok=True)
    log = output / "checks.jsonl"
    for part in [part for part in PARTS if part in arguments.parts]:
        done = _done(log)
        jobs = _jobs(part, arguments.round, arguments.mutants, list(done.values()))
        _run([job for job in jobs if job not in done], log, arguments.jobs, part)
    print(_tables(list(_done(log).values())))


# ---- which checks --------------------------------------------------------------------------------------------------


def _jobs(part: str, round_: int, mutants: Sequence[str], results: Sequence[dict[str, Any]]) -> list[Job]:
    match part:
        case "tune":
            return [Job(part, a, None, "quick", 10 * i) for a in TUNING for i in range(TUNE_SEEDS)]
        case "quick-correct":
            return _correct(part, round_, "quick", CORRECT_QUICK)
        case "standard-correct":
            return _correct(part, round_, "standard", CORRECT_STANDARD)
        case "quick-mutants":
            return [job for name in mutants for job in _wrong(part, round_, name, "quick", MUTANT_QUICK)]
        case _:
            quick = _of(results, "quick-mutants")
            missed = [name for name in mutants if not all(map(_caught, _counted(quick, name)))]
            return [job for name in missed for job in _wrong(part, round_, name, "standard", MUTANT_STANDARD)]


def _correct(part: str, round_: int, level: str, count: int) -> list[Job]:
    """So many that differ: two seeds may coincide."""
    jobs: dict[Job, None] = {}
    index = 0
    while len(jobs) < count:
        architecture = list(REPORT)[index % len(REPORT)]
        jobs[Job(part, architecture, None, level, seed_of(round_, part, architecture, index))] = None
        index += 1
    return list(jobs)


def _wrong(part: str, round_: int, name: str, level: str, count: int) -> list[Job]:
    possible = [a for a, architecture in REPORT.items() if MUTANTS[name].when(architecture.context())]
    offset = list(MUTANTS).index(name)
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
            initializer=_start_worker,
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


def _start_worker(log: Path) -> None:
    """Imports once for many checks; what Megatron has to say goes to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from mup_megatron.training import ranks

    ranks.preload()
    import torch

    torch.set_num_threads(1)


def _check(job: Job, output: Path) -> dict[str, Any]:
    from mup_megatron.check.measure.levels import Level
    from mup_megatron.check.run_megatron import check_megatron
    from mup_megatron.check.verdict.comparison import findings

    architecture = ARCHITECTURES[job.architecture]
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


# ---- telling what came out -----------------------------------------------------------------------------------------


def _of(results: Iterable[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [result for result in results if result["job"]["part"] == part]


def _counted(results: Iterable[dict[str, Any]], mutant: str) -> list[dict[str, Any]]:
    return [r for r in results if r["job"]["mutant"] == mutant and r["change"] > CHANGED]


def _caught(result: dict[str, Any]) -> bool:
    return bool(result["outcome"] == "fail")


def _named_rightly(result: dict[str, Any]) -> bool:
    return bool(result["causes"]) and result["causes"][0][0] in MUTANTS[result["job"]["mutant"]].cause


def _tables(results: Sequence[dict[str, Any]]) -> str:
    parts = {part: _of(results, part) for part in PARTS}
    return "\n".join([*_mutants(parts), "", *_totals(parts), "", *_false_alarms(parts), "", *_times(results)])


def _mutants(parts: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| mistake | what it is | caught by quick | by standard | first seen in | cause named most often | right |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in MUTANTS:
        quick, standard = (_counted(parts[part], name) for part in ("quick-mutants", "standard-mutants"))
        caught = [result for result in quick + standard if _caught(result)]
        cells = [
            f"`{name}`",
            MUTANTS[name].what,
            share(sum(map(_caught, quick)), len(quick)),
            share(sum(map(_caught, standard)), len(standard)),
            commonest(result["quantity"] for result in caught),
            commonest(result["causes"][0][0] if result["causes"] else None for result in caught),
            share(sum(map(_named_rightly, caught)), len(caught)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _totals(parts: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["| level | mistakes | checks | caught | cause right, of those caught |", "|---|---|---|---|---|"]
    for level in ("quick", "standard"):
        of_level = [result for name in MUTANTS for result in _counted(parts[f"{level}-mutants"], name)]
        caught = [result for result in of_level if _caught(result)]
        kinds = len({result["job"]["mutant"] for result in of_level})
        right = share(sum(map(_named_rightly, caught)), len(caught))
        lines.append(f"| {level} | {kinds} | {len(of_level)} | {share(len(caught), len(of_level))} | {right} |")
    without = sum(r["change"] <= CHANGED for part in ("quick-mutants", "standard-mutants") for r in parts[part])
    return [*lines, "", f"{without} checks of a mistake that changed nothing are not counted."]


def _false_alarms(parts: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["| correct models | checks | fail | no verdict | what |", "|---|---|---|---|---|"]
    for part in ("tune", "quick-correct", "standard-correct"):
        failed = [result for result in parts[part] if _caught(result)]
        none = sum(result["outcome"] == "no verdict" for result in parts[part])
        what = "; ".join(f"{r['job']['architecture']}: {r['first'] or ', '.join(r['failed'])}" for r in failed)
        lines.append(f"| {part} | {len(parts[part])} | {len(failed)} | {none} | {what} |")
    return lines


def _times(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| level | checks | median | longest |", "|---|---|---|---|"]
    for level in ("quick", "standard"):
        seconds = [result["seconds"] for result in results if result["job"]["level"] == level]
        if seconds:
            lines.append(f"| {level} | {len(seconds)} | {median(seconds):.0f} s | {max(seconds):.0f} s |")
    return lines


def share(count: int, of: int) -> str:
    """So many of so many; nothing of none."""
    return f"{count}/{of}" if of else ""


def commonest(values: Iterable[str | None]) -> str:
    """The value that comes up most often."""
    known = [value for value in values if value is not None]
    return max(known, key=known.count) if known else ""


if __name__ == "__main__":
    main()
