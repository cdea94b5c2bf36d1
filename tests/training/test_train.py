"""A run on Megatron-Core: what it measures and writes, on which layouts, and when it gives up."""

import csv
import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import run_ranks
from support.shapes import recipe_for
from support.training_runs import RECIPE, VOCABULARY, base, make_text, options, target

from mup_megatron.recipe import Recipe, Schedule
from mup_megatron.training.train import TrainingResult, run_training


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix: Path = run_ranks(make_text, 1, tmp_path_factory.mktemp("text"))[0]
    return prefix


def trained(folder: Path, text: Path, *, recipe: Recipe = RECIPE, ranks: int = 1, **changes: Any) -> TrainingResult:
    """The first rank's result, which is that of every rank but for the time it took."""
    first, *others = run_ranks(run_training, ranks, target(), recipe, text, options(folder, **changes))
    for other in others:
        assert other.losses == first.losses
        assert other.validation_loss == first.validation_loss
    result: TrainingResult = first
    return result


def metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "out" / "metrics.csv").open() as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, TrainingResult]:
    """The run that others are compared with: one process, two micro-batches of four."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, trained(folder, text)


def test_a_run_learns_and_says_what_it_measured(plain: tuple[Path, TrainingResult]) -> None:
    folder, result = plain
    rows = metrics(folder)
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    assert tuple(row["loss"] for row in rows) == result.losses, "the file has the very same numbers"
    assert result.losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert result.losses[-1] < result.losses[0] - 0.5
    assert all(row["grad_norm"] > 0 for row in rows)
    assert (result.status, result.reason, result.iterations) == ("complete", None, 12)
    assert result.tokens == 12 * 8 * target().seq_length
    assert result.train_loss == result.losses[-1], "a tenth of twelve iterations is one"
    assert result.validation_loss == pytest.approx(result.losses[-1], abs=0.5)


def parameters_left_by_a_run(folder: Path, text: Path) -> int:
    """The weights of its model that are still there when a run has ended, unless its own end collects them."""
    gc.disable()
    run_training(target(), RECIPE, text, options(folder, train_iters=2))
    return sum(isinstance(each, torch.nn.Parameter) for each in gc.get_objects())


def test_a_run_leaves_nothing_of_itself_in_its_process(text: Path, tmp_path: Path) -> None:
    assert run_ranks(parameters_left_by_a_run, 1, tmp_path, text) == [0]


def test_the_base_learning_rate_follows_the_recipes_schedule(plain: tuple[Path, TrainingResult]) -> None:
    h = RECIPE.hyperparameters
    linear = [h.min_lr + (1 - n / 12) * (h.lr - h.min_lr) for n in range(12)]
    assert [row["lr"] for row in metrics(plain[0])] == pytest.approx(linear, rel=1e-12)


@pytest.mark.parametrize("warmup", [2.0, 0.25])
def test_a_schedule_may_reach_beyond_the_run(tmp_path: Path, text: Path, warmup: float) -> None:
    """The beginning of a long one: a run that is within its warm-up all the time, or that does not come down."""
    schedule = Schedule(lr_decay_style="linear", lr_warmup_fraction=warmup, lr_decay_fraction=10.0)
    recipe = RECIPE.model_copy(update={"schedule": schedule})
    trained(tmp_path, text, recipe=recipe, train_iters=4, eval_iters=1)
    h = recipe.hyperparameters
    up, end = warmup * 4, 40
    expected = [
        h.lr * n / up if n <= up else h.min_lr + (1 - (n - up) / (end - up)) * (h.lr - h.min_lr) for n in range(4)
    ]
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(expected, rel=1e-12)


def test_the_output_says_which_run_it_is(plain: tuple[Path, TrainingResult]) -> None:
    folder, result = plain
    said = json.loads((folder / "out" / "result.json").read_text())
    assert said["fingerprint"] == RECIPE.fingerprint
    assert said["recipe"] == RECIPE.model_dump(mode="json")
    assert said["plan"]["lr_per_role"] == {"input": 0.01, "hidden": 0.005}
    assert (said["train_loss"], said["validation_loss"]) == (result.train_loss, result.validation_loss)
    assert {"recipe.yaml", "plan.json", "run.json", "validation.csv"} <= {p.name for p in (folder / "out").iterdir()}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"micro_batch_size": 8}),
        (1, {"micro_batch_size": None, "eval_interval": 3, "log_interval": 1}),
        (2, {"micro_batch_size": 2}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True}),
    ],
    ids=["one micro-batch", "validating in between", "DP2", "TP2", "TP2 SP distributed optimizer"],
)
def test_layout_micro_batches_and_validation_do_not_change_the_losses(
    plain: tuple[Path, TrainingResult], text: Path, tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    result = trained(tmp_path, text, ranks=ranks, **changes)
    # Rounding of fp32 sums in another order, which twelve updates at LR 0.01 enlarge.
    assert result.losses == pytest.approx(plain[1].losses, abs=1e-4)
    assert result.validation_loss == pytest.approx(plain[1].validation_loss, abs=1e-4)


def test_a_pipeline_trains_and_its_loss_reaches_the_first_rank(
    plain: tuple[Path, TrainingResult], text: Path, tmp_path: Path
) -> None:
    result = trained(tmp_path, text, ranks=2, pipeline_model_parallel_size=2)
    assert tuple(row["loss"] for row in metrics(tmp_path)) == result.losses
    # Each stage draws from a seed of its own, as in Megatron-LM: another draw, the same distribution.
    assert result.losses != plain[1].losses
    assert result.losses == pytest.approx(plain[1].losses, rel=0.05)


def test_an_interleaved_pipeline_trains(text: Path, tmp_path: Path) -> None:
    model = target(num_layers=4)
    chosen = options(tmp_path, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    deep = recipe_for(base(num_layers=4), lr=0.01)
    result = run_ranks(run_training, 2, model, deep, text, chosen)[0]
    assert result.losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert result.losses[-1] < result.losses[0] - 0.5


def test_bf16_stays_close_to_fp32(plain: tuple[Path, TrainingResult], text: Path, tmp_path: Path) -> None:
    result = trained(tmp_path, text, bf16=True)
    assert result.losses != plain[1].losses
    # bf16 has eight bits: half a percent per number.
    assert result.losses == pytest.approx(plain[1].losses, rel=0.02)


def test_without_clipping_the_gradient_norm_is_measured_all_the_same(
    plain: tuple[Path, TrainingResult], text: Path, tmp_path: Path
) -> None:
    trained(tmp_path, text, recipe=recipe_for(base(), lr=0.01, clip_grad=0.0), train_iters=1, eval_iters=0)
    assert metrics(tmp_path)[0]["grad_norm"] == metrics(plain[0])[0]["grad_norm"] > 0


@pytest.mark.parametrize(("rule", "optimizer"), [("standard", "adam"), ("mup", "sgd")])
def test_every_rule_and_optimizer_goes_the_same_way(
    plain: tuple[Path, TrainingResult], text: Path, tmp_path: Path, rule: str, optimizer: str
) -> None:
    result = trained(tmp_path, text, recipe=recipe_for(base(), rule=rule, optimizer=optimizer, lr=0.01), eval_iters=0)
    assert result.losses[-1] < result.losses[0]
    assert result.losses != plain[1].losses
    assert result.validation_loss is None


def test_a_run_that_blows_up_ends_early_and_says_why(text: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base(), lr=1e4, clip_grad=0.0)
    result = trained(tmp_path, text, recipe=recipe, train_iters=60, save=tmp_path / "ck")
    assert result.status == "diverged"
    assert result.iterations < 60
    assert result.reason is not None
    assert str(result.iterations) in result.reason
    assert result.validation_loss is None
    assert len(metrics(tmp_path)) == result.iterations, "the iteration at which it was lost is on record"
    said = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (said["status"], said["reason"]) == ("diverged", result.reason)
    assert not (tmp_path / "ck").exists(), "lost weights are not saved"


def report_and_train(*arguments: Any) -> tuple[list[tuple[int, float]], TrainingResult]:
    reported: list[tuple[int, float]] = []
    result = run_training(*arguments, report=lambda iteration, loss: reported.append((iteration, loss)))
    return reported, result


def test_a_caller_is_told_losses_on_the_way(text: Path, tmp_path: Path) -> None:
    chosen = options(tmp_path, train_iters=5, log_interval=2, eval_iters=0, output=None)
    reported, result = run_ranks(report_and_train, 1, target(), RECIPE, text, chosen)[0]
    assert reported == [(n, result.losses[n - 1]) for n in (2, 4, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"], "without an output folder nothing is written"
