"""The runs of docs/watching.md: each is the line of a model and a recipe, and what is wrong in it is what it says."""

import itertools
from pathlib import Path

import pytest
import watched_run
from support.watching_page import PAGE

from mup_megatron.megatron.arguments.convert import model_from_flags
from mup_megatron.theory import Role


def rates(run: watched_run.Run) -> dict[Role, float]:
    plan = run.recipe().plan(watched_run.model(run.width))
    return {entry.role: entry.lr / watched_run.TUNED["lr"] for entry in plan.entries}


@pytest.mark.parametrize("run", watched_run.RUNS, ids=lambda run: run.key)
def test_a_line_is_the_model_and_logs_everything(run: watched_run.Run, tmp_path: Path) -> None:
    words = watched_run.words(run, tmp_path, tmp_path / "text", 7)
    own = watched_run.model(run.width)
    read = model_from_flags(words, source="line").model_copy(update={"vocab_size": own.vocab_size})
    assert run.recipe().plan(read) == run.recipe().plan(own)
    given = dict(itertools.pairwise(words))
    assert given["--train-iters"] == "7"
    assert (given["--tensorboard-log-interval"], given["--mup-coordinates-interval"]) == ("1", "1")
    assert {"--tensorboard-dir", "--wandb-project", "--mup-recipe"} <= set(words)


def test_what_is_wrong_is_what_is_said() -> None:
    assert rates(watched_run.NARROW) == {Role.INPUT: 1.0, Role.HIDDEN: 1.0, Role.OUTPUT: 1.0}
    assert rates(watched_run.RIGHT) == {Role.INPUT: 1.0, Role.HIDDEN: 0.25, Role.OUTPUT: 1.0}
    assert rates(watched_run.UNSCALED) == rates(watched_run.NARROW)
    assert rates(watched_run.TOO_HIGH) == {role: 32 * lr for role, lr in rates(watched_run.RIGHT).items()}


def test_the_page_has_each_run_and_each_picture() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"\n| {run.called} |" in text for run in watched_run.RUNS)
    shown = {*watched_run.PICTURES, "tensorboard"}
    assert shown == {path.stem for path in (PAGE.parent / "watching").iterdir()}
    assert all(f"(watching/{name}.png)" in text for name in shown)
