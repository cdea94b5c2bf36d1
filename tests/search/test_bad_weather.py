"""A search over fidelities by two commands, in which everything is killed again and again: the result is the same."""

import contextlib
import math
import multiprocessing
import os
import random
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil
import pytest
from support.blocking import LIMIT_S
from support.engines import GrpcServer

from mup_megatron.errors import Terminated
from mup_megatron.search import Fidelity, Interruption, Ladder, ReportFn, Rung, StudySpec, TrialOutcome, run_sweep
from mup_megatron.search.owner import Owner, OwnerWatch
from mup_megatron.search.space import SearchRange, Space

# pytest-xdist runs a thread beside the tests, and Python warns of every fork then.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SPACE = Space({"x": SearchRange(0.0, 1.0, log=False)})


@dataclass(frozen=True)
class Stepping:
    """A trial on a rung that writes every step into a file, and goes on from its last when it was stopped in order.

    Two of three crash once, by a signal to the trial or to its worker: after a second time they would be given up.
    """

    folder: Path
    rung: int
    steps: int

    def loss(self, x: float) -> float | None:
        return None if x > 0.9 else abs(x - 0.3 - 0.05 * self.rung)

    def _crash_once(self, key: str) -> None:
        whom = random.Random(key).choice([None, os.getpid(), os.getppid()])
        if whom is not None and not (self.folder / f"crashed {key}").exists():
            (self.folder / f"crashed {key}").touch()
            os.kill(whom, signal.SIGKILL)
            signal.pause()

    def __call__(self, parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        raise AssertionError("not to be run without a place for its state")

    def resume(
        self, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
    ) -> TrialOutcome | None:
        file, x = interruption.folder / "count", parameters["x"]
        for step in range(int(file.read_text()) if file.exists() else 0, self.steps):
            with (self.folder / "steps").open("a") as steps:
                steps.write(f"{os.getpid()} {os.getppid()} {self.rung} {x!r}\n")
            report(step, float(step))
            self._crash_once(f"{self.rung} {x!r}")
            select.select([], [], [], 0.01)
            if interruption.requested():
                interruption.folder.mkdir(parents=True, exist_ok=True)
                file.write_text(str(step + 1))
                return None
        return TrialOutcome(self.loss(x), reason="x is large" if x > 0.9 else None)


class Weather:
    """Two commands on one study, what they have done so far, and everything that can happen to them."""

    def __init__(self, folder: Path, spec: StudySpec, steps: int, server: GrpcServer | None, seed: int) -> None:
        self._folder, self._spec, self._server = folder, spec, server
        assert spec.ladder is not None
        self._ladder = spec.ladder
        self._objectives = [Stepping(folder, rung, steps) for rung in range(len(spec.ladder.rungs))]
        self._rng = random.Random(seed)
        self._commands: list[multiprocessing.Process | None] = [None, None]
        self.kills: Counter[str] = Counter()
        (folder / "steps").touch()

    def _search(self) -> None:
        try:
            run_sweep(
                self._spec, self._objectives, self._ladder.trials, workers=2, heartbeat_s=0.2, grace_s=2.0,
                state_folder=self._folder / "states",
            )  # fmt: skip
        except Terminated:
            raise SystemExit(143) from None

    def _lines(self) -> list[list[str]]:
        return [line.split() for line in (self._folder / "steps").read_text().splitlines()]

    def _start_what_is_gone(self) -> bool:
        """Starts commands that have ended before the study was complete; returns whether none runs any more."""
        for place, command in enumerate(self._commands):
            if command is None or command.exitcode not in (None, 0):
                # Told to end before it listens, a process ends by the signal.
                known = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 1)
                assert command is None or command.exitcode in known
                started = multiprocessing.get_context("fork").Process(target=self._search)
                started.start()
                self._commands[place] = started
        return all(command is not None and command.exitcode == 0 for command in self._commands)

    def last(self, kills: int) -> None:
        """Lets so many things happen, one after every few steps, and then the study end."""
        deadline = time.monotonic() + 10 * LIMIT_S
        next_at = self._rng.randrange(1, 5)
        while not self._start_what_is_gone():
            assert time.monotonic() < deadline, f"not complete after {self.kills}"
            select.select([], [], [], 0.01)
            done = self._lines()
            if len(done) >= next_at and self.kills.total() < kills:
                self._strike(done[-1])
                next_at = len(done) + self._rng.randrange(1, 5)

    def _strike(self, line: list[str]) -> None:
        trial, worker, *_ = line
        kinds: dict[str, Callable[[], None]] = {
            "a command killed": lambda: self._signal(self._a_command(), signal.SIGKILL),
            "a command told to end": lambda: self._signal(self._a_command(), signal.SIGTERM),
            "a worker told to end": lambda: self._signal(int(worker), signal.SIGTERM),
            "a trial told to end": lambda: self._signal(int(trial), signal.SIGTERM),
        }
        if self._server is not None:
            kinds["the server killed"] = self._restart_server
        kind = self._rng.choice(sorted(kinds))
        kinds[kind]()
        self.kills[kind] += 1

    def _a_command(self) -> int:
        return self._rng.choice([command.pid for command in self._commands if command is not None]) or 0

    def _signal(self, pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpid() in [parent.pid for parent in psutil.Process(pid).parents()]:  # still one of ours
                os.kill(pid, number)

    def _restart_server(self) -> None:
        assert self._server is not None
        self._server.kill()
        self._server.start()

    def close(self) -> None:
        for command in self._commands:
            if command is not None:
                command.kill()


def undisturbed(ladder: Ladder, folder: Path) -> dict[int, float | None]:
    """Slot → loss of plain halving."""
    found: dict[int, float | None] = {}
    candidates = list(range(ladder.candidates))
    for number, rung in enumerate(ladder.rungs):
        loss = Stepping(folder, number, 0).loss
        losses = {i: loss(SPACE.sample(3, i)["x"]) for i in candidates[: rung.trials]}
        found |= {number * ladder.candidates + i: value for i, value in losses.items()}
        candidates = sorted((i for i in losses if losses[i] is not None), key=lambda i: losses[i] or 0.0)
    return found


STORMS = [
    pytest.param("sqlite", (5, 2), 4, 6, id="sqlite"),
    pytest.param("grpc", (5, 2), 4, 6, id="grpc"),
    pytest.param("sqlite", (16, 6, 3), 12, 85, id="sqlite, long", marks=pytest.mark.slow),
    pytest.param("grpc", (16, 6, 3), 12, 85, id="grpc, long", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "counts", "steps", "kills"), STORMS)
def test_the_study_is_that_of_an_undisturbed_search(
    tmp_path: Path, kind: str, counts: tuple[int, ...], steps: int, kills: int
) -> None:
    rungs = [Rung(Fidelity({"rung": number}, 4.0**number), count) for number, count in enumerate(counts)]
    ladder = Ladder(1000.0, tuple(rungs))
    file = f"sqlite:///{tmp_path}/served.db"
    server = GrpcServer(file) if kind == "grpc" else None
    spec = StudySpec("storm", file if server is None else server.url, 3, "random", SPACE, {}, ladder=ladder)
    weather = Weather(tmp_path, spec, steps, server, seed=kills)
    try:
        if server is not None:
            server.start()
        weather.last(kills)
    finally:
        weather.close()
        if server is not None:
            server.kill()
    assert weather.kills.total() == kills
    assert len(list(tmp_path.glob("crashed *"))) >= ladder.trials // 3
    trials = optuna.load_study(study_name="storm", storage=file).trials
    # Where nothing keeps others out two may create a trial of one slot at once, of which one is not run.
    run = [trial for trial in trials if "another process has begun" not in trial.user_attrs.get("reason", "")]
    assert {trial.state.name for trial in run} <= {"COMPLETE", "PRUNED"}
    assert {trial.state.name for trial in trials if trial not in run} <= {"FAIL"}
    found = {trial.user_attrs["slot"]: trial.value if trial.state.name == "COMPLETE" else None for trial in run}
    assert len(run) == len(found)
    assert found == undisturbed(ladder, tmp_path)
    assert all(trial.params == SPACE.sample(3, ladder.place(trial.user_attrs["slot"])[1]) for trial in run)
    assert sum(ladder.rungs[ladder.place(slot)[0]].fidelity.cost for slot in found) == ladder.cost
    assert list((tmp_path / "states").glob("*")) == []


def test_a_clock_that_is_an_hour_off_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine that shares the storage; and of this one, set while a search runs."""
    record = Owner.this_process().record(0)
    hour = 3600.0
    clock, boot = time.time, psutil.boot_time
    monkeypatch.setattr(time, "time", lambda: clock() - hour)
    monkeypatch.setattr(psutil, "boot_time", lambda: boot() - hour)
    assert not OwnerWatch(0.0).is_dead(0, record)
    assert math.isclose(Owner.this_process().started, record["started"])
    elsewhere, watch = {**record, "machine": "elsewhere"}, OwnerWatch(hour / 2)
    assert not watch.is_dead(1, elsewhere)
    monkeypatch.setattr(time, "time", lambda: clock() + hour)
    assert not watch.is_dead(1, elsewhere)


def test_time_in_which_the_storage_was_away_is_not_counted_against_anybody() -> None:
    watch = OwnerWatch(-1.0)
    record = {"machine": "elsewhere", "token": "a", "beat": 1}
    assert not watch.is_dead(0, record)
    watch.begin_again()
    assert not watch.is_dead(0, record)
    assert watch.is_dead(0, record)
