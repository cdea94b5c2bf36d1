"""A search: what its study holds, whatever happens on the way."""

import csv
import json
import math
import multiprocessing
import os
import pty
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import FrozenTrial, TrialState
from support.blocking import LIMIT_S, Block, own_children, wait_until_dead
from support.interrupted import interrupted_until_done

from mup_megatron.errors import InputError
from mup_megatron.search import (
    Objective,
    ReportFn,
    StudySpec,
    SweepResult,
    TrialOutcome,
    best_trial,
    read_study,
    run_sweep,
)
from mup_megatron.search.owner import Owner
from mup_megatron.search.space import SearchRange, Space
from mup_megatron.search.storage import open_storage

# pytest-xdist runs a thread beside the tests, and Python warns of every fork then.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

N = 6
SPACE = Space({"lr": SearchRange(1e-4, 1e-1, log=True), "scale": SearchRange(-1.0, 1.0, log=False)})
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def bowl(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    """Lowest at lr 0.01, scale 0; diverges where the learning rate is high."""
    report(0, 9.0)
    if parameters["lr"] > 0.03:
        return TrialOutcome(float("nan"), reason="loss is NaN at step 1")
    loss = math.log10(parameters["lr"] / 0.01) ** 2 + parameters["scale"] ** 2
    report(1, loss)
    return TrialOutcome(loss, metrics={"tokens": 128})


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: making Optuna's tables is slow. The tests of interruption make their own."""
    file = tmp_path_factory.mktemp("empty") / "search.db"
    with open_storage(f"sqlite:///{file}", create=True):
        return file


@pytest.fixture
def new_spec(tmp_path: Path) -> StudySpec:
    """A study whose database and folder do not exist."""
    return StudySpec("search", f"sqlite:///{tmp_path}/results/search.db", 3, "random", SPACE, {"proxy": {"layers": 2}})


@pytest.fixture
def spec(new_spec: StudySpec, tmp_path: Path, empty_database: Path) -> StudySpec:
    """A study that does not exist in a database that does."""
    (tmp_path / "results").mkdir()
    shutil.copy(empty_database, tmp_path / "results" / "search.db")
    return new_spec


def load(spec: StudySpec) -> optuna.Study:
    return optuna.load_study(study_name=spec.name, storage=spec.storage)


def states(spec: StudySpec) -> Counter[str]:
    return Counter(trial.state.name for trial in load(spec).trials)


def drawn(n: int = N) -> list[dict[str, float]]:
    """What an undisturbed random search of n trials draws."""
    return [SPACE.sample(3, slot) for slot in range(n)]


def assert_holds_exactly(spec: StudySpec, n: int) -> None:
    """n trials, all finished, with the hyperparameters and losses of an undisturbed search."""
    trials = load(spec).trials
    assert [trial.params for trial in trials] == drawn(n)
    assert {trial.state for trial in trials} <= set(FINISHED)
    for trial in trials:
        expected = bowl(trial.params, lambda step, loss: None)
        assert trial.state == (TrialState.COMPLETE if math.isfinite(expected.loss or math.nan) else TrialState.PRUNED)
        if trial.state == TrialState.COMPLETE:
            assert trial.value == expected.loss
            assert trial.intermediate_values == {0: 9.0, 1: expected.loss}


def in_process(function: Callable[[], object]) -> multiprocessing.Process:
    """A forked process: it can be killed, and what it does stays out of the test's process."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def ended(process: multiprocessing.Process) -> int:
    process.join(LIMIT_S)
    assert process.exitcode is not None, "still running"
    return process.exitcode


# An undisturbed search


def test_a_study_is_optunas_and_holds_what_was_searched(new_spec: StudySpec) -> None:
    spec = new_spec
    result = run_sweep(spec, bowl, N)
    assert_holds_exactly(spec, N)
    study = load(spec)
    assert result.best is not None
    assert (study.best_trial.number, study.best_value) == (result.best.number, result.best.loss)
    assert study.best_params == result.best.parameters
    assert result.best.metrics == {"tokens": 128}
    assert study.user_attrs["sweep"]["context"] == {"proxy": {"layers": 2}}
    assert read_study(spec.storage, spec.name).spec == spec
    assert best_trial(spec.storage, spec.name) == result.best
    assert result.given_up == ()


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_does_not_change_the_trials(spec: StudySpec, workers: int) -> None:
    run_sweep(spec, bowl, N, workers=workers)
    assert_holds_exactly(spec, N)
    assert own_children() == []


def test_another_seed_draws_other_trials(spec: StudySpec) -> None:
    run_sweep(replace(spec, seed=4), bowl, 2)
    assert [trial.params for trial in load(spec).trials] == [SPACE.sample(4, slot) for slot in range(2)]


def test_a_finished_search_runs_nothing_and_a_larger_one_adds_to_it(spec: StudySpec) -> None:
    run_sweep(spec, bowl, 3)

    def fails(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        raise AssertionError("not to be run")

    assert len(run_sweep(spec, fails, 3).trials) == 3
    assert len(run_sweep(spec, fails, 2).trials) == 3
    run_sweep(spec, bowl, N)
    assert_holds_exactly(spec, N)


def test_several_studies_share_a_storage(spec: StudySpec) -> None:
    other = replace(spec, name="other", context={})
    run_sweep(spec, bowl, 2)
    run_sweep(other, bowl, 3)
    assert (len(load(spec).trials), len(load(other).trials)) == (2, 3)


def test_tpe_learns_from_earlier_trials(spec: StudySpec) -> None:
    guided, blind = replace(spec, sampler="tpe"), replace(spec, name="blind")
    run_sweep(guided, bowl, 20)
    run_sweep(blind, bowl, 20)

    def last_trials(study: StudySpec) -> float:
        return sum(math.log10(trial.params["lr"] / 0.01) ** 2 for trial in load(study).trials[-8:])

    assert states(guided).keys() <= {"COMPLETE", "PRUNED"}
    assert last_trials(guided) < last_trials(blind)


# Divergence and crashes


def test_a_diverged_trial_is_finished_has_its_reason_and_is_never_the_best(spec: StudySpec) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        report(0, math.nan)
        return TrialOutcome(-100.0, diverged=True, reason="loss rose") if parameters["scale"] < 0 else TrialOutcome(1.0)

    result = run_sweep(spec, objective, N)
    negative = [values["scale"] < 0 for values in drawn()]
    assert [trial.state for trial in result.trials] == ["diverged" if low else "complete" for low in negative]
    assert all(trial.finished for trial in result.trials)
    assert {trial.reason for trial in result.trials if trial.state == "diverged"} == {"loss rose"}
    assert load(spec).best_value == 1.0


def test_a_study_whose_trials_all_diverged_has_no_best(spec: StudySpec) -> None:
    result = run_sweep(spec, lambda parameters, report: TrialOutcome(math.inf), 2)
    assert result.best is None
    with pytest.raises(InputError, match="no complete trial"):
        best_trial(spec.storage, spec.name)
    with pytest.raises(ValueError, match="Record does not exist"):  # Optuna's words for it
        _ = load(spec).best_trial


def crash(parameters: Mapping[str, float]) -> None:
    if parameters == SPACE.sample(3, 2):
        raise MemoryError("on purpose")


def test_a_crash_is_tried_twice_then_given_up_and_not_fatal(spec: StudySpec, tmp_path: Path) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        with (tmp_path / "runs").open("a") as runs:
            runs.write(f"{drawn().index(dict(parameters))}\n")
        crash(parameters)
        return bowl(parameters, report)

    result = run_sweep(spec, objective, N)
    runs = Counter((tmp_path / "runs").read_text().split())
    assert runs == {str(slot): 2 if slot == 2 else 1 for slot in range(N)}
    assert [(trial.slot, trial.state, trial.reason) for trial in result.given_up] == [
        (2, "failed", "MemoryError: on purpose")
    ]
    assert load(spec).trials[2].state == TrialState.FAIL
    assert sum(trial.finished for trial in result.trials) == N - 1

    # The same command tries it again, with the same hyperparameters; slots are numbered as before.
    again = run_sweep(spec, bowl, N + 1)
    assert again.given_up == ()
    assert sorted(trial.slot for trial in again.trials if trial.finished) == list(range(N + 1))
    finished = sorted((trial.slot, dict(trial.parameters)) for trial in again.trials if trial.finished)
    assert finished == list(enumerate(drawn(N + 1)))


def test_a_killed_trial_that_then_succeeds_leaves_no_trace(spec: StudySpec, tmp_path: Path) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        marker = tmp_path / str(drawn().index(dict(parameters)))
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return bowl(parameters, report)

    assert run_sweep(spec, objective, N, workers=2).given_up == ()
    assert_holds_exactly(spec, N)


def test_a_killed_worker_is_replaced_by_the_others(spec: StudySpec, tmp_path: Path) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        if dict(parameters) == drawn()[1] and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        return bowl(parameters, report)

    run_sweep(spec, objective, N, workers=2)
    assert_holds_exactly(spec, N)


def test_when_all_workers_are_killed_the_same_command_goes_on(spec: StudySpec) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        if dict(parameters) == drawn()[1]:
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        return bowl(parameters, report)

    with pytest.raises(InputError, match="all worker processes were killed"):
        run_sweep(spec, objective, N)
    run_sweep(spec, bowl, N)
    assert_holds_exactly(spec, N)


def test_bad_input_in_a_trial_ends_the_search_and_the_same_command_goes_on(spec: StudySpec) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        if dict(parameters) == drawn()[3]:
            raise InputError("corpus.bin: cut short. Make it again.")
        return bowl(parameters, report)

    with pytest.raises(InputError, match=r"corpus\.bin: cut short"):
        run_sweep(spec, objective, N)
    assert states(spec) == Counter(
        WAITING=1, **Counter("PRUNED" if values["lr"] > 0.03 else "COMPLETE" for values in drawn(3))
    )
    run_sweep(spec, bowl, N)
    assert_holds_exactly(spec, N)


# Stopped and continued


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_put_running_trials_back(
    spec: StudySpec, tmp_path: Path, stop: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    block = Block.new(tmp_path)

    def sweep() -> None:
        # A shell has what it starts in the background ignore Ctrl-C, these tests maybe among it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(spec, block, N, workers=2)

    process = in_process(sweep)
    block.wait_until_running()
    block.wait_until_running()
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid or 0, stop)
    assert ended(process) == 0
    assert "The same command goes on" in capfd.readouterr().err
    wait_until_dead(family)
    assert states(spec) == {"WAITING": 2}
    run_sweep(spec, bowl, N)
    assert_holds_exactly(spec, N)


def test_kill_9_takes_the_trials_along_and_they_are_run_again(spec: StudySpec, tmp_path: Path) -> None:
    block = Block.new(tmp_path)
    process = in_process(lambda: run_sweep(spec, block, N, workers=2))
    block.wait_until_running()
    block.wait_until_running()
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    wait_until_dead(family)
    assert states(spec) == {"RUNNING": 2}
    run_sweep(spec, bowl, N)
    assert_holds_exactly(spec, N)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_random_points_a_study_of_n_holds_the_n_trials_of_an_undisturbed_one(
    new_spec: StudySpec, seed: int
) -> None:
    kills = interrupted_until_done(lambda: run_sweep(new_spec, bowl, N, workers=1 + seed % 2), seed, 150)
    assert kills >= 3
    assert_holds_exactly(new_spec, N)


@pytest.mark.slow  # test_bad_weather has a short one of these, with a ladder
def test_two_sweeps_at_once_each_killed_at_random_points_hold_the_same(new_spec: StudySpec) -> None:
    def one(seed: int) -> None:
        assert interrupted_until_done(lambda: run_sweep(new_spec, bowl, N), seed, 150) >= 2

    both = [in_process(lambda seed=seed: one(seed)) for seed in (11, 12)]
    assert [ended(process) for process in both] == [0, 0]
    assert_holds_exactly(new_spec, N)


def test_tpe_runs_an_orphan_again_with_its_hyperparameters(spec: StudySpec, tmp_path: Path) -> None:
    guided = replace(spec, sampler="tpe")
    block = Block.new(tmp_path)
    process = in_process(lambda: run_sweep(guided, block, N))
    block.wait_until_running()
    process.kill()
    process.join()
    before = load(guided).trials[0].params
    run_sweep(guided, bowl, N)
    assert len(before) == 2
    assert load(guided).trials[0].params == before
    assert set(states(guided)) <= {"COMPLETE", "PRUNED"}
    assert len(load(guided).trials) == N


# Several sweeps on one study


def test_two_sweeps_at_once_share_the_trials(new_spec: StudySpec, tmp_path: Path) -> None:
    """Both begin together, without a database, and end together; no trial is run twice and none too many."""
    spec = new_spec
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        handle = os.open(tmp_path / "runs", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, b"%d\n" % drawn().index(dict(parameters)))
        return bowl(parameters, report)

    def sweep() -> None:
        barrier.wait(LIMIT_S)
        assert sum(trial.finished for trial in run_sweep(spec, objective, N).trials) == N

    assert [ended(process) for process in [in_process(sweep), in_process(sweep)]] == [0, 0]
    assert sorted((tmp_path / "runs").read_text().split()) == [str(slot) for slot in range(N)]
    assert_holds_exactly(spec, N)


def test_a_living_sweeps_trial_is_waited_for_and_not_taken(spec: StudySpec, tmp_path: Path) -> None:
    go, wait_here = tmp_path / "go", tmp_path / "begun"
    for pipe in (go, wait_here):
        os.mkfifo(pipe)

    def slow(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        wait_here.write_text("!")
        go.read_text()
        return bowl(parameters, report)

    def quick(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        assert dict(parameters) == drawn()[1]
        go.write_text("!")
        return bowl(parameters, report)

    other = in_process(lambda: run_sweep(spec, slow, 1))
    wait_here.read_text()
    # A heartbeat that is long overdue says nothing where the process can be looked up.
    assert len(run_sweep(spec, quick, 2, grace_s=0.0).trials) == 2
    assert ended(other) == 0
    assert_holds_exactly(spec, 2)


def test_a_trial_of_another_machine_is_run_again_when_its_heartbeat_stops(spec: StudySpec, tmp_path: Path) -> None:
    block = Block.new(tmp_path)
    process = in_process(lambda: run_sweep(spec, block, 2))
    block.wait_until_running()
    process.kill()
    process.join()
    study = load(spec)
    owner = {**study.trials[0].user_attrs["owner"], "machine": "elsewhere"}
    study._storage.set_trial_user_attr(study.trials[0]._trial_id, "owner", owner)
    run_sweep(spec, bowl, 2, grace_s=0.1)
    assert_holds_exactly(spec, 2)


def test_the_heartbeat_of_a_running_trial_goes_on(spec: StudySpec, tmp_path: Path) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        first = load(spec).trials[0].user_attrs["owner"]
        while (owner := load(spec).trials[0].user_attrs["owner"]) == first:
            pass
        assert {**owner, "beat": 0} == {**first, "beat": 0}
        return TrialOutcome(float(owner["beat"] - first["beat"]))

    best = run_sweep(spec, objective, 1, heartbeat_s=0.01).best
    assert best is not None
    assert (best.loss or 0) >= 1


def test_a_result_that_comes_after_another_owners_is_dropped(spec: StudySpec) -> None:
    """A machine that slept is taken for dead; when it wakes, its trial may have been finished elsewhere."""

    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        if dict(parameters) == drawn()[0]:
            load(spec).tell(0, 0.125)
        report(5, 3.0)
        return TrialOutcome(1.0)

    run_sweep(spec, objective, 2)
    assert [trial.value for trial in load(spec).trials] == [0.125, 1.0]


def test_trials_beyond_n_are_never_run(spec: StudySpec) -> None:
    """Two sweeps that reach the end together on a database server may both create the last trial."""
    run_sweep(spec, bowl, 2)
    load(spec).add_trial(optuna.trial.create_trial(state=TrialState.WAITING))
    run_sweep(spec, bowl, 2)
    assert load(spec).trials[2].state == TrialState.WAITING
    run_sweep(spec, bowl, 3)
    assert_holds_exactly(spec, 3)


def meanwhile(monkeypatch: pytest.MonkeyPatch, spec: StudySpec, when: Callable[[FrozenTrial], bool]) -> None:
    """Lets another sweep create the same trial just before this one does, which on a database server can happen."""
    storage = type(load(spec)._storage)
    create = storage.create_new_trial

    def create_second(self: Any, study_id: int, template: FrozenTrial) -> int:
        if when(template):
            attributes = {key: value for key, value in template.user_attrs.items() if key != "owner"}
            create(self, study_id, optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=attributes))
        return create(self, study_id, template)

    monkeypatch.setattr(storage, "create_new_trial", create_second)


def test_of_two_sweeps_that_create_the_last_trial_together_one_puts_it_back(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sweep(spec, bowl, 1)
    meanwhile(monkeypatch, spec, lambda template: len(load(spec).trials) == 1)
    run_sweep(spec, bowl, 2)
    assert [trial.state.name for trial in load(spec).trials] == ["COMPLETE", "COMPLETE", "WAITING"]
    assert [trial.params for trial in load(spec).trials] == [*drawn(2), {}]


def test_of_two_sweeps_that_retry_a_trial_together_one_runs_it(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        crash(parameters)
        return bowl(parameters, report)

    run_sweep(spec, objective, 3)
    meanwhile(monkeypatch, spec, lambda template: "retry_of" in template.user_attrs)
    trials = run_sweep(spec, bowl, 3).trials
    assert sorted(trial.slot for trial in trials if trial.finished) == [0, 1, 2]
    assert [(trial.slot, trial.state) for trial in trials[3:]] == [(2, "complete"), (2, "failed")]
    assert "another process" in (trials[4].reason or "")


# Another study, and a bad place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"space": Space({**SPACE.ranges, "lr": SearchRange(1e-3, 1e-1, True)})},
            ["space.lr.low", "0.0001", "0.001"],
        ),
        ({"space": Space({"lr": SPACE.ranges["lr"]})}, ["space.scale is missing now"]),
        ({"space": Space({**SPACE.ranges, "beta": SearchRange(0, 1, False)})}, ["space.beta is new"]),
        ({"context": {"proxy": {"layers": 3}}}, ["context.proxy.layers was 2 and is 3"]),
        ({"seed": 4, "sampler": "tpe"}, ["seed was 3 and is 4", "sampler was 'random' and is 'tpe'"]),
    ],
)
def test_another_study_under_the_same_name_is_refused_with_what_differs(
    spec: StudySpec, change: dict[str, Any], said: list[str]
) -> None:
    run_sweep(spec, bowl, 1)
    with pytest.raises(InputError) as refusal:
        run_sweep(replace(spec, **change), bowl, 2)
    assert "'search'" in str(refusal.value)
    for part in said:
        assert part in str(refusal.value)
    # The twin with nothing changed goes on.
    run_sweep(spec, bowl, 2)
    assert_holds_exactly(spec, 2)


def test_the_order_of_a_space_makes_no_other_study(spec: StudySpec) -> None:
    run_sweep(spec, bowl, 1)
    run_sweep(replace(spec, space=Space(dict(reversed(SPACE.ranges.items())))), bowl, 2)
    assert_holds_exactly(spec, 2)


def test_a_study_of_somebody_else_is_refused_and_kept(spec: StudySpec) -> None:
    theirs = optuna.create_study(study_name=spec.name, storage=spec.storage)
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    for refused in (lambda: run_sweep(spec, bowl, N), lambda: read_study(spec.storage, spec.name)):
        with pytest.raises(InputError, match="not made by a sweep"):
            refused()
    assert len(load(spec).trials) == 1
    assert load(spec).user_attrs == {}


def test_a_study_that_maximises_is_refused(spec: StudySpec) -> None:
    optuna.create_study(study_name=spec.name, storage=spec.storage, direction="maximize")
    with pytest.raises(InputError, match="no minimisation"):
        run_sweep(spec, bowl, N)


def test_a_study_that_is_not_there_is_refused_with_those_that_are(spec: StudySpec) -> None:
    run_sweep(spec, bowl, 1)
    with pytest.raises(InputError, match="no study 'serach' in it, only 'search'"):
        best_trial(spec.storage, "serach")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"n_trials": 0}, "--trials 0"), ({"workers": 0}, "--workers 0")],
)
def test_impossible_numbers_are_refused(spec: StudySpec, change: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run_sweep(spec, bowl, **{"n_trials": N, **change})


def test_an_unknown_sampler_is_refused(spec: StudySpec) -> None:
    with pytest.raises(InputError, match=r"--sampler 'grid'.*random, tpe"):
        replace(spec, sampler="grid")


def test_a_full_disk_is_named_and_the_same_command_goes_on(spec: StudySpec, tmp_path: Path) -> None:
    run_sweep(spec, bowl, 2)
    file = tmp_path / "results" / "search.db"

    def sweep_with_little_space() -> None:
        # A limit on the size of files stands in for a full disk: writing fails in the same place.
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, resource.RLIM_INFINITY))
        with pytest.raises(InputError, match=r"search\.db: the storage failed .* give the same command again"):
            run_sweep(spec, bowl, 60)

    assert ended(in_process(sweep_with_little_space)) == 0
    kept = [trial.params for trial in load(spec).trials if trial.state in FINISHED]
    assert kept[:2] == drawn(2)
    n = len(load(spec).trials) + 1
    run_sweep(spec, bowl, n)
    assert_holds_exactly(spec, n)


# What is shown and left behind


def test_the_database_is_not_open_in_a_trial_and_no_thread_runs(spec: StudySpec, tmp_path: Path) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        handles = [os.readlink(handle) for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]
        threads = len(list(Path("/proc/self/task").iterdir()))
        return TrialOutcome(
            0.0, metrics={"open": sum(str(tmp_path) in handle for handle in handles), "threads": threads}
        )

    for trial in run_sweep(spec, objective, 3, workers=2).trials:
        assert trial.metrics == {"open": 0, "threads": 1}


def test_trials_and_the_best_are_on_disk(spec: StudySpec, tmp_path: Path) -> None:
    def objective(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        crash(parameters)
        return bowl(parameters, report)

    table, best = tmp_path / "out" / "trials.csv", tmp_path / "out" / "best.json"
    result = run_sweep(spec, objective, N, csv_file=table, best_file=best)
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["number", "slot", "state", "loss", "seconds", "reason", "lr", "scale"]
    for row, trial in zip(rows, result.trials, strict=True):
        assert (int(row["number"]), int(row["slot"]), row["state"]) == (trial.number, trial.slot, trial.state)
        assert {"lr": float(row["lr"]), "scale": float(row["scale"])} == trial.parameters
        assert row["loss"] == ("" if trial.loss is None else repr(trial.loss))
        assert (row["seconds"] == "") == (trial.state == "failed")
    assert rows[2]["reason"] == "MemoryError: on purpose"

    assert result.best is not None
    content = json.loads(best.read_text())
    assert content["trial"]["parameters"] == result.best.parameters
    assert content["trial"]["loss"] == result.best.loss
    assert content["context"] == spec.context
    assert content["trials"]["failed"] == 1


def test_one_line_per_trial_on_standard_error_and_nothing_on_standard_output(
    spec: StudySpec, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ended(in_process(lambda: run_sweep(spec, bowl, N))) == 0
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"[{i + 1}/{N}] trial {i}" for i in range(N)]
    assert any("diverged" in line and "loss is NaN at step 1" in line for line in lines)


def test_a_terminal_gets_a_table(spec: StudySpec) -> None:
    ours, terminal = pty.openpty()

    def sweep() -> None:
        os.close(ours)
        sys.stderr = os.fdopen(terminal, "w")
        run_sweep(spec, bowl, N)

    process = in_process(sweep)
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other side has closed
        pass
    assert ended(process) == 0
    plain = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"done +running +left +diverged +best", plain)
    assert re.search(rf"{N} +0 +0 +\d+ +\S+ \(trial \d+\)", plain.splitlines()[-2])


def test_optunas_own_level_of_logging_is_given_back(spec: StudySpec) -> None:
    before = optuna.logging.get_verbosity()
    run_sweep(spec, bowl, 1)
    assert optuna.logging.get_verbosity() == before


def test_an_owner_of_this_process_that_is_done_counts_as_dead(spec: StudySpec, tmp_path: Path) -> None:
    """A notebook lives on after a sweep in it was stopped, and so does its process number."""
    run_sweep(spec, bowl, 1)
    earlier = Owner.this_process()
    earlier.retire()
    attributes = {"owner": earlier.record(0)}
    load(spec).add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes))
    run_sweep(spec, bowl, 2)
    assert_holds_exactly(spec, 2)


def test_a_result_is_what_the_study_holds(spec: StudySpec) -> None:
    result: SweepResult = run_sweep(spec, bowl, 3)
    assert result.record == read_study(spec.storage, spec.name)


def test_trials_may_run_in_fresh_processes(spec: StudySpec) -> None:
    objective: Objective = bowl
    run_sweep(spec, objective, 2, launch="spawn")
    assert_holds_exactly(spec, 2)
