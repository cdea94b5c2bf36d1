"""Damages the files that commands read and sees that each command ends with 0, 1 or 2, in time, and says why in words.

    python benchmarks/fuzz.py --cases 10000 --seed 1
    python benchmarks/fuzz.py --target 'sweep*' --cases 500 --jobs 1
    python benchmarks/fuzz.py --seed 1 --only 4711          # one case again, and what it was

A case is made from the seed and its number alone. Everything is imported once; each case is a fork of that, in a folder
of its own, with limits on CPU time, memory and sizes of files. Given again, the command goes on where it was stopped.

It ends with 1 and a folder for every kind of failure: a traceback, a crash, a hang, code that a file made run, a file
left half written or lost, or a sentence of more than 1,000 characters.
"""

import argparse
import contextlib
import fnmatch
import gc
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["RUST_BACKTRACE"] = "0"  # a panic of the tokenizers library is caught, and not told of twice

import fuzz_mutators as mutators
from fuzz_targets import ROOT, TARGETS, Target, make_inputs

RESULTS = ROOT / "results" / "fuzz"
CPU_S = 20
"""What a case may take: seconds of CPU time …"""
WALL_S = 20 * CPU_S
"""… and of the clock, which on a busy machine says little."""
MEMORY = 6 << 30
LONGEST_SENTENCE = 1000
UNCAUGHT = 70
"""Exit code of a case that left the command line with an exception."""


@dataclass(frozen=True)
class Case:
    """One damaged input and the command that reads it."""

    number: int
    target: str
    words: tuple[str, ...]
    damage: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    number: int
    target: str
    code: int
    """Exit code; negative: the signal that ended it."""
    failure: str | None
    """What is wrong with it, in a few words; None: nothing."""
    seconds: float
    """Of CPU."""
    damage: tuple[str, ...]


# ---- a case --------------------------------------------------------------------------------------------------------


def draw(seed: int, number: int, names: Sequence[str]) -> tuple[str, Random]:
    """The target of a case, and the generator that goes on from there."""
    random = Random(f"{seed}/{number}")
    weights = [TARGETS[name].weight for name in names]
    return random.choices(names, weights)[0], random


def prepare(inputs: Path, folder: Path, seed: int, number: int, names: Sequence[str]) -> Case:
    """Makes a case: the sound inputs of a target in a new folder, one of them damaged."""
    name, random = draw(seed, number, names)
    target = TARGETS[name]
    for part in (*target.sound, *(() if target.first else target.damaged)):
        _copy(inputs, folder, part)
    if target.first:
        os.waitpid(start(folder, target.first), 0)
    words, damage = list(target.words), []
    if target.numbers_of and random.random() < 0.1:
        words, what = mutators.damage_words(random, words, target.numbers_of)
        damage.append(what)
    else:
        pattern, kind = random.choice(list(target.damaged.items()))
        found = sorted(folder.glob(pattern))
        chosen = random.choice(found) if found else folder / pattern
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            try:
                damage.append(mutators.KINDS[kind](random, chosen))
            except Exception:  # the damage before has left nothing of this kind to damage
                break
    return Case(number, name, tuple(words), tuple(damage))


def _copy(inputs: Path, folder: Path, part: str) -> None:
    whole = inputs / part
    found = [whole] if whole.exists() else [*inputs.glob(part), *inputs.glob(f"{part}.*")]
    for source in found:
        goal = folder / source.relative_to(inputs)
        goal.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, goal, dirs_exist_ok=True)
        else:
            shutil.copy2(source, goal)


def start(folder: Path, words: Sequence[str]) -> int:
    """Forks a process that runs `mup-megatron WORDS…` within a folder; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = UNCAUGHT
    try:
        os.setsid()
        os.chdir(folder)
        for name, handle in (("stdout", 1), ("stderr", 2)):
            opened = os.open(folder.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from mup_megatron.cli.main import main

        main(words)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    except BaseException:  # whatever leaves the command line is what is looked for
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def judge(case: Case, folder: Path, status: int, before: Mapping[str, bytes], *, timed_out: bool) -> str | None:
    """What is wrong with a case that has ended, in a few words; None if nothing is."""
    code = os.waitstatus_to_exitcode(status)
    errors = folder.with_suffix(".stderr").read_text(encoding="utf-8", errors="replace")
    if (folder / mutators.CANARY).exists():
        return "ran code"
    if timed_out or code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "hang"
    if "Traceback (most recent call last)" in errors:
        return f"traceback: {_where(errors)}"
    if code not in (0, 1, 2):
        return f"exit {code}: {errors.strip()[-200:]}"
    if code == 2 and "mup-megatron: " not in errors:
        return "refused without a word"
    longest = max(map(len, errors.splitlines()), default=0)
    if longest > LONGEST_SENTENCE:
        return f"a sentence of {longest} characters"
    return _lost_or_half_written(TARGETS[case.target], folder, before, refused=code == 2)


def _where(errors: str) -> str:
    """The last line of a traceback's own code, and the exception."""
    frames = re.findall(r'File "([^"]+)", line \d+, in (\S+)', errors)
    own = [f"{Path(file).name}:{name}" for file, name in frames if "mup_megatron/" in file]
    last = [line for line in errors.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit|Warning)?\b.*", line)]
    kind = last[-1].split(":")[0] if last else "?"
    return f"{kind} at {own[-1] if own else '?'}"


def _lost_or_half_written(target: Target, folder: Path, before: Mapping[str, bytes], *, refused: bool) -> str | None:
    after = digests(folder)
    for name in after:
        last = name.rsplit("/", 1)[-1]
        if re.search(r"(^|/)\.tmp-", name) or re.fullmatch(r"\..+\.[a-z0-9_]{8}", last):
            return f"left behind: {name}"
    if refused:
        for name, digest in before.items():
            if after.get(name) != digest and not name.startswith(target.may_change):
                return f"refused, and {'lost' if name not in after else 'changed'} {name}"
    for name in sorted(set(after) - set(before)):
        if refused and not name.startswith((*target.may_change, "results/")):
            return f"refused, and left {name}"
        if name.endswith(".json"):
            try:
                json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError:
                return f"half written: {name}"
    return None


def digests(folder: Path) -> dict[str, bytes]:
    """Every file within a folder and a hash of its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


# ---- many of them --------------------------------------------------------------------------------------------------


class Fuzzer:
    """Runs cases in forks of this process, several at a time."""

    def __init__(self, work: Path, seed: int, names: Sequence[str]) -> None:
        """Makes the sound inputs, if `work` has none yet.

        Args:
            work: a folder for inputs, cases and failures.
            seed: of all cases.
            names: the targets to draw from.
        """
        self.seed, self.names, self.work = seed, list(names), work.resolve()
        self.inputs = self.work / "inputs"
        if not self.inputs.exists():
            made = self.work / "making"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            make_inputs(made, lambda *words: self._run_sound(made, words))
            made.rename(self.inputs)

    def _run_sound(self, folder: Path, words: Sequence[str]) -> None:
        child = start(folder, words)
        _, status = os.waitpid(child, 0)
        if status:
            said = folder.with_suffix(".stderr").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}:\n{said}")

    def run(self, numbers: Sequence[int], *, jobs: int = 1, until: float | None = None) -> Iterator[Outcome]:
        """The outcomes of cases as they end; no case begins after the time `until` of the monotonic clock."""
        gc.collect()
        gc.freeze()  # a collection in a fork would copy what it shares with this process
        waiting = list(reversed(numbers))
        running: dict[int, tuple[Case, Path, dict[str, bytes], float]] = {}
        while running or (waiting and (until is None or time.monotonic() < until)):
            while waiting and len(running) < jobs and (until is None or time.monotonic() < until):
                case, folder = self.prepared(waiting.pop())
                before = digests(folder)
                running[start(folder, case.words)] = (case, folder, before, time.monotonic())
            ended, status, usage = os.wait3(os.WNOHANG)
            if ended in running:
                case, folder, before, _ = running.pop(ended)
                yield self._outcome(case, folder, before, ended, status, usage.ru_utime + usage.ru_stime)
                continue
            for child, (case, folder, before, begun) in list(running.items()):
                if time.monotonic() - begun > WALL_S:
                    _kill(child)
                    os.waitpid(child, 0)
                    del running[child]
                    yield self._outcome(case, folder, before, child, 0, 0.0, timed_out=True)
            time.sleep(0.002)

    def prepared(self, number: int) -> tuple[Case, Path]:
        """A case and its folder, which is made anew."""
        folder = self.work / "cases" / f"{self.seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return prepare(self.inputs, folder, self.seed, number, self.names), folder

    def _outcome(
        self,
        case: Case,
        folder: Path,
        before: Mapping[str, bytes],
        child: int,
        status: int,
        seconds: float,
        *,
        timed_out: bool = False,
    ) -> Outcome:
        _kill(child)  # whatever it has left running
        failure = judge(case, folder, status, before, timed_out=timed_out)
        if failure is not None and failure.startswith("refused, and changed") and failure.endswith(".db"):
            failure = self._if_rows_are_lost(case, folder, failure)
        if failure is not None:
            self._keep(case, folder, failure)
        for path in (folder.with_suffix(".stdout"), folder.with_suffix(".stderr")):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        code = os.waitstatus_to_exitcode(status)
        return Outcome(case.number, case.target, code, failure, seconds, case.damage)

    def _if_rows_are_lost(self, case: Case, folder: Path, failure: str) -> str | None:
        """The failure, if a database lost rows; it may gain some, and trials change their states."""
        name = failure.removeprefix("refused, and changed ")
        again = folder.with_name(f"{folder.name}-before")
        shutil.rmtree(again, ignore_errors=True)
        again.mkdir()
        prepare(self.inputs, again, self.seed, case.number, self.names)
        lost = _rows(again / name) - _rows(folder / name)
        shutil.rmtree(again)
        return failure if lost else None

    def _keep(self, case: Case, folder: Path, failure: str) -> None:
        """Keeps the first case of each kind of failure: its inputs as they were, its command, and what was said."""
        slug = re.sub(r"[^\w.-]+", "-", f"{case.target}-{failure}")[:100].strip("-")
        kept = self.work / "failures" / slug
        if kept.exists():
            return
        kept.mkdir(parents=True)
        _, again = self.prepared(case.number)
        shutil.copytree(again, kept / "files")
        for name in ("stdout", "stderr"):
            shutil.copy(folder.with_suffix(f".{name}"), kept / f"{name}.txt")
        told = {"seed": self.seed, "number": case.number, "words": case.words, "damage": case.damage, "is": failure}
        (kept / "case.json").write_text(json.dumps(told, indent=1), encoding="utf-8")


def _rows(file: Path) -> set[str]:
    """The rows of a database other than those of trials, which carry a state."""
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            return {line for line in database.iterdump() if not line.startswith('INSERT INTO "trials"')}
    except (sqlite3.Error, UnicodeDecodeError):
        return set()


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def preload() -> None:
    """Imports what commands import, so that each case begins with it."""
    from mup_megatron.training import ranks

    ranks.preload()
    import importlib

    for name in (
        *("mup_megatron.training.train", "mup_megatron.training.build", "mup_megatron.training.checkpoint"),
        *(
            "mup_megatron.training.record",
            "mup_megatron.training.data.documents",
            "mup_megatron.training.data.embedded",
        ),
        *(
            "mup_megatron.check.run_megatron",
            "mup_megatron.check.run_huggingface",
            "mup_megatron.check.report.report",
        ),
        *("mup_megatron.check.report.picture", "mup_megatron.huggingface", "mup_megatron.deepspeed.config"),
        *(f"mup_megatron.cli.{name}" for name in ("args", "check", "data", "ds_config", "explain", "from_native")),
        *(f"mup_megatron.cli.{name}" for name in ("model", "proxy", "recipe", "sweep", "train", "transfer")),
        *("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
        *("torch.distributed.checkpoint", "optuna.storages", "deepspeed", "matplotlib.pyplot"),
    ):
        importlib.import_module(name)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each target: cases, exit codes, failures by kind, the slowest case."""
    kinds = ("traceback", "hang", "ran code", "other")
    head = f"{'target':28} {'cases':>6} {'0':>5} {'1':>5} {'2':>5} " + " ".join(f"{kind:>9}" for kind in kinds)
    lines = [f"{head} {'slowest':>8}"]
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.target, []).append(outcome)
    for name, group in [*grouped.items(), ("all", list(outcomes))]:
        codes = Counter(outcome.code for outcome in group if outcome.failure is None)
        failed = Counter(_kind(outcome.failure) for outcome in group if outcome.failure is not None)
        slowest = max((outcome.seconds for outcome in group), default=0.0)
        counts = " ".join(f"{failed[kind]:9}" for kind in kinds)
        lines.append(f"{name:28} {len(group):6} {codes[0]:5} {codes[1]:5} {codes[2]:5} {counts} {slowest:7.1f}s")
    return "\n".join(lines)


def _kind(failure: str) -> str:
    return next((kind for kind in ("traceback", "hang", "ran code") if failure.startswith(kind)), "other")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--target", default="*", help="only targets whose name fits this pattern")
    parser.add_argument("--kind", choices=("all", "binary", "text"), default="all")
    parser.add_argument("--seconds", type=float, help="begin no case after so many")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone")
    parser.add_argument("--work", type=Path, default=RESULTS)
    given = parser.parse_args()
    names = [
        name
        for name, target in TARGETS.items()
        if fnmatch.fnmatch(name, given.target) and given.kind in ("all", "binary" if target.binary else "text")
    ]
    if not names:
        parser.error(f"--target {given.target}: none of {', '.join(TARGETS)}")
    preload()
    fuzzer = Fuzzer(given.work, given.seed, names)
    log = fuzzer.work / f"outcomes-{hashlib.sha256(repr(names).encode()).hexdigest()[:8]}-{given.seed}.jsonl"
    outcomes = [] if given.only is not None else _told(log)
    done = {outcome.number for outcome in outcomes}
    numbers = [given.only] if given.only is not None else [n for n in range(given.cases) if n not in done]
    until = None if given.seconds is None else time.monotonic() + given.seconds
    with log.open("a", encoding="utf-8") as stream:
        for outcome in fuzzer.run(numbers, jobs=given.jobs, until=until):
            outcomes.append(outcome)
            if given.only is None:
                stream.write(json.dumps(asdict(outcome)) + "\n")
                stream.flush()
            if outcome.failure is not None or given.only is not None:
                print(f"case {outcome.number}, {outcome.target}: {outcome.failure or outcome.code} {outcome.damage}")
            elif len(outcomes) % 500 == 0:
                print(f"{len(outcomes)} cases", file=sys.stderr)
    print(table(outcomes))
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)
    for failure, count in failures.most_common():
        print(f"{count:5} × {failure}")
    if failures:
        print(f"The first of each kind is in {fuzzer.work / 'failures'}.")
    sys.exit(1 if failures else 0)


def _told(log: Path) -> list[Outcome]:
    """The outcomes of cases that ran before."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    contents: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [Outcome(**{**content, "damage": tuple(content["damage"])}) for content in contents]


if __name__ == "__main__":
    main()
