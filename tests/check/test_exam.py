"""The exam of the check is what it says it is: so many mistakes and right set-ups, and none twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mup_megatron.check.mutants import MUTANTS
from mup_megatron.training import ranks

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def exam() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        # Some of its mistakes are made on Megatron's models: the CPU runtime has to come before it is imported.
        ranks.enable_cpu()
        import check_exam

        yield check_exam


def test_there_are_enough_mistakes_and_right_set_ups(exam: Any) -> None:
    from exam.mistakes import MISTAKES
    from exam.right import ODD, RIGHT

    assert len(MISTAKES) >= 48
    assert not set(MISTAKES) & set(MUTANTS)
    assert len({mistake.what for mistake in MISTAKES.values()}) == len(MISTAKES)
    assert {mistake.where for mistake in MISTAKES.values()} == {
        "model code",
        "initial weights",
        "optimizer",
        "schedule",
        "training loop",
        "recipe",
    }
    assert (len(RIGHT), sum(right.kind == ODD for right in RIGHT.values())) == (150, 20)


def test_every_set_up_can_be_made(exam: Any) -> None:
    from exam.mistakes import MISTAKES
    from exam.right import RIGHT

    for mistake in MISTAKES.values():
        assert mistake.wrong.recipe.hyperparameters.lr > 0, mistake.name
    for name, right in RIGHT.items():
        assert right.make().recipe.hyperparameters.lr > 0, name


def test_a_mistake_changes_what_is_trained(exam: Any, tmp_path: Path) -> None:
    found = exam._changed(exam.Job("mistakes", "rates-divided-by-hand", "change", 0), tmp_path)
    assert found["outcome"] == "changed"


def _row(exam: Any, seed: int, outcome: str, level: str = "quick", **more: Any) -> Any:
    return exam.Row("code", "mistakes", "two-groups-by-decay", level, seed, outcome, **more)


def test_standard_looks_at_what_quick_does_not_decide(exam: Any) -> None:
    names = ["two-groups-by-decay"]
    seeds = [job.seed for job in exam._jobs("mistakes", "quick", names, 4, [], every=False, turn=1)]
    rows = [
        _row(exam, seeds[0], "fail", sections="coordinates, later steps"),
        _row(exam, seeds[1], "pass"),
        # Bounds hold for the longest runs, which are others at standard.
        _row(exam, seeds[2], "fail", sections="later steps"),
        _row(exam, seeds[3], "no verdict"),
    ]
    again = exam._jobs("mistakes", "standard", names, 4, rows, every=False, turn=1)
    assert [job.seed for job in again] == seeds[1:]
    rows.append(_row(exam, seeds[1], "fail", "standard"))
    assert exam._by_standard(rows, names[0]) == [True, True]


def test_rows_of_other_code_are_kept_and_not_counted(exam: Any, tmp_path: Path) -> None:
    log = exam._Log(tmp_path / "exam.csv")
    log.add(_row(exam, 1, "fail", told='a, "b"'))
    log.add(exam.Row(log.code, "mistakes", "two-groups-by-decay", "quick", 1, "pass", change=0.5))
    assert [row.outcome for row in log.rows()] == ["pass"]
    assert {row.outcome for row in log.all_rows()} == {"fail", "pass"}
