"""`train` with experts: one run on every layout, going on in another one, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from support.processes import RankFailure, run_ranks
from support.shapes import recipe_for
from support.training_runs import base, make_text, options, target

from mup_megatron.errors import InputError
from mup_megatron.training.options import require_possible
from mup_megatron.training.train import run_training

_BOTH: dict[str, Any] = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_gate": True,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "add_bias_linear": False,
}
BASE = base(**_BOTH, moe_shared_expert_intermediate_size=24)
TARGET = target(
    **_BOTH,
    moe_shared_expert_intermediate_size=96,
    hidden_size=128,
    num_attention_heads=16,
    ffn_hidden_size=256,
)
RECIPE = recipe_for(BASE, lr=0.005, adam_eps=1e-7)
AGREE = 1e-5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix: Path = run_ranks(make_text, 1, tmp_path_factory.mktemp("text"))[0]
    return prefix


def trained(folder: Path, text: Path, ranks: int = 1, **changes: Any) -> tuple[float, ...]:
    told = options(folder, **{"train_iters": 10, "eval_iters": 0, "micro_batch_size": 4, **changes})
    losses: tuple[float, ...] = run_ranks(run_training, ranks, TARGET, RECIPE, text, told)[0].losses
    return losses


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, tuple[float, ...]]:
    """A run on one process that saves, and its losses."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(folder, text, save=folder / "ck", save_interval=5)


@pytest.mark.parametrize(
    "layout",
    [
        {"expert_model_parallel_size": 2},
        {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
    ],
    ids=["EP2", "EP2, distributed optimizer", "TP2", "TP2 of whole experts"],
)
def test_a_run_begins_alike_whoever_holds_the_experts(
    alone: tuple[Path, tuple[float, ...]], text: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    assert trained(tmp_path, text, 2, **layout) == pytest.approx(alone[1], abs=AGREE)


def test_a_run_goes_on_with_its_experts_divided(
    alone: tuple[Path, tuple[float, ...]], text: Path, tmp_path: Path
) -> None:
    folder, losses = alone
    (folder / "ck" / "latest_checkpointed_iteration.txt").write_text("5")
    found = trained(tmp_path, text, 2, load=folder / "ck", expert_model_parallel_size=2)
    assert found == pytest.approx(losses, abs=AGREE)
    with pytest.raises(RankFailure, match="of another run: layout"):
        trained(tmp_path, text, 2, load=folder / "ck", expert_model_parallel_size=2, use_distributed_optimizer=True)


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({"tensor_model_parallel_size": 2}, 2, "--tensor-model-parallel-size 2: Megatron trains experts with it under"),
        ({"expert_model_parallel_size": 3}, 3, "--expert-model-parallel-size 3 does not divide num_experts 4"),
        ({"expert_model_parallel_size": 2}, 1, "needs a multiple of 2 processes, and there is one"),
        ({"expert_tensor_parallel_size": 5}, 5, "--expert-tensor-parallel-size 5 does not divide the size 32"),
        ({"expert_model_parallel_size": 0}, 1, "--expert-model-parallel-size 0: must be at least 1"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(changes: dict[str, Any], ranks: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        require_possible(TARGET, RECIPE, options(tmp_path, **changes), ranks)
    assert said in str(raised.value)


def test_a_model_without_experts_has_none_to_divide(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--expert-model-parallel-size 2: the model has no experts"):
        require_possible(target(), recipe_for(base()), options(tmp_path, expert_model_parallel_size=2), 2)


def test_what_megatron_does_not_train_right_is_refused(text: Path, tmp_path: Path) -> None:
    biases = {"add_bias_linear": True, "moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}
    model, recipe = TARGET.model_copy(update=biases), recipe_for(BASE.model_copy(update=biases))
    with pytest.raises(RankFailure, match="add_bias_linear: Megatron's local experts stop in training"):
        run_ranks(run_training, 1, model, recipe, text, options(tmp_path))
