"""The arms of benchmarks/lr_width.py: at the base all of them are one run, and beyond it those that should agree do."""

import os
from pathlib import Path
from typing import Any

import lr_width
import pytest
import torch
from small_models import dense
from support.processes import run_ranks
from support.training_runs import make_text

from mup_megatron.architectures.names import READOUT_WEIGHT
from mup_megatron.megatron.versions import core_version, optimizer_package_problem
from mup_megatron.recipe import Hyperparameters, Recipe, Schedule

STEPS, BASE, TARGET = 6, 64, 128
NATIVE = core_version() >= (0, 17, 0)
WIDER = ("proportional", "ffn", "experts")
SHAPES = [name for name in lr_width.SHAPES if name != "muon" or optimizer_package_problem("muon") is None]
WITHOUT_NATIVE = {"latent", "bert"}
"""One takes no softmax scale there, the other's logits are not multiplied."""
Arms = dict[str, dict[str, Any]]
# Multipliers that are powers of 2: wherever they stand, digits are the same.
TUNED = Recipe(
    base=dense(BASE),
    hyperparameters=Hyperparameters(
        lr=2.0**-7, init_method_std=0.06, embedding_multiplier=4.0, output_multiplier=4.0, attention_multiplier=4.0
    ),
    schedule=Schedule(lr_decay_style="linear", lr_warmup_fraction=0.1),
)


def _task(shape: str, width: int) -> Any:
    from arms import Task

    own = lr_width.SHAPES[shape]
    recipe = own.recipe(own.model(BASE, BASE), TUNED, 0)
    # Native μP and microsoft/mup scale eps otherwise, and native μP no weight decay.
    alike = recipe.hyperparameters.model_copy(update={"adam_eps": 1e-20, "weight_decay": 0.0})
    return Task(own.model(width, BASE), recipe.model_copy(update={"hyperparameters": alike}), STEPS, 4, 1)


def _readouts(task: Any) -> dict[str, torch.Tensor]:
    """The readouts that a model with experts begins with."""
    from arms import ARMS

    from mup_megatron.training import ranks

    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=1):
        return {arm: ARMS[arm](task, None).weights[READOUT_WEIGHT].detach().clone() for arm in ("native", "ours")}


def _trained(folder: Path) -> tuple[dict[str, Arms], dict[str, Arms], dict[str, torch.Tensor]]:
    """In a rank: every shape at the base, some at twice its width."""
    from arms import train_arms

    os.chdir(folder)  # where Megatron keeps its indices of the data
    data = make_text(folder)
    at_base = {shape: train_arms(lr_width.ARMS, _task(shape, BASE), data) for shape in SHAPES}
    wider = {shape: train_arms(lr_width.ARMS, _task(shape, TARGET), data) for shape in WIDER}
    return at_base, wider, _readouts(_task("experts", TARGET)) if NATIVE else {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Arms], dict[str, Arms], dict[str, Any]]:
    found: tuple[dict[str, Arms], dict[str, Arms], dict[str, Any]]
    [found] = run_ranks(_trained, 1, tmp_path_factory.mktemp("arms"))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_at_the_base_arms_begin_alike_and_those_of_megatron_give_the_same_digits(trained: Any, shape: str) -> None:
    arms = {arm: row for arm, row in trained[0][shape].items() if "refused" not in row}
    assert set(arms) >= {"standard", "ours", *(["native"] if NATIVE and shape not in WITHOUT_NATIVE else [])}
    assert len({row["start"] for row in arms.values()}) == 1
    assert len({row["batches"] for row in arms.values()}) == 1
    assert all(arms[arm]["curve"] == arms["ours"]["curve"] for arm in arms if arm != "microsoft")
    assert len(set(arms["ours"]["curve"])) == STEPS
    if "microsoft" in arms:
        assert arms["microsoft"]["curve"] == pytest.approx(arms["ours"]["curve"], rel=1e-5)


@pytest.mark.parametrize("arm", ["native", "microsoft"])
def test_where_all_widths_grow_the_right_ones_agree(trained: Any, arm: str) -> None:
    if arm == "native" and not NATIVE:
        pytest.skip("megatron-core 0.16 has no μP of its own")
    arms = trained[1]["proportional"]
    assert arms[arm]["curve"] == pytest.approx(arms["ours"]["curve"], rel=1e-5)
    assert abs(arms["standard"]["curve"][0] / arms["ours"]["curve"][0] - 1) > 0.1


@pytest.mark.skipif(not NATIVE, reason="megatron-core 0.16 has no μP of its own")
@pytest.mark.parametrize("shape", ["ffn", "experts"])
def test_native_differs_where_a_side_does_not_grow(trained: Any, shape: str) -> None:
    arms = trained[1][shape]
    assert arms["native"]["batches"] == arms["ours"]["batches"]
    assert abs(arms["native"]["curve"][-1] / arms["ours"]["curve"][-1] - 1) > 1e-5


@pytest.mark.skipif(not NATIVE, reason="megatron-core 0.16 has no μP of its own")
def test_native_draws_the_readout_beside_experts_as_it_does_elsewhere(trained: Any) -> None:
    native, ours = trained[2]["native"], trained[2]["ours"]
    assert torch.allclose(native, ours, rtol=1e-6, atol=0)


def test_an_arm_that_cannot_be_had_says_why(trained: Any) -> None:
    at_base, wider, _ = trained
    assert "is not type `MuReadout`" in wider["ffn"]["microsoft"]["refused"]
    assert "a router's outputs do not grow" in at_base["experts"]["microsoft"]["refused"]
    if "muon" in at_base:
        assert at_base["muon"]["microsoft"]["refused"] == "it has no rule for muon"
    if not NATIVE:
        assert "from 0.17 on" in at_base["proportional"]["native"]["refused"]
