"""`sweep --ray`: with a stand-in for Ray, and on Ray itself where it is installed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.commands import Command

from mup_megatron.errors import InputError
from mup_megatron.search import read_study
from mup_megatron.search.ray_tasks import run_on_ray

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
