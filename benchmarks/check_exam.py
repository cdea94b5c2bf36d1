"""The exam of `mup-megatron check`: mistakes that it was not made for, and right set-ups that it has to let pass.

    python benchmarks/check_exam.py [--part mistakes right] [--level quick standard] [--seeds 5] [--round 1]
        [--jobs 2] [--only NAME …] [-o results/check_exam.csv]

The mistakes (`benchmarks/exam/mistakes.py`) are other than those of `mup_megatron.check.mutants`. Each is made in a
small right set-up on several seeds, and has to have changed some trained weight by 2 % of the largest in its tensor
after 20 steps at the widest model; one that has not is no mistake, and is listed apart. Those that `quick` has not
found are looked at by `standard`: it has `quick` in it, from the same seeds, but for the one run that goes on, in place
of which all of its runs do. What fails by that alone is therefore looked at again too. `--every` looks at all.

The right set-ups (`benchmarks/exam/right.py`) are checked once each, at `quick`. Twenty have values at which a check
has a hard time; there a refusal that says what to change, or no verdict with a reason, is no false alarm, and is
counted.

Each finished check is a row of the CSV; a further call does not repeat those that were made with the same code of the
check. A mistake counts as caught where the check fails, or where the plug-in refuses the set-up with a message.
"""

import argparse
import csv
import fnmatch
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import check_rates
from rates.tables import commonest, share

PARTS, LEVELS = ("mistakes", "right"), ("quick", "standard")
CHANGED = 0.02
OF_QUICK_ALONE = ("later steps",)
"""Sections that `standard` has not, because its runs go on for as long."""
LIMIT = 600.0
"""Seconds after which a check counts as hanging."""


@dataclass(frozen=True)
class Job:
    """One check; of level "change", one measurement of what a mistake changes."""

    part: str
    name: str
    level: str
    seed: int


@dataclass(frozen=True)
class Row:
    """What came of it."""

    code: str
    part: str
    name: str
    level: str
    seed: int
    outcome: str
    """A verdict's; "refused" with a message of the plug-in's; "crash"; "hang"; or "changed"."""
    culprit: str = ""
    culprit_right: str = ""
    """Where anybody can say."""
    cause: str = ""
    sections: str = ""
    """Those that failed."""
    told: str = ""
    """The first finding, or the message."""
    change: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def job(self) -> Job:
        """Whose it is."""
        return Job(self.part, self.name, self.level, self.seed)

    @property
    def caught(self) -> bool:
        """Whether the user was stopped, and told."""
        return self.outcome in ("fail", "refused")

    @property
    def caught_at_standard_too(self) -> bool:
        """Whether a longer check from the same seeds is sure to stop the user as well."""
        return self.caught and self.sections not in OF_QUICK_ALONE


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--round", type=int, default=1, help="other seeds: who looked at one round's takes the next")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="patterns of names")
    parser.add_argument("--every", action="store_true", help="at standard, also what quick has caught")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/check_exam.csv"))
    arguments = parser.parse_args()
    from mup_megatron.training import ranks

    ranks.preload()
    log = _Log(arguments.output)
    for part in arguments.part:
        names = [n for n in _names(part) if not arguments.only or any(fnmatch.fnmatch(n, p) for p in arguments.only)]
        for level in ("change", *arguments.level) if part == "mistakes" else ("quick",):
            jobs = _jobs(part, level, names, arguments.seeds, log.rows(), every=arguments.every, turn=arguments.round)
            if not arguments.tables:
                _run(jobs, log, arguments.jobs)
    print(_tables(log.rows(), arguments.part))
    _say_if_other_code(log)


# ---- which checks --------------------------------------------------------------------------------------------------


def _names(part: str) -> list[str]:
    from exam.mistakes import MISTAKES
    from exam.right import RIGHT

    return list(MISTAKES if part == "mistakes" else RIGHT)


def _jobs(
    part: str, level: str, names: Sequence[str], seeds: int, rows: Sequence[Row], *, every: bool, turn: int
) -> list[Job]:
    """Those of a level, done or not."""
    if level == "change":
        return [Job(part, name, level, 0) for name in names]
    jobs = [
        Job(part, name, level, check_rates.seed_of(turn, part, name, index))
        for index in range(seeds if part == "mistakes" else 1)
        for name in names
    ]
    if level == "quick" or every:
        return jobs
    decided = {(row.name, row.seed) for row in rows if row.level == "quick" and row.caught_at_standard_too}
    return [job for job in jobs if (job.name, job.seed) not in decided]


# ---- running them --------------------------------------------------------------------------------------------------


class _Log:
    """The rows of finished checks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = check_rates.code_of_check()
        path.parent.mkdir(parents=True, exist_ok=True)

    def all_rows(self) -> list[Row]:
        """Of any code, the last of each job and code."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            found = [_row(content) for content in csv.DictReader(file)]
        return list({(row.code, row.job): row for row in found}.values())

    def rows(self) -> list[Row]:
        """Of this code."""
        return [row for row in self.all_rows() if row.code == self.code]

    def add(self, row: Row) -> None:
        """One more."""
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            if fresh:
                writer.writeheader()
            writer.writerow(asdict(row))


def _row(content: dict[str, str]) -> Row:
    numbers = {"seed": int(content["seed"]), **{key: float(content[key]) for key in ("change", "cpu_seconds")}}
    return Row(**{**content, **numbers})  # type: ignore[arg-type]


_Kept = dict[Any, Any]
_KEPT: _Kept = {}
"""Correct runs of torch modules. They do not depend on the seed of what is checked, so that each is trained once."""


def _run(jobs: Sequence[Job], log: _Log, workers: int) -> None:
    """A process for each check, forked after everything was imported."""
    done = {row.job for row in log.rows()}
    todo = [job for job in jobs if job not in done]
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[Job, Any, float]] = {}
    count = 0
    while todo or running:
        while todo and len(running) < workers:
            job = todo.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            arguments = (job, log.code, log.path.parent, ours, theirs)
            process = context.Process(target=_in_child, args=arguments)
            process.start()
            theirs.close()
            running[ours] = job, process, time.monotonic()
        ready = {c for c in wait(list(running), timeout=1.0) if isinstance(c, Connection)}
        late = {c for c, (_, _, begun) in running.items() if time.monotonic() - begun > LIMIT} - ready
        for connection in ready | late:
            job, process, begun = running.pop(connection)
            row = Row(log.code, **asdict(job), outcome="hang", told=f"after {LIMIT:.0f} s")
            if connection in ready:
                row = _received(connection, job, log.code)
            else:
                process.kill()
            process.join()
            log.add(row)
            count += 1
            what = f"change {row.change:.3g}" if job.level == "change" else f"{row.outcome} {row.culprit}"
            place, seconds = f"{count}/{count + len(todo) + len(running)}", time.monotonic() - begun
            print(f"[{place}] {job.level} {job.name} {job.seed}: {what} ({seconds:.0f} s)", flush=True)


def _received(connection: Connection, job: Job, code: str) -> Row:
    try:
        row, kept = connection.recv()
    except EOFError:
        return Row(code, **asdict(job), outcome="crash", told="the process ended without a result")
    _KEPT.update(kept)
    assert isinstance(row, Row)
    return row


def _in_child(job: Job, code: str, folder: Path, parents: Connection, connection: Connection) -> None:
    # So that it ends, and does not wait for ever, where the parent has.
    parents.close()
    descriptor = os.open(folder / "check_exam.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from mup_megatron.errors import InputError

    torch.set_num_threads(1)
    before = set(_KEPT)
    begun = time.process_time()
    try:
        found = _changed(job, folder) if job.level == "change" else _checked(job, folder)
    except InputError as error:
        found = {"outcome": "refused", "told": str(error)}
    except Exception as error:
        traceback.print_exc()
        found = {"outcome": "crash", "told": f"{type(error).__name__}: {error}"}
    told = " ".join(str(found.pop("told", "")).split())[:400]
    row = Row(code, **asdict(job), **found, told=told, cpu_seconds=round(time.process_time() - begun, 2))
    connection.send((row, {key: value for key, value in _KEPT.items() if key not in before}))


def _changed(job: Job, folder: Path) -> dict[str, Any]:
    from exam.mistakes import MISTAKES

    mistake = MISTAKES[job.name]
    right: Any = mistake.right
    wrong: Any = mistake.wrong
    change = check_rates.difference(right.trained(folder), wrong.trained(folder))
    return {"outcome": "changed" if change > CHANGED else "not changed", "change": round(change, 4)}


def _checked(job: Job, folder: Path) -> dict[str, Any]:
    from exam.mistakes import MISTAKES
    from exam.right import RIGHT
    from exam.setups import Extent

    from mup_megatron.check.verdict.comparison import findings

    setup = MISTAKES[job.name].wrong if job.part == "mistakes" else RIGHT[job.name].make()
    verdict = verdict_on(setup, Extent(level=job.level, seed=job.seed), folder / "references")
    failed = [section for section in verdict.sections if section.outcome == "fail"]
    unsure = [section for section in verdict.sections if section.outcome == "no verdict"]
    found = [finding for section in verdict.sections for finding in section.findings] or findings(verdict.comparison)
    lines = [line for section in failed or unsure for line in section.lines]
    told = found[0].sentence if found and failed else " ".join(lines)
    culprits = MISTAKES[job.name].culprits if job.part == "mistakes" else ()
    named = verdict.culprit or ""
    return {
        "outcome": verdict.outcome.value,
        "culprit": named,
        "culprit_right": str(any(fnmatch.fnmatch(named, c) for c in culprits)) if culprits and named else "",
        "cause": verdict.causes[0].name if verdict.causes else "",
        "sections": ", ".join(section.name for section in failed or unsure),
        "told": told,
    }


def verdict_on(setup: Any, extent: Any, references: Path) -> Any:
    """Returns the verdict on a set-up; those of one model share their correct runs.

    Args:
        setup: an `exam.setups.Setup`.
        extent: an `exam.setups.Extent`.
        references: the folder of correct runs of model files. Those of modules are kept within this process.
    """
    from exam.setups import Modules

    with _references_kept(setup.key) if isinstance(setup, Modules) else nullcontext():
        return setup.check(extent, references=references)


@contextmanager
def _references_kept(key: str) -> Iterator[None]:
    from mup_megatron.check.module_family import ModuleFamily
    from mup_megatron.recipe import Recipe

    train: Callable[..., Any] = ModuleFamily._correct

    def kept(self: ModuleFamily, *args: Any, **kwargs: Any) -> Any:
        said = [arg.fingerprint if isinstance(arg, Recipe) else repr(arg) for arg in (*args, *kwargs.items())]
        name = (key, self.widths, *said)
        if name not in _KEPT:
            _KEPT[name] = train(self, *args, **kwargs)
        return _KEPT[name]

    ModuleFamily._correct = kept  # type: ignore[method-assign]
    try:
        yield
    finally:
        ModuleFamily._correct = train  # type: ignore[method-assign]


# ---- telling what came out -----------------------------------------------------------------------------------------


def _say_if_other_code(log: _Log) -> None:
    others = len(log.all_rows()) - len(log.rows())
    if others:
        print(f"\n{others} rows of {log.path} are of other code of the check, and are not counted.")


def _tables(rows: Sequence[Row], parts: Sequence[str]) -> str:
    lines = []
    if "mistakes" in parts:
        lines += [*_mistakes(rows), "", *_totals(rows), ""]
    if "right" in parts:
        lines += [*_right(rows), ""]
    return "\n".join([*lines, *_times(rows)])


def _of(rows: Iterable[Row], level: str, name: str | None = None) -> list[Row]:
    return [r for r in rows if r.part == "mistakes" and r.level == level and name in (None, r.name)]


def _by_standard(rows: Sequence[Row], name: str) -> list[bool]:
    """Of each seed, what standard says of it, or quick where that decides; without those that nobody has looked at."""
    found = {row.seed: row.caught for row in _of(rows, "quick", name) if row.caught_at_standard_too}
    found |= {row.seed: row.caught for row in _of(rows, "standard", name)}
    return list(found.values())


def _mistakes(rows: Sequence[Row]) -> list[str]:
    from exam.mistakes import MISTAKES

    lines = [
        "| mistake | what it is | where | breaks | change | quick | standard | cause named most | culprit right |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    changes = {row.name: row for row in _of(rows, "change")}
    for name, mistake in MISTAKES.items():
        quick = _of(rows, "quick", name)
        standard = _by_standard(rows, name)
        caught = [row for level in LEVELS for row in _of(rows, level, name) if row.caught]
        known = [row.culprit_right == "True" for row in caught if row.culprit_right]
        change = changes.get(name)
        cells = [
            f"`{name}`",
            mistake.what,
            mistake.where,
            mistake.breaks,
            "" if change is None else f"{change.change:.2g}" if change.outcome.endswith("changed") else change.outcome,
            share(sum(row.caught for row in quick), len(quick)),
            share(sum(standard), len(standard)),
            commonest([row.cause or row.sections or row.outcome for row in caught]),
            share(sum(known), len(known)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _totals(rows: Sequence[Row]) -> list[str]:
    from exam.mistakes import MISTAKES

    no_mistake = {row.name for row in _of(rows, "change") if row.name in MISTAKES and row.outcome == "not changed"}
    names = [name for name in MISTAKES if name not in no_mistake and _of(rows, "quick", name)]
    lines = [
        "| where | mistakes | checks | caught at quick | at standard | no verdict at quick |",
        "|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys(MISTAKES[name].where for name in names)
    for kind in (*kinds, None):
        of_kind = [name for name in names if kind in (None, MISTAKES[name].where)]
        quick = [row for name in of_kind for row in _of(rows, "quick", name)]
        standard = [caught for name in of_kind for caught in _by_standard(rows, name)]
        cells = [
            kind or "all",
            str(len(of_kind)),
            str(len(quick)),
            _percent([row.caught for row in quick]),
            _percent(standard) + (f", {len(quick) - len(standard)} open" if len(standard) < len(quick) else ""),
            str(sum(row.outcome == "no verdict" for row in quick)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    counted = [row for name in names for level in LEVELS for row in _of(rows, level, name)]
    odd = [f"{row.name} ({row.level}, {row.seed}): {row.told}" for row in counted if row.outcome in ("crash", "hang")]
    lines += ["", f"Refused with a message: {sum(row.outcome == 'refused' for row in counted)} checks."]
    lines += [f"Neither verdict nor refusal: {'; '.join(odd) or 'none'}."]
    known = [row.culprit_right == "True" for row in counted if row.culprit_right]
    lines += [f"Of those caught where anybody can say what is at fault, named rightly: {_percent(known)}."]
    if no_mistake:
        lines += [f"Not counted, because the weights are not 2 % off: {', '.join(sorted(no_mistake))}."]
    return lines


def _percent(of: Sequence[bool]) -> str:
    return f"{sum(of)}/{len(of)} ({100 * sum(of) / len(of):.1f} %)" if of else ""


def _right(rows: Sequence[Row]) -> list[str]:
    from exam.right import RIGHT

    found = {row.name: row for row in rows if row.part == "right"}
    lines = ["| right set-ups | checks | pass | fail | refused | no verdict | crash |", "|---|---|---|---|---|---|---|"]
    kinds = dict.fromkeys(right.kind for right in RIGHT.values())
    for kind in (*kinds, None):
        of_kind = [found[n] for n, right in RIGHT.items() if n in found and kind in (None, right.kind)]
        outcomes = [row.outcome for row in of_kind]
        counts = [outcomes.count(o) for o in ("pass", "fail", "refused", "no verdict")]
        rest = len(outcomes) - sum(counts)
        lines.append(f"| {' | '.join([kind or 'all', str(len(outcomes)), *map(str, counts), str(rest)])} |")
    other = [
        f"- `{row.name}`: {row.outcome} {row.culprit}: {row.told}" for row in found.values() if row.outcome != "pass"
    ]
    return [*lines, "", *other]


def _times(rows: Sequence[Row]) -> list[str]:
    lines = ["| level | checks | CPU seconds, median | longest | all |", "|---|---|---|---|---|"]
    for level in LEVELS:
        seconds = [row.cpu_seconds for row in rows if row.level == level]
        if seconds:
            cells = [level, str(len(seconds)), *(f"{s:.1f}" for s in (median(seconds), max(seconds), sum(seconds)))]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "(Checks of one torch module share their correct runs; the first has trained them.)"]


if __name__ == "__main__":
    main()
