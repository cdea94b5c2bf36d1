"""A search over fidelities in its study: each rung's trials, once each, however often it is stopped."""

import csv
import io
import json
import math
import multiprocessing
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from support.blocking import LIMIT_S
from support.interrupted import interrupted_until_done

from mup_megatron.errors import InputError
from mup_megatron.search import (
    Fidelity,
    Ladder,
    Objective,
    ReportFn,
    Rung,
    StudySpec,
    TrialOutcome,
    read_study,
    run_sweep,
)
from mup_megatron.search.results import best_json, trials_csv
from mup_megatron.search.space import SearchRange, Space
from mup_megatron.search.standing import standing
from mup_megatron.search.storage import open_storage

# pytest-xdist runs a thread beside the tests, and Python warns of every fork then.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SPACE = Space({"lr": SearchRange(1e-4, 1e-1, log=True), "scale": SearchRange(-1.0, 1.0, log=False)})
COUNTS, COSTS = (8, 3, 2), (1.0, 5.0, 20.0)
LADDER = Ladder(100.0, tuple(Rung(Fidelity({"steps": c}, c), n) for n, c in zip(COUNTS, COSTS, strict=True)))
N = LADDER.trials


class Bowl:
    """Lowest at lr 0.01 and another scale on each rung, higher on each; diverges where the learning rate is high."""

    def __init__(self, rung: int) -> None:
        self.rung = rung

    def __call__(self, parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        if parameters["lr"] > 0.06:
            return TrialOutcome(math.nan, reason="loss is NaN at step 1")
        loss = math.log10(parameters["lr"] / 0.01) ** 2 + (parameters["scale"] - 0.1 * self.rung) ** 2
        return TrialOutcome(3.0 + self.rung + loss, metrics={"rung": self.rung})


BOWLS: tuple[Objective, ...] = tuple(Bowl(rung) for rung in range(3))


def expected() -> dict[int, dict[int, float | None]]:
    """Rung → candidate → loss of plain halving."""
    candidates = list(range(COUNTS[0]))
    found: dict[int, dict[int, float | None]] = {}
    for rung, count in enumerate(COUNTS):
        outcomes = {i: BOWLS[rung](SPACE.sample(3, i), lambda step, loss: None) for i in candidates[:count]}
        found[rung] = {i: outcome.checked().loss for i, outcome in outcomes.items()}
        losses = {i: loss for i, loss in found[rung].items() if loss is not None}
        candidates = sorted(losses, key=lambda i: losses[i])
    return found


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("no trials") / "search.db"
    with open_storage(f"sqlite:///{file}", create=True):
        return file


@pytest.fixture
def spec(tmp_path: Path, empty: Path) -> StudySpec:
    """A study that does not exist in a database that does."""
    shutil.copy(empty, tmp_path / "search.db")
    return StudySpec("search", f"sqlite:///{tmp_path}/search.db", 3, "random", SPACE, {"layers": 2}, ladder=LADDER)


def assert_holds_exactly_the_ladder(spec: StudySpec) -> None:
    found: dict[int, dict[int, float | None]] = {rung: {} for rung in range(3)}
    for trial in optuna.load_study(study_name=spec.name, storage=spec.storage).trials:
        assert trial.state.name in ("COMPLETE", "PRUNED")
        rung, candidate = LADDER.place(trial.user_attrs["slot"])
        assert candidate not in found[rung]
        assert trial.params == SPACE.sample(3, candidate)
        found[rung][candidate] = trial.value
    assert found == expected()


@pytest.mark.parametrize("workers", [1, 3])
def test_each_rung_has_the_best_of_the_one_below(spec: StudySpec, workers: int) -> None:
    result = run_sweep(spec, BOWLS, N, workers=workers)
    assert_holds_exactly_the_ladder(spec)
    record = read_study(spec.storage, spec.name)
    assert record == result.record
    assert record.spec == spec
    assert all(trial.metrics["rung"] == record.rung_of(trial) for trial in record.trials if trial.loss is not None)
    assert [rung.spent for rung in standing(record).rungs] == [8.0, 15.0, 40.0]
    assert record.unfinished == {}
    # Of equal trials the whole one answers: on the last rung, whatever the losses are elsewhere.
    last = expected()[2]
    assert result.best is not None
    assert result.best.loss == min(loss for loss in last.values() if loss is not None)
    assert record.rung_of(result.best) == 2
    assert [candidate.loss for candidate in record.select_best(2).candidates] == sorted(last.values(), key=str)
    rows = list(csv.DictReader(io.StringIO(trials_csv(record))))
    assert [(int(row["rung"]), int(row["candidate"])) for row in rows] == [
        LADDER.place(trial.slot) for trial in record.trials
    ]
    assert json.loads(best_json(record))["ladder"] == LADDER.to_json()


def test_a_terminal_shows_a_table_of_the_rungs_to_the_end(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    run_sweep(spec, BOWLS, N, called=["low", "middle", "high"])
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capfd.readouterr().err).replace("\r", "\n").splitlines()
    last = [line.split() for line in shown if line.strip()][-4:]
    best = min(loss for loss in expected()[2].values() if loss is not None)
    diverged = sum(loss is None for loss in expected()[0].values())
    assert last[0][0] == "low"
    assert last[0][2:6] == [str(COUNTS[0]), "0", "0", str(diverged)]
    assert last[2][0] == "high"
    assert last[2][2:7] == ["2", "0", "0", "0", f"{best:.4f}"]
    assert last[3][:5] == ["63", "of", "100", "FLOPs", "spent,"]
    # Trials that are complete have no lines of their own.
    assert sum(line.startswith("[") for line in shown) == diverged


def test_without_a_whole_trial_there_is_no_best(spec: StudySpec) -> None:
    def diverges(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        return TrialOutcome(None)

    result = run_sweep(spec, (BOWLS[0], BOWLS[1], diverges), N)
    assert result.best is None
    with pytest.raises(InputError, match="no complete trial"):
        result.record.require_best()
    assert result.record.unfinished == {}


def test_where_many_diverge_the_rungs_above_are_shorter(spec: StudySpec) -> None:
    def most_diverge(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        kept = [SPACE.sample(3, candidate) for candidate in (1, 5)]
        return TrialOutcome(parameters["lr"] if dict(parameters) in kept else None)

    record = run_sweep(spec, (most_diverge,) * 3, N).record
    assert [LADDER.place(trial.slot) for trial in record.trials if trial.loss is not None] == [
        (0, 1), (0, 5), *sorted(((1, 1), (1, 5)), key=lambda place: SPACE.sample(3, place[1])["lr"]),
        *sorted(((2, 1), (2, 5)), key=lambda place: SPACE.sample(3, place[1])["lr"]),
    ]  # fmt: skip
    assert record.unfinished == {}


def test_a_candidate_that_was_given_up_is_tried_again_and_then_goes_on_if_there_is_room(spec: StudySpec) -> None:
    best = next(iter(expected()[1]))

    def crashes(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        if dict(parameters) == SPACE.sample(3, best):
            raise MemoryError("on purpose")
        return BOWLS[0](parameters, report)

    first = run_sweep(spec, (crashes, *BOWLS[1:]), N)
    assert [trial.slot for trial in first.given_up] == [best]
    assert first.record.unfinished == {"failed": 1}
    again = run_sweep(spec, BOWLS, N)
    assert again.given_up == ()
    on = [LADDER.place(trial.slot)[0] for trial in again.trials if trial.finished]
    assert [on.count(rung) for rung in range(3)] == list(COUNTS), "never more than the budget is for"


def test_tpe_draws_candidates_and_those_that_go_on_keep_theirs(spec: StudySpec) -> None:
    guided = replace(spec, sampler="tpe", ladder=Ladder(100.0, (Rung(Fidelity({}, 1.0), 14), *LADDER.rungs[1:])))
    assert guided.ladder is not None
    trials = run_sweep(guided, BOWLS, guided.ladder.trials).trials
    drawn = {trial.slot: trial.parameters for trial in trials if trial.slot < 14}
    assert [drawn[trial.slot % 14] for trial in trials] == [trial.parameters for trial in trials]
    assert len({tuple(values.items()) for values in drawn.values()}) == 14
    assert any(drawn[slot] != SPACE.sample(3, slot) for slot in range(14))


def test_another_ladder_is_another_study(spec: StudySpec) -> None:
    run_sweep(spec, BOWLS, N)
    for other, said in (
        (replace(LADDER, budget=101.0), r"ladder\.budget was 100\.0 and is 101\.0"),
        (Ladder(100.0, LADDER.rungs[:2]), r"ladder\.rungs had 3 entries and has 2"),
    ):
        with pytest.raises(InputError, match=said):
            run_sweep(replace(spec, ladder=other), BOWLS[: len(other.rungs)], other.trials)
    with pytest.raises(InputError, match="ladder is missing now"):
        run_sweep(replace(spec, ladder=None), BOWLS[0], 3)
    assert_holds_exactly_the_ladder(spec)


# Stopped and continued


@pytest.mark.slow  # test_bad_weather has a short one of these
def test_killed_at_random_points_it_holds_the_ladder_of_an_undisturbed_one(spec: StudySpec) -> None:
    assert interrupted_until_done(lambda: run_sweep(spec, BOWLS, N, workers=2), 1, 200) >= 3
    assert_holds_exactly_the_ladder(spec)


@pytest.mark.slow  # so has it of this
def test_two_at_once_each_killed_at_random_points_hold_the_same(spec: StudySpec) -> None:
    both = [
        multiprocessing.get_context("fork").Process(
            target=interrupted_until_done, args=(lambda: run_sweep(spec, BOWLS, N), seed, 200)
        )
        for seed in (11, 12)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(LIMIT_S)
    assert [process.exitcode for process in both] == [0, 0]
    assert_holds_exactly_the_ladder(spec)


# What cannot have been stored


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM trial_user_attributes WHERE key = 'slot' AND trial_id = 1", "trial 0: slot is None"),
        ("UPDATE trial_user_attributes SET value_json = '24' WHERE key = 'slot' AND trial_id = 1", "slot is 24"),
        ("UPDATE trial_user_attributes SET value_json = '\"a\"' WHERE key = 'slot'", "trial 0: slot"),
        ("UPDATE trials SET state = 'FAIL' WHERE trial_id <= 8", "without a result on the lowest"),
        ("UPDATE study_user_attributes SET value_json = replace(value_json, '\"trials\": 8', '\"trials\": 0') "
         "WHERE key = 'sweep'", "greater than 0"),
        ("UPDATE study_user_attributes SET value_json = replace(value_json, '\"budget\"', '\"b\"') "
         "WHERE key = 'sweep'", "ladder"),
    ],
)  # fmt: skip
def test_what_no_sweep_has_written_is_refused(
    finished_ladder: StudySpec, tmp_path: Path, statement: str, said: str
) -> None:
    file = Path(shutil.copy(finished_ladder.storage.removeprefix("sqlite:///"), tmp_path / "damaged.db"))
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(statement))
    engine.dispose()
    with pytest.raises(InputError, match=said):
        read_study(f"sqlite:///{file}", finished_ladder.name)


@pytest.fixture(scope="module")
def finished_ladder(tmp_path_factory: pytest.TempPathFactory) -> StudySpec:
    """A finished search over fidelities. Not to be changed."""
    file = tmp_path_factory.mktemp("ladder") / "search.db"
    spec = StudySpec("search", f"sqlite:///{file}", 3, "random", SPACE, {"layers": 2}, ladder=LADDER)
    run_sweep(spec, BOWLS, N)
    return spec
