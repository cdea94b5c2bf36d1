"""The fuzzer: it sees what it looks for, a case can be had again, and a short run of it finds nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from fuzz import Case, digests, judge, prepare
from fuzz_mutators import CANARY
from fuzz_targets import TARGETS

from mup_megatron.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
CASE = Case(0, "transfer", TARGETS["transfer"].words, ("nothing",))
TRACEBACK = """Traceback (most recent call last):
  File "/x/mup_megatron/search/study.py", line 1, in read_study
    …
json.decoder.JSONDecodeError: Expecting value
"""


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    words = ["--cases", "6", "--seed", "2", "--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "all                               6" in done.stdout


def test_every_command_that_reads_a_file_is_among_the_targets() -> None:
    assert {target.command for target in TARGETS.values()} == set(COMMANDS) - {"quickstart"}


def judged(folder: Path, code: int, errors: str = "mup-megatron: no.\n", *, timed_out: bool = False) -> str | None:
    folder.with_suffix(".stderr").write_text(errors)
    status = -code if code < 0 else code << 8
    return judge(CASE, folder, status, {}, timed_out=timed_out)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "case").mkdir()
    return tmp_path / "case"


@pytest.mark.parametrize(
    ("code", "errors", "found"),
    [
        (0, "", None),
        (1, "", None),
        (2, "mup-megatron: s.db: damaged. Restore it.\n", None),
        (2, "", "refused without a word"),
        (1, TRACEBACK, "traceback: json.decoder.JSONDecodeError at study.py:read_study"),
        (fuzz.UNCAUGHT, TRACEBACK, "traceback: json.decoder.JSONDecodeError at study.py:read_study"),
        (3, "", "exit 3"),
        (-signal.SIGSEGV, "", "exit -11"),
        (-signal.SIGXCPU, "", "hang"),
        (2, "mup-megatron: " + "x" * 1001, "a sentence of 1015 characters"),
    ],
)
def test_what_a_case_ends_with(folder: Path, code: int, errors: str, found: str | None) -> None:
    said = judged(folder, code, errors)
    assert said is None if found is None else said is not None and said.startswith(found)


def test_what_a_case_leaves(folder: Path) -> None:
    assert judged(folder, 2, timed_out=True) == "hang"
    (folder / "best.yaml").write_text("a: 1\n")
    assert judged(folder, 2) == "refused, and left best.yaml"
    assert judged(folder, 0) is None
    (folder / ".best.yaml.abcd1234").write_text("a: ")
    assert judged(folder, 0) == "left behind: .best.yaml.abcd1234"
    (folder / ".best.yaml.abcd1234").unlink()
    (folder / "a.json").write_text("{")
    assert judged(folder, 0) == "half written: a.json"
    (folder / CANARY).mkdir()
    assert judged(folder, 0) == "ran code"


def test_what_a_refusal_changes(folder: Path) -> None:
    (folder / "s.db").write_bytes(b"a")
    before = digests(folder)
    folder.with_suffix(".stderr").write_text("mup-megatron: no.\n")
    (folder / "s.db").write_bytes(b"b")
    assert judge(CASE, folder, 2 << 8, before, timed_out=False) == "refused, and changed s.db"
    (folder / "s.db").unlink()
    assert judge(CASE, folder, 2 << 8, before, timed_out=False) == "refused, and lost s.db"


def test_a_case_is_made_from_the_seed_and_its_number_alone(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "ds.json").write_text(json.dumps({"optimizer": {"type": "Adam", "params": {"lr": 1.0}}, "steps": [1, 2]}))
    for name in ("gpt2.json", "gpt2.recipe.yaml"):
        (inputs / name).write_text("{}")
    made = []
    for attempt in ("first", "again", "other"):
        for number in range(20):
            (tmp_path / attempt / str(number)).mkdir(parents=True)
        seed = 2 if attempt == "other" else 1
        cases = [prepare(inputs, tmp_path / attempt / str(n), seed, n, ["ds-config --check"]) for n in range(20)]
        made.append(([case.damage for case in cases], digests(tmp_path / attempt)))
    assert made[0] == made[1]
    assert made[0] != made[2]
