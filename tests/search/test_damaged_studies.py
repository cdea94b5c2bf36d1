"""Studies whose database holds what no sweep has written: refused by its name before anything is changed in it."""

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from mup_megatron.errors import InputError
from mup_megatron.search import ReportFn, StudySpec, TrialOutcome, read_study, run_sweep
from mup_megatron.search.space import SearchRange, Space

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SPACE = Space({"lr": SearchRange(1e-4, 1e-1, log=True), "scale": SearchRange(-1.0, 1.0, log=False)})


def loss(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    return TrialOutcome(parameters["lr"] + parameters["scale"] ** 2, metrics={"tokens": 128})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two trials. Not to be changed."""
    file = tmp_path_factory.mktemp("study") / "s.db"
    run_sweep(spec_in(file), loss, 2)
    return file


@pytest.fixture
def file(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(finished, tmp_path / "s.db"))


def spec_in(file: Path) -> StudySpec:
    return StudySpec("s", f"sqlite:///{file}", 3, "random", SPACE, {"proxy": {"layers": 2}})


def _sql(*statements: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with contextlib.closing(sqlite3.connect(file)) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    return change


def _attribute(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes what the study has recorded of its sweep; what `change` returns takes its place if it is not None."""

    def damage(file: Path) -> None:
        with contextlib.closing(sqlite3.connect(file)) as database:
            (text,) = database.execute("SELECT value_json FROM study_user_attributes WHERE key = 'sweep'").fetchone()
            content = json.loads(text)
            replaced = change(content)
            text = json.dumps(content if replaced is None else replaced)
            database.execute("UPDATE study_user_attributes SET value_json = ? WHERE key = 'sweep'", (text,))
            database.commit()

    return damage


def _both(first: Callable[[Path], None], second: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        first(file)
        second(file)

    return change


def _of_trial(key: str, value: str) -> Callable[[Path], None]:
    return _sql(f"UPDATE trial_user_attributes SET value_json = '{value}' WHERE key = '{key}'")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "null for the sweep": _sql("UPDATE study_user_attributes SET value_json = 'null' WHERE key = 'sweep'"),
    "a list for the sweep": _sql("UPDATE study_user_attributes SET value_json = '[1]' WHERE key = 'sweep'"),
    "half a document": _sql("UPDATE study_user_attributes SET value_json = '{\"seed\": ' WHERE key = 'sweep'"),
    "no JSON": _sql("UPDATE study_user_attributes SET value_json = NULL WHERE key = 'sweep'"),
    "no seed": _attribute(lambda content: content.pop("seed") and None),
    "a space without bounds": _attribute(lambda content: content["space"]["lr"].pop("low") and None),
    "a space of text": _attribute(lambda content: content.update(space="lr")),
    "bounds of text": _attribute(lambda content: content["space"]["lr"].update(low="a")),
    "bounds the wrong way round": _attribute(lambda content: content["space"]["lr"].update(low=1.0)),
    "bounds too far apart": _attribute(lambda content: content["space"]["scale"].update(high=1.5e308)),
    "an empty space": _both(_sql("DELETE FROM trial_params"), _attribute(lambda content: content.update(space={}))),
    "another sampler": _attribute(lambda content: content.update(sampler="grid")),
    "the best of nothing": _attribute(lambda content: content.update(sampler="best")),
    "a context of text": _attribute(lambda content: content.update(context="x")),
    "half a character": _attribute(lambda content: content["context"].update(name="\ud800")),
    "a size of text": _sql("UPDATE study_user_attributes SET value_json = '\"2\"' WHERE key = 'size'"),
    "a size beyond all": _sql("UPDATE study_user_attributes SET value_json = '999999999999' WHERE key = 'size'"),
    "a trial's state empty": _sql("UPDATE trials SET state = ''"),
    "a trial's state unknown": _sql("UPDATE trials SET state = 'DONE'"),
    "a loss of text": _sql("UPDATE trial_values SET value = 'low'"),
    "no loss": _sql("DELETE FROM trial_values"),
    "an infinite loss": _sql("UPDATE trial_values SET value = NULL, value_type = 'INF_POS'"),
    "a kind of loss unknown": _sql("UPDATE trial_values SET value_type = 'x'"),
    "a hyperparameter missing": _sql("DELETE FROM trial_params WHERE param_name = 'lr'"),
    "a hyperparameter of text": _sql("UPDATE trial_params SET param_value = 'x' WHERE param_name = 'lr'"),
    "a hyperparameter outside of the space": _sql("UPDATE trial_params SET param_value = -1 WHERE param_name = 'lr'"),
    "no distribution": _sql("UPDATE trial_params SET distribution_json = '{}' WHERE param_name = 'lr'"),
    "another hyperparameter": _sql("UPDATE trial_params SET param_name = 'x' WHERE param_name = 'lr'"),
    "a trial missing": _sql("DELETE FROM trials WHERE number = 0"),
    "a number left out": _sql("UPDATE trials SET number = 5 WHERE number = 1"),
    "a number twice": _sql("UPDATE trials SET number = 0"),
    "no numbers": _sql("UPDATE trials SET number = NULL"),
    "no date": _sql("UPDATE trials SET datetime_start = 'yesterday'"),
    "no direction": _sql("DELETE FROM study_directions"),
    "a direction unknown": _sql("UPDATE study_directions SET direction = 'UP'"),
    "an owner of text": _of_trial("owner", '"x"'),
    "an owner without a process": _of_trial("owner", '{"machine": "a", "pid": "x"}'),
    "seconds of text": _of_trial("seconds", '"long"'),
    "metrics of a list": _of_trial("metrics", "[]"),
    **{f"no {table}": _sql(f"DROP TABLE {table}") for table in ("trials", "trial_params", "study_user_attributes")},
    "a column lost": _sql("ALTER TABLE trial_values RENAME COLUMN value TO x"),
}


def rows(file: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(file)) as database:
        return list(database.iterdump())


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_study_is_refused_and_left_as_it_is(file: Path, name: str) -> None:
    DAMAGES[name](file)
    before = rows(file)
    with pytest.raises(InputError) as reading:
        read_study(f"sqlite:///{file}", "s")
    with pytest.raises(InputError) as going_on:
        run_sweep(spec_in(file), loss, 3)
    for refusal in (reading, going_on):
        message = str(refusal.value)
        assert str(file) in message
        assert re_remedy(message)
        assert len(message) < 300 + len(str(file))
    assert rows(file) == before


def _rungs(*rungs: tuple[float, int]) -> dict[str, Any]:
    return {"budget": 1e9, "rungs": [{"settings": {}, "cost": cost, "trials": trials} for cost, trials in rungs]}


@pytest.mark.parametrize(
    ("ladder", "said"),
    [
        (_rungs((1.0, 2), (2.0, 3)), "more trials on a rung than on the one below"),
        (_rungs((1.0, 2), (1e308, 2)), "costs beyond all measure"),
        (_rungs((1.0, 2), (1e300, 2)), "costs beyond all measure"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused(file: Path, ladder: dict[str, Any], said: str) -> None:
    _attribute(lambda content: content.update(ladder=ladder))(file)
    with pytest.raises(InputError, match=f"'s' is damaged .*{said}"):
        read_study(f"sqlite:///{file}", "s")


def re_remedy(message: str) -> bool:
    return "Restore" in message or "free space or see to the server" in message or "Choose another" in message


def test_a_study_of_another_program_is_none_of_ours(file: Path) -> None:
    other = optuna.create_study(study_name="other", storage=f"sqlite:///{file}")
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(InputError, match="'other' was not made by a sweep"):
        read_study(f"sqlite:///{file}", "other")


def test_reading_from_an_empty_file_makes_no_tables_in_it(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"")
    with pytest.raises(InputError, match=r"s\.db: empty, so there is no study in it"):
        read_study(f"sqlite:///{tmp_path}/s.db", "s")
    assert (tmp_path / "s.db").read_bytes() == b""


@pytest.mark.parametrize(("trials", "workers", "flag"), [(10**9, 1, "--trials"), (2, 10**6, "--workers")])
def test_a_search_beyond_all_bounds_is_refused(tmp_path: Path, trials: int, workers: int, flag: str) -> None:
    with pytest.raises(InputError, match=f"{flag} .*must be at most"):
        run_sweep(spec_in(tmp_path / "s.db"), loss, trials, workers=workers)
    assert not (tmp_path / "s.db").exists()
