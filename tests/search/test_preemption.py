"""SIGTERM to a search whose trials can stop and go on: each keeps its state, and another goes on from it."""

import contextlib
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil
import pytest
from support.blocking import LIMIT_S, own_children, wait_until_dead

from mup_megatron.errors import InputError, Terminated
from mup_megatron.search import Interruption, ReportFn, StudySpec, TrialOutcome, run_sweep, stopping
from mup_megatron.search import sweep as sweep_module
from mup_megatron.search.claims import Claims
from mup_megatron.search.space import SearchRange, Space

# pytest-xdist runs a thread beside the tests, and Python warns of every fork then.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SPACE = Space({"x": SearchRange(0.0, 1.0, log=False)})
REAL_LIMITS = sweep_module.INTERRUPT_S, stopping.AT_MOST_S
STEPS = 6
STOP_AT = 3


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Counting:
    """A trial of six steps that takes its count from its folder, and at the third has `meanwhile` called once."""

    folder: Path
    meanwhile: Callable[[], None] = nothing

    def __call__(self, parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        raise AssertionError("not to be run without a place for its state")

    def resume(
        self, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
    ) -> TrialOutcome | None:
        file = interruption.folder / "count"
        first = int(file.read_text()) if file.exists() else 0
        for step in range(first, STEPS):
            with (self.folder / "steps").open("a") as steps:
                steps.write(f"{step}\n")
            report(step, parameters["x"] + step)
            if step == STOP_AT and not (self.folder / "stopped").exists():
                (self.folder / "stopped").touch()
                self.meanwhile()
            if interruption.requested():
                interruption.folder.mkdir(parents=True, exist_ok=True)
                file.write_text(str(step + 1))
                return None
        return TrialOutcome(parameters["x"] + STEPS)

    def steps(self) -> list[int]:
        """The steps that were done, of all trials in their order."""
        return [int(line) for line in (self.folder / "steps").read_text().split()]


def tell(*pids: int) -> None:
    """Sends SIGTERM, and waits until this process has got one too, from whom it was sent or handed on."""
    got = []
    handle = signal.getsignal(signal.SIGTERM)
    assert callable(handle)
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(handle(number, frame)))
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + LIMIT_S
    while not got and time.monotonic() < deadline:
        select.select([], [], [], 0.01)


def command() -> int:
    """The process of the command, seen from a trial."""
    return psutil.Process(os.getppid()).ppid()


@pytest.fixture
def spec(tmp_path: Path) -> StudySpec:
    return StudySpec("search", f"sqlite:///{tmp_path}/search.db", 3, "random", SPACE, {})


def trials(spec: StudySpec) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=spec.name, storage=spec.storage).trials


def run(spec: StudySpec, objective: object, n: int, tmp_path: Path, workers: int = 1) -> int:
    """The exit code of a search in a process of its own: 143 as the command line has it for Terminated."""

    def search() -> None:
        try:
            run_sweep(spec, objective, n, workers=workers, state_folder=tmp_path / "states")  # type: ignore[arg-type]
        except Terminated:
            raise SystemExit(143) from None

    process = multiprocessing.get_context("fork").Process(target=search)
    process.start()
    process.join(LIMIT_S)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def assert_as_undisturbed(spec: StudySpec, n: int) -> None:
    for slot, trial in enumerate(trials(spec)):
        x = SPACE.sample(3, slot)["x"]
        assert (trial.params, trial.value) == ({"x": x}, x + STEPS)
        assert trial.intermediate_values == {step: x + step for step in range(STEPS)}
    assert len(trials(spec)) == n


TOLD = {
    "the command": lambda: tell(command()),
    "its only worker": lambda: tell(os.getppid()),
    "every process, as Slurm does": lambda: tell(command(), os.getppid(), os.getpid()),
    "every process twice": lambda: tell(*[command(), os.getppid(), os.getpid()] * 2),
}


@pytest.mark.parametrize("who", TOLD)
def test_a_trial_keeps_its_state_and_another_command_goes_on_from_it(spec: StudySpec, tmp_path: Path, who: str) -> None:
    objective = Counting(tmp_path, TOLD[who])
    assert run(spec, objective, 2, tmp_path) == 143
    assert [(trial.state.name, trial.user_attrs.get("attempts")) for trial in trials(spec)] == [("WAITING", None)]
    assert (tmp_path / "states" / "trial-00000" / "count").read_text() == str(STOP_AT + 1)
    before = trials(spec)[0].user_attrs["seconds"]
    assert run(spec, objective, 2, tmp_path) == 0
    assert objective.steps() == [*range(STEPS), *range(STEPS)]
    assert_as_undisturbed(spec, 2)
    assert trials(spec)[0].user_attrs["seconds"] > before
    assert list((tmp_path / "states").iterdir()) == []


@pytest.mark.parametrize("who", ["a worker", "a trial"])
def test_what_a_worker_leaves_is_gone_on_with_by_the_same_command(spec: StudySpec, tmp_path: Path, who: str) -> None:
    objective = Counting(tmp_path, lambda: tell(os.getppid() if who == "a worker" else os.getpid()))
    assert run(spec, objective, 3, tmp_path, workers=2) == 0
    assert sorted(objective.steps()) == sorted([*range(STEPS)] * 3)
    assert_as_undisturbed(spec, 3)


def test_a_search_whose_workers_were_all_told_to_leave_is_terminated(spec: StudySpec, tmp_path: Path) -> None:
    """Also those that have nothing to do yet, or no more."""

    def all_workers() -> None:
        siblings = [child.pid for child in psutil.Process(command()).children()]
        tell(*siblings)

    assert run(spec, Counting(tmp_path, all_workers), 9, tmp_path, workers=3) == 143
    assert {trial.state.name for trial in trials(spec)} <= {"WAITING", "COMPLETE"}
    assert run(spec, Counting(tmp_path), 9, tmp_path, workers=3) == 0
    assert_as_undisturbed(spec, 9)


def test_without_the_folder_a_trial_begins_again(spec: StudySpec, tmp_path: Path) -> None:
    objective = Counting(tmp_path, TOLD["the command"])
    assert run(spec, objective, 1, tmp_path) == 143
    (tmp_path / "states").rename(tmp_path / "elsewhere")
    assert run(spec, objective, 1, tmp_path) == 0
    assert objective.steps() == [*range(STOP_AT + 1), *range(STEPS)]
    assert_as_undisturbed(spec, 1)


def test_a_state_of_no_use_is_dropped(spec: StudySpec, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Refusing(Counting):
        def resume(
            self, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
        ) -> TrialOutcome | None:
            if interruption.folder.exists():
                raise InputError("count: damaged.")
            return super().resume(parameters, report, interruption)

    assert run(spec, Counting(tmp_path, TOLD["the command"]), 1, tmp_path) == 143
    assert run(spec, Refusing(tmp_path), 1, tmp_path) == 0
    assert "begins again: count: damaged." in capfd.readouterr().err
    assert_as_undisturbed(spec, 1)


def test_a_crash_takes_its_state_along(spec: StudySpec, tmp_path: Path) -> None:
    class Crashing(Counting):
        def resume(
            self, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
        ) -> TrialOutcome | None:
            assert not interruption.folder.exists()
            return super().resume(parameters, report, interruption)

    assert run(spec, Counting(tmp_path, TOLD["the command"]), 1, tmp_path) == 143
    assert run(spec, Crashing(tmp_path), 1, tmp_path) == 0
    assert_as_undisturbed(spec, 1)
    assert trials(spec)[0].user_attrs["attempts"] == 1


def test_a_trial_that_does_not_answer_or_cannot_keep_its_state_begins_again(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither counts as a crash: a trial that crashes twice is given up."""

    class Stubborn(Counting):
        def resume(
            self, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
        ) -> TrialOutcome | None:
            os.kill(command(), signal.SIGTERM)
            while not interruption.requested() or self.folder.name == "never":
                select.select([], [], [], 0.01)
            raise OSError("disk full")

    monkeypatch.setattr(sweep_module, "INTERRUPT_S", 1.0)
    (tmp_path / "never").mkdir()
    for folder in (tmp_path, tmp_path / "never"):
        begun = time.monotonic()
        assert run(spec, Stubborn(folder), 1, tmp_path) == 143
        assert time.monotonic() - begun < LIMIT_S
        assert [(trial.state.name, trial.user_attrs.get("attempts")) for trial in trials(spec)] == [("WAITING", None)]
    assert run(spec, Counting(tmp_path), 1, tmp_path) == 0
    assert_as_undisturbed(spec, 1)


def test_there_is_a_limit_to_how_long_it_takes_to_stop(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a storage hangs. Ten seconds is what a batch system may grant."""

    def hang(self: Claims) -> None:
        while True:
            signal.pause()

    assert REAL_LIMITS[0] < REAL_LIMITS[1] < 10
    monkeypatch.setattr(stopping, "AT_MOST_S", 0.5)
    monkeypatch.setattr(Claims, "put_back", hang)
    assert run(spec, Counting(tmp_path, TOLD["the command"]), 1, tmp_path) == 143
    monkeypatch.undo()
    assert run(spec, Counting(tmp_path), 1, tmp_path) == 0
    assert [trial.value for trial in trials(spec)] == [SPACE.sample(3, 0)["x"] + STEPS]


def test_a_storage_that_is_away_meanwhile_changes_nothing(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Claims, *args: object) -> None:
        raise optuna.exceptions.StorageInternalError("no route")

    monkeypatch.setattr(Claims, "end", away)
    objective = Counting(tmp_path, TOLD["the command"])
    assert run(spec, objective, 1, tmp_path) == 143
    monkeypatch.undo()
    assert run(spec, objective, 1, tmp_path) == 0
    assert objective.steps() == [*range(STEPS)]
    assert_as_undisturbed(spec, 1)


def test_a_search_that_waits_for_its_storage_stops_in_order(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not ended by an error: a batch system queues again what leaves with 143."""

    def away(self: Claims, *args: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise optuna.exceptions.StorageInternalError("no route")

    for method in ("report", "look"):
        monkeypatch.setattr(Claims, method, away)
        assert run(spec, Counting(tmp_path), 1, tmp_path) == 143
        monkeypatch.undo()
    assert run(spec, Counting(tmp_path), 1, tmp_path) == 0
    assert [trial.value for trial in trials(spec)] == [SPACE.sample(3, 0)["x"] + STEPS]


def test_states_are_kept_when_the_search_ends_with_an_error(spec: StudySpec, tmp_path: Path) -> None:
    """What a user did wrong ends the search; the other trials need not begin again."""

    class Refusing(Counting):
        def resume(
            self, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
        ) -> TrialOutcome | None:
            if parameters == SPACE.sample(3, 1):
                while not (self.folder / "stopped").exists():
                    select.select([], [], [], 0.01)
                raise InputError("corpus.bin: cut short.")
            return super().resume(parameters, report, interruption)

    objective = Refusing(tmp_path, tell)
    with pytest.raises(InputError, match="cut short"):
        run_sweep(spec, objective, 2, workers=2, state_folder=tmp_path / "states")
    assert (tmp_path / "states" / "trial-00000" / "count").exists()
    wait_until_dead(own_children())
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "steps").unlink()
    objective = Counting(tmp_path)
    run_sweep(spec, objective, 2, state_folder=tmp_path / "states")
    assert objective.steps() == [*range(STOP_AT + 1, STEPS), *range(STEPS)]
    assert_as_undisturbed(spec, 2)
