"""kill -9 at any moment: the same command goes on, and ends with the very numbers of a run that was never killed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.processes import RankFailure, run_ranks
from support.shapes import recipe_for
from support.training_runs import CHANGES, RECIPE, base, killed_when, make_text, options, started, target, train_until

from mup_megatron.recipe import Parametrization, Recipe
from mup_megatron.training.options import TrainingOptions
from mup_megatron.training.train import run_training

DROPOUT = target(hidden_dropout=0.1, attention_dropout=0.1)
"""So that a run depends on the state of the random number generators."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2 distributed optimizer": (2, {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix: Path = run_ranks(make_text, 1, tmp_path_factory.mktemp("text"))[0]
    return prefix


def saving(folder: Path, **changes: Any) -> TrainingOptions:
    """A run that goes on from its own checkpoints."""
    where = {"save": folder / "ck", "load": folder / "ck"}
    return options(folder, **{**where, "save_interval": 5, "eval_interval": 4, **changes})


def measured(folder: Path) -> tuple[str, str]:
    return (folder / "out" / "metrics.csv").read_text(), (folder / "out" / "validation.csv").read_text()


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path
) -> tuple[int, dict[str, Any], tuple[str, str]]:
    """Number of ranks, layout, and what such a run measures when nothing happens to it."""
    ranks, layout = request.param
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(run_training, ranks, DROPOUT, RECIPE, text, saving(folder, **layout))
    return ranks, layout, measured(folder)


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first checkpoint": lambda folder: lines(folder / "out" / "metrics.csv") > 2,
    "during a checkpoint": lambda folder: any((folder / "ck").glob(".tmp-*")),
    "after a checkpoint": lambda folder: lines(folder / "out" / "metrics.csv") > 7,
}


def test_killed_from_outside(
    uninterrupted: tuple[int, dict[str, Any], tuple[str, str]], text: Path, tmp_path: Path
) -> None:
    ranks, layout, expected = uninterrupted
    chosen = saving(tmp_path, **layout)
    for moment, come in MOMENTS.items():
        with started(ranks, tmp_path / "process", run_training, DROPOUT, RECIPE, text, chosen) as processes:
            assert killed_when(lambda come=come: come(tmp_path), processes), f"ended by itself {moment}"
    run_ranks(run_training, ranks, DROPOUT, RECIPE, text, chosen)
    assert measured(tmp_path) == expected


CHANGES_OF_A_SAVE = 40
"""A little more than the changes that one checkpoint makes to its folder."""


def survives(
    ranks: int, layout: dict[str, Any], kill_at: int, text: Path, folder: Path, changes: tuple[str, ...] = CHANGES
) -> bool:
    """Kills every rank at a change to the checkpoints' folder and goes on; whether the kill came before the end."""
    chosen = saving(folder, **layout)
    try:
        run_ranks(train_until, ranks, kill_at, changes, folder / "ck", DROPOUT, RECIPE, text, chosen)
    except RankFailure:
        run_ranks(run_training, ranks, DROPOUT, RECIPE, text, chosen)
        return True
    return False


@pytest.mark.parametrize("kill_at", [3, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 6))])
def test_killed_where_a_checkpoint_begins_to_count(
    uninterrupted: tuple[int, dict[str, Any], tuple[str, str]], text: Path, tmp_path: Path, kill_at: int
) -> None:
    """Each save renames three files: Megatron's index, the finished folder, and the tracker that names the folder."""
    ranks, layout, expected = uninterrupted
    assert survives(ranks, layout, kill_at, text, tmp_path, ("os.rename",))
    assert measured(tmp_path) == expected


def test_a_finished_run_is_not_saved_again_however_its_folder_is_spelled(text: Path, tmp_path: Path) -> None:
    run_ranks(run_training, 1, DROPOUT, RECIPE, text, saving(tmp_path))
    written = {path: path.stat().st_ino for path in (tmp_path / "ck").rglob("*")}
    otherwise = tmp_path / "out" / ".." / "ck"
    run_ranks(run_training, 1, DROPOUT, RECIPE, text, saving(tmp_path, load=otherwise))
    assert {path: path.stat().st_ino for path in (tmp_path / "ck").rglob("*")} == written


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", range(1, CHANGES_OF_A_SAVE))
def test_killed_at_every_step_of_writing_a_checkpoint(
    uninterrupted: tuple[int, dict[str, Any], tuple[str, str]], text: Path, tmp_path: Path, kill_at: int
) -> None:
    ranks, layout, expected = uninterrupted
    assert survives(ranks, layout, kill_at, text, tmp_path)
    assert measured(tmp_path) == expected


def test_a_finished_run_given_again_changes_nothing(text: Path, tmp_path: Path) -> None:
    first = run_ranks(run_training, 1, DROPOUT, RECIPE, text, saving(tmp_path))[0]
    before = measured(tmp_path)
    again = run_ranks(run_training, 1, DROPOUT, RECIPE, text, saving(tmp_path))[0]
    assert measured(tmp_path) == before
    assert (again.losses, again.validation_loss) == (first.losses, first.validation_loss)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [(recipe_for(base(), optimizer="sgd", lr=0.01), {}), (RECIPE, {"bf16": True})],
    ids=["SGD", "bf16"],
)
def test_what_is_kept_besides_weights_differs_and_comes_back(
    text: Path, tmp_path: Path, recipe: Recipe, changes: dict[str, Any]
) -> None:
    """SGD has a momentum, and bf16 has weights in fp32 beside those that compute."""
    run_ranks(run_training, 1, DROPOUT, recipe, text, saving(tmp_path, **changes))
    expected = measured(tmp_path)
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("5")
    run_ranks(run_training, 1, DROPOUT, recipe, text, saving(tmp_path, **changes))
    assert measured(tmp_path) == expected


def deepened(**depth: Any) -> Recipe:
    """The recipe, with a rule of depth and a multiplier of branches: `DROPOUT` has twice the base's layers."""
    parametrization = Parametrization.model_validate({"depth": depth})
    shallow = recipe_for(base(num_layers=1), lr=0.01, residual_multiplier=0.7)
    return shallow.model_copy(update={"parametrization": parametrization})


def test_multiplied_branches_come_back_and_another_rule_of_depth_is_refused(text: Path, tmp_path: Path) -> None:
    run_ranks(run_training, 1, DROPOUT, deepened(alpha=1.0), text, saving(tmp_path))
    expected = measured(tmp_path)
    tracker = tmp_path / "ck" / "latest_checkpointed_iteration.txt"
    tracker.write_text("5")
    for other in (deepened(alpha=0.5), RECIPE):
        with pytest.raises(RankFailure, match="another recipe"):
            run_ranks(run_training, 1, DROPOUT, other, text, saving(tmp_path))
    assert tracker.read_text() == "5"
    run_ranks(run_training, 1, DROPOUT, deepened(alpha=1.0), text, saving(tmp_path))
    assert measured(tmp_path) == expected


def test_elsewhere_the_metrics_are_whole_too(text: Path, tmp_path: Path) -> None:
    """Another output folder, another place for new checkpoints: what was measured comes with the checkpoint."""
    run_ranks(run_training, 1, DROPOUT, RECIPE, text, saving(tmp_path))
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("5")
    chosen = saving(tmp_path, output=tmp_path / "other" / "out", save=tmp_path / "other" / "ck")
    run_ranks(run_training, 1, DROPOUT, RECIPE, text, chosen)
    assert measured(tmp_path / "other") == measured(tmp_path)
    assert (tmp_path / "other" / "ck" / "iter_0000012").is_dir()


def test_another_number_of_data_parallel_ranks_may_go_on(text: Path, tmp_path: Path) -> None:
    changes = {"use_distributed_optimizer": True, "micro_batch_size": 2}
    run_ranks(run_training, 2, target(), RECIPE, text, saving(tmp_path, **changes))
    expected = [float(line.split(",")[1]) for line in measured(tmp_path)[0].splitlines()[1:]]
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("5")
    result = run_ranks(run_training, 1, target(), RECIPE, text, saving(tmp_path, **changes))[0]
    assert result.losses[:5] == tuple(expected[:5])
    assert result.losses == pytest.approx(expected, abs=1e-4)
