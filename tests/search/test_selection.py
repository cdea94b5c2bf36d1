"""A study of the best trials of another: which they are, and that each is run exactly once, whatever happens."""

import json
import math
import multiprocessing
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from support.blocking import LIMIT_S, Block
from support.interrupted import interrupted_until_done

from mup_megatron.errors import InputError
from mup_megatron.search import ReportFn, Selection, StudySpec, TrialOutcome, find_study, read_study, run_sweep
from mup_megatron.search.results import best_json, trials_csv
from mup_megatron.search.space import SearchRange, Space

# pytest-xdist runs a thread beside the tests, and Python warns of every fork then.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

N, BEST = 8, 4
SPACE = Space({"lr": SearchRange(1e-4, 1e-1, log=True), "scale": SearchRange(-1.0, 1.0, log=False)})
DRAWN = [SPACE.sample(3, slot) for slot in range(N)]


def short(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    """Lowest at lr 0.01, scale 0; diverges where the learning rate is high."""
    if parameters["lr"] > 0.03:
        return TrialOutcome(math.nan, reason="loss is NaN at step 1")
    return TrialOutcome(math.log10(parameters["lr"] / 0.01) ** 2 + parameters["scale"] ** 2)


def long(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    """Another order than that of `short`: a longer run can prefer other hyperparameters."""
    return TrialOutcome(1.0 + abs(parameters["scale"]))


def expected_order() -> list[int]:
    """The trials of the first study that are complete, the lowest loss first."""
    losses = {i: short(DRAWN[i], lambda step, loss: None).loss for i in range(N)}
    return sorted((i for i in losses if math.isfinite(losses[i] or 0.0)), key=lambda i: losses[i] or 0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with a finished first study."""
    file = tmp_path_factory.mktemp("first") / "search.db"
    run_sweep(StudySpec("first", f"sqlite:///{file}", 3, "random", SPACE, {"iterations": 10}), short, N)
    return file


@pytest.fixture
def first(finished: Path, tmp_path: Path) -> StudySpec:
    """The first study, in a database of this test's own."""
    shutil.copy(finished, tmp_path / "search.db")
    return StudySpec("first", f"sqlite:///{tmp_path}/search.db", 3, "random", SPACE, {"iterations": 10})


def selected(first: StudySpec, count: int = BEST, **how: Any) -> Selection:
    return read_study(first.storage, first.name).select_best(count, **how)


def second(first: StudySpec, selection: Selection | None = None) -> StudySpec:
    """The study that runs the best ones longer."""
    chosen = selected(first) if selection is None else selection
    return replace(first, name="second", sampler="best", context={"iterations": 40}, selection=chosen)


def assert_holds_the_best_once(spec: StudySpec) -> None:
    """Each of the best trials of the first study, in the order of their losses, run to its end exactly once."""
    trials = optuna.load_study(study_name=spec.name, storage=spec.storage).trials
    order = expected_order()[:BEST]
    assert [trial.params for trial in trials] == [DRAWN[i] for i in order]
    assert [trial.value for trial in trials] == [1.0 + abs(DRAWN[i]["scale"]) for i in order]
    assert [trial.user_attrs["source"]["trial"] for trial in trials] == order


# Which trials


def test_the_test_has_diverged_trials_and_losses_that_are_not_in_order() -> None:
    assert BEST < len(expected_order()) < N
    assert expected_order() != sorted(expected_order())


def test_the_best_are_the_complete_trials_with_the_lowest_losses_in_their_order(first: StudySpec) -> None:
    selection = selected(first)
    assert selection.study == "first"
    assert [candidate.trial for candidate in selection.candidates] == expected_order()[:BEST]
    assert [candidate.parameters for candidate in selection.candidates] == [DRAWN[i] for i in expected_order()[:BEST]]
    losses = [candidate.loss for candidate in selection.candidates]
    assert losses == sorted(losses)


def test_of_equal_losses_the_first_trial_comes_first(first: StudySpec) -> None:
    run_sweep(replace(first, name="flat"), lambda parameters, report: TrialOutcome(1.0), 3)
    assert [c.trial for c in read_study(first.storage, "flat").select_best(2).candidates] == [0, 1]


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "--best 0: must be at least 1"),
        (N, f"--best {N}: study 'first' has only {len(expected_order())} complete trials"),
    ],
)
def test_more_than_there_are_or_none_is_refused(first: StudySpec, count: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        selected(first, count)


def test_a_selection_survives_json(first: StudySpec) -> None:
    selection = selected(first)
    assert Selection.from_json(json.loads(json.dumps(selection.to_json()))) == selection


def test_the_papers_117_trials_fit_into_what_a_database_server_keeps(first: StudySpec) -> None:
    one = selected(first, 1).candidates[0]
    names = ("lr", "init_method_std", "embedding_multiplier", "attention_multiplier", "output_multiplier")
    candidate = replace(one, parameters=dict.fromkeys(names, -1.2345678901234567e-100))
    spec = second(first, Selection("gpt3_6.7b-stage1", (candidate,) * 117))
    assert len(json.dumps(spec.recorded())) < 2**16 / 2


# A first study that is not finished


def test_a_stopped_first_study_is_refused_until_it_is_finished(first: StudySpec, tmp_path: Path) -> None:
    stopped = replace(first, name="stopped")
    block = Block.new(tmp_path)

    def stops(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        return block(parameters, report) if dict(parameters) == DRAWN[3] else short(parameters, report)

    process = multiprocessing.get_context("fork").Process(target=lambda: run_sweep(stopped, stops, N))
    process.start()
    block.wait_until_running()
    process.kill()
    process.join(LIMIT_S)
    with pytest.raises(
        InputError,
        match=r"--of stopped: the study is not finished\. Of its 8 trials, 4 not begun, 1 running\. Give its own",
    ):
        selected(stopped, 2)
    complete = [i for i in expected_order() if i < 3]
    assert [c.trial for c in selected(stopped, 2, accept_unfinished=True).candidates] == complete[:2]
    run_sweep(stopped, short, N)
    assert [c.trial for c in selected(stopped).candidates] == expected_order()[:BEST]


def test_killed_between_two_trials_a_study_is_not_finished_either(first: StudySpec) -> None:
    """Nothing in such a study runs or waits: only the number that was asked for tells."""
    record = read_study(first.storage, "first")
    assert (record.size, record.unfinished) == (N, {})
    assert replace(record, trials=record.trials[:3]).unfinished == {"not begun": N - 3}
    assert replace(record, trials=record.trials[:3], size=3).unfinished == {}


def test_a_trial_that_was_given_up_leaves_a_study_unfinished_until_it_has_a_result(first: StudySpec) -> None:
    record = read_study(first.storage, "first")
    given_up = replace(record.trials[1], state="failed", loss=None, reason="MemoryError")
    crashed = replace(record, trials=(record.trials[0], given_up, *record.trials[2:]))
    assert crashed.unfinished == {"failed": 1}
    tried_again = replace(record.trials[1], number=N)
    assert replace(crashed, trials=(*crashed.trials, tried_again)).unfinished == {}


# Running them


def test_each_of_the_best_is_run_once_in_their_order(first: StudySpec) -> None:
    spec = second(first)
    result = run_sweep(spec, long, BEST, workers=2)
    assert_holds_the_best_once(spec)
    assert result.best is not None
    assert result.best.loss == 1.0 + min(abs(DRAWN[i]["scale"]) for i in expected_order()[:BEST])


def test_the_study_records_where_its_trials_come_from(first: StudySpec) -> None:
    spec = second(first)
    run_sweep(spec, long, BEST)
    record = read_study(spec.storage, "second")
    assert record.spec == spec
    assert record.spec.selection == selected(first)
    order = expected_order()[:BEST]
    rows = [line.split(",") for line in trials_csv(record).splitlines()]
    assert [row[rows[0].index("source_trial")] for row in rows[1:]] == [str(i) for i in order]
    losses = [float(row[rows[0].index("source_loss")]) for row in rows[1:]]
    assert losses == [short(DRAWN[i], lambda step, loss: None).loss for i in order]
    assert json.loads(best_json(record))["selection"]["study"] == "first"


def test_the_first_study_is_left_as_it_is(first: StudySpec) -> None:
    before = read_study(first.storage, "first")
    run_sweep(second(first), long, BEST)
    assert read_study(first.storage, "first") == before


def test_a_study_keeps_the_trials_it_was_made_of(first: StudySpec) -> None:
    """Another call may have seen the first study at another moment: the study's own record counts, on every machine."""
    spec = second(first)
    with pytest.raises(InputError, match="cut short"):
        run_sweep(spec, _refuse, BEST)
    seen_later = replace(selected(first), candidates=selected(first).candidates[::-1])
    result = run_sweep(second(first, seen_later), long, BEST)
    assert result.record.spec == spec
    assert_holds_the_best_once(spec)


def _refuse(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    raise InputError("corpus.bin: cut short.")


def test_another_number_or_another_study_is_refused(first: StudySpec) -> None:
    run_sweep(second(first), long, BEST)
    with pytest.raises(InputError, match=r"selection\.trials had 4 entries and has 5"):
        run_sweep(second(first, selected(first, 5)), long, 5)
    with pytest.raises(InputError, match=r"selection\.study was 'first' and is 'other'"):
        run_sweep(second(first, replace(selected(first), study="other")), long, BEST)
    with pytest.raises(InputError, match=r"sampler was 'best' and is 'random'.*selection is missing now"):
        run_sweep(replace(second(first), sampler="random", selection=None), long, BEST)


def test_a_study_that_does_not_exist_is_found_not_to_and_nothing_is_made(first: StudySpec, tmp_path: Path) -> None:
    assert find_study(first.storage, "second") is None
    assert find_study(f"sqlite:///{tmp_path}/none.db", "second") is None
    assert not (tmp_path / "none.db").exists()
    found = find_study(first.storage, "first")
    assert found is not None
    assert found == read_study(first.storage, "first")


# Stopped and continued


@pytest.mark.slow
def test_killed_at_random_points_by_two_callers_it_holds_each_of_the_best_once(first: StudySpec) -> None:
    spec = second(first)

    def one(seed: int) -> None:
        assert interrupted_until_done(lambda: run_sweep(spec, long, BEST), seed, 120) >= 2

    both = [multiprocessing.get_context("fork").Process(target=one, args=(seed,)) for seed in (21, 22)]
    for process in both:
        process.start()
    for process in both:
        process.join(LIMIT_S)
    assert [process.exitcode for process in both] == [0, 0]
    assert_holds_the_best_once(spec)
