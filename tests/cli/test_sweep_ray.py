"""`sweep --ray`: with a stand-in for Ray, and on Ray itself where it is installed."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.commands import Command

from mup_megatron.cli import main as cli
from mup_megatron.cli import sweep
from mup_megatron.errors import InputError
from mup_megatron.search import Interruption, ReportFn, TrialOutcome, ray_tasks, read_study
from mup_megatron.search.ray_tasks import run_on_ray
from mup_megatron.tuning import ProxyTraining

# pytest-xdist runs a thread beside the tests, and Python warns of every fork then.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SWEEP = ("sweep", "base.yaml", "--data", "text", "--study", "small", "--train-iters", "3", "--global-batch-size", "2",
         "--eval-iters", "1", "--trials", "4", "--workers", "2", "--ray")  # fmt: skip


class StandIn(ModuleType):
    """As much of Ray as is used; it runs tasks at once."""

    def __init__(self, gpus: int = 0) -> None:
        super().__init__("ray")
        self._gpus = gpus
        self.options: dict[str, Any] = {}
        self.tasks: list[list[str]] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        pass

    def shutdown(self) -> None:
        self.is_shut_down = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0, **({"GPU": float(self._gpus)} if self._gpus else {})}

    def nodes(self) -> list[str]:
        return ["one"]

    def get(self, results: list[Any]) -> list[Any]:
        return results

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        self.options = options

        class Task:
            def __init__(self, function: Callable[..., Any]) -> None:
                self._function = function

            def remote(task, words: list[str], *rest: Any) -> Any:  # noqa: N805
                self.tasks.append(words)
                return task._function(words, *rest)

        return Task


@pytest.mark.parametrize("gpus", [0, 4])
def test_each_task_is_a_command_and_a_mistake_is_told(gpus: int, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    ray, said = StandIn(gpus), list[str]()
    monkeypatch.setitem(sys.modules, "ray", ray)
    run_on_ray(["recipe", "--base", "base.yaml", "--lr", "0.01", "-o", "made.yaml", "--force"], 2, say=said.append)
    assert (here / "made.yaml").exists()
    assert len(ray.tasks) == 2
    assert ray.options == {"num_cpus": 1, "num_gpus": min(gpus, 1), "max_retries": -1}
    assert said == ["2 tasks on 1 machines of Ray's"]
    with pytest.raises(InputError, match=r"(?s)--ray: a task ended with exit code 2: .*nowhere\.yaml: no such file"):
        run_on_ray(["recipe", "--base", "nowhere.yaml", "--lr", "0.01"], 1, say=said.append)
    assert ray.is_shut_down


def test_without_ray_and_with_sqlite_it_is_refused(
    run: Command, here: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for words, message in (((), "--ray: SQLite is for one machine"), (("--storage", "journal:///s.log"), "needs Ray")):
        code, out, err = run(*SWEEP, *words)
        assert (code, out) == (2, "")
        assert message in err
    assert not (here / "s.log").exists()


def test_the_machine_that_starts_it_need_not_be_able_to_run_a_trial(
    run: Command, here: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has too little memory, and gives the trial that crashed to nobody."""
    driver = os.getpid()

    def rate(
        self: ProxyTraining, parameters: Mapping[str, float], report: ReportFn, interruption: Interruption
    ) -> TrialOutcome:
        with (here / "begun").open("a") as begun:
            begun.write("x")
        if interruption.number == 1:
            raise ValueError("by bad luck")
        return TrialOutcome(3.0 + parameters["lr"])

    def free() -> tuple[int, int]:
        return (1, 1) if os.getpid() == driver else (2**40, 2**40)

    def task(words: list[str], *rest: object) -> tuple[int, str]:
        process = multiprocessing.get_context("fork").Process(target=cli.main, args=(words,))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode, "what it said"

    monkeypatch.setattr(ProxyTraining, "resume", rate)
    monkeypatch.setattr(sweep, "free_memory", free)
    monkeypatch.setattr(ray_tasks, "_run", task)
    monkeypatch.setitem(sys.modules, "ray", StandIn())
    code, out, err = run(*SWEEP, "--storage", "journal:///s.log", "--workers", "1")
    assert code == 0, err
    best = read_study("journal:///s.log", "small").require_best()
    assert out.startswith(f"best: trial {best.number}, loss {best.loss:.6g}\n")
    assert "Trials without a result: 1 failed. The same command tries again." in err
    assert len((here / "begun").read_text()) == 3 + 2
    assert json.loads((here / "results" / "small" / "best.json").read_text())["trials"] == {"complete": 3, "failed": 1}


@pytest.mark.parametrize("workers", ["0", "100000"])
def test_how_many_tasks_is_looked_at_before_there_is_a_cluster(
    run: Command, here: Path, data: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run(*SWEEP, "--storage", "journal:///s.log", "--workers", workers)
    assert code == 2
    assert f"--workers {workers}: must be at" in err


@pytest.mark.slow
def test_two_tasks_of_ray_end_a_study(run: Command, here: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("RAY_DISABLE_MEMORY_MONITOR", "1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        done = run(*SWEEP, "--storage", "journal:///s.log")
    finally:
        ray.shutdown()
    assert done.code == 0, done.err
    trials = read_study("journal:///s.log", "small").trials
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert json.loads((here / "results" / "small" / "best.json").read_text())["trials"] == {"complete": 4}
