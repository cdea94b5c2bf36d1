"""How far a search is, on each rung, and how that is shown while it runs."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from mup_megatron.search import Fidelity, Ladder, Rung, StudyRecord, StudySpec, Trial
from mup_megatron.search.progress import SweepProgress, duration, progress_table
from mup_megatron.search.space import SearchRange, Space
from mup_megatron.search.standing import standing
from mup_megatron.search.study import State

SPACE = Space({"lr": SearchRange(1e-4, 1e-1, log=True)})
LADDER = Ladder(200.0, tuple(Rung(Fidelity({}, cost), n) for n, cost in ((6, 1.0), (3, 5.0), (2, 20.0))))
NAMES = ["short", "longer", "whole"]


def record(*states: tuple[int, int, State, float], ladder: Ladder | None = LADDER, size: int = 11) -> StudyRecord:
    """A study of trials: rung, candidate, state and seconds. The loss is the candidate's number."""
    spec = StudySpec("search", "sqlite:///search.db", 1, "random", SPACE, {}, ladder=ladder)
    trials = [
        Trial(
            number, rung * 6 + candidate, state, float(candidate) if state == "complete" else None, {"lr": 0.01},
            seconds if state in ("complete", "diverged") else None, None, {}
        )
        for number, (rung, candidate, state, seconds) in enumerate(states)
    ]  # fmt: skip
    return StudyRecord(spec, tuple(trials), size)


MIDDLE = record(
    (0, 0, "failed", 0.0), (0, 0, "complete", 2.0), (0, 1, "complete", 4.0), (0, 2, "diverged", 3.0),
    (0, 3, "failed", 0.0), (0, 4, "running", 0.0), (1, 0, "running", 0.0),
)  # fmt: skip


def test_each_rung_counts_what_became_of_its_slots() -> None:
    found = standing(MIDDLE)
    low, middle, high = found.rungs
    # A slot that failed and was run again counts as what it came to then.
    assert (low.complete, low.diverged, low.failed, low.running, low.left) == (2, 1, 1, 1, 2)
    assert (middle.finished, middle.running, middle.left) == (0, 1, 3)
    assert (high.finished, high.running, high.left) == (0, 0, 2)
    assert low.best is not None
    assert low.best.number == 1
    assert (low.spent, low.ahead, middle.spent, middle.ahead, high.ahead) == (3.0, 2.0, 0.0, 15.0, 40.0)
    assert (found.spent, found.budget, found.running) == (3.0, 200.0, 2)


def test_the_time_left_follows_from_what_trials_took_and_cost() -> None:
    # 3 s a trial on the lowest rung; a running one is half done; two at a time.
    assert standing(MIDDLE).seconds_left == pytest.approx(3.0 * (1.5 * 1 + 2.5 * 5 + 2 * 20) / 2)
    assert standing(record((0, 0, "running", 0.0))).seconds_left is None, "nothing says how long one takes"
    assert standing(record((0, 0, "complete", 1.0))).seconds_left is None, "none runs"
    # A rung that has trials of its own is not taken for another.
    own = record(*((0, i, "complete", 1.0) for i in range(6)), (1, 0, "complete", 30.0), (1, 1, "running", 0.0))
    assert standing(own).seconds_left == pytest.approx(1.5 * 30 + 2 * 30 * 4)


def test_where_many_diverge_no_more_are_expected_than_can_come() -> None:
    ended: list[tuple[int, int, State, float]] = [(0, i, "complete" if i == 4 else "diverged", 1.0) for i in range(6)]
    assert [rung.left for rung in standing(record(*ended)).rungs] == [0, 1, 2]
    all_over = standing(record(*ended, (1, 4, "complete", 1.0), (2, 4, "complete", 1.0)))
    assert [rung.left for rung in all_over.rungs] == [0, 0, 0]
    assert all_over.seconds_left == 0.0


def test_without_a_ladder_it_is_one_rung_whose_cost_the_caller_knows() -> None:
    study = record((0, 0, "complete", 1.0), (0, 1, "running", 0.0), ladder=None, size=4)
    (rung,) = standing(study).rungs
    assert (rung.complete, rung.running, rung.left) == (1, 1, 3)
    assert standing(study).spent is None
    assert standing(study, cost=7.0).spent == 7.0
    assert standing(study).seconds_left == pytest.approx(2.5)


def test_the_table_has_a_row_for_each_rung() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(progress_table(standing(MIDDLE), NAMES, 75.0))
    assert isinstance(console.file, io.StringIO)
    head, *rows, last = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert head == "rung done running left diverged best"
    assert [row.split()[0] for row in rows] == NAMES
    assert rows[0].endswith("4 1 1 1 0.0000 (trial 1)")
    assert rows[1].endswith("0 1 2 0 -")
    assert last == "3 of 200 FLOPs spent, 75 s elapsed, about 81 s left"


def test_without_a_terminal_a_rung_that_is_over_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[tuple[int, int, State, float]] = [(0, i, "complete", 2.0) for i in range(6)]
    study = record(*ended, (1, 0, "running", 0.0))
    with SweepProgress(11, NAMES) as progress:
        progress.ended(study.trials[5], replace(study, trials=study.trials[:5]), 5)
        progress.ended(study.trials[5], study, 6)
        progress.ended(study.trials[5], study, 6)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "[5/11] trial 5 on rung 0: loss 5 after 2.0 s (lr=0.01)"
    said = [line for line in lines if "is over" in line]
    assert said == ["rung 0 (short) is over: best 0.0000 (trial 0), 6 of 200 FLOPs spent, about 2 min left"]


@pytest.mark.parametrize(("seconds", "said"), [(45, "45 s"), (700, "12 min"), (12600, "3.5 h")])
def test_times_are_short(seconds: float, said: str) -> None:
    assert duration(seconds) == said
