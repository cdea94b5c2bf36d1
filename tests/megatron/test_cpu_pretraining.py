"""Megatron-LM's own training loop on the CPU runtime, without the plug-in: every layout trains, and gives one loss.

The script is examples/pretrain.py. The true pretrain_gpt.py of each Megatron-LM is run by hand: docs/cpu.md has the
commands and what came of them.
"""

from pathlib import Path

import pytest
from support.lm_runs import CPU_FLAGS, MOCK_DATA, SCRIPT, Finished, gpt, run_script

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

SAVED = 2
"""The iteration after which the first run saves and every other goes on."""

RESHARDABLE = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
"""A checkpoint whose optimizer any layout can load. Without it, one of the same layout only."""

SPLIT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
DEEP = {**SPLIT, "pipeline_model_parallel_size": 2}
EXPERTS = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "disable_bias_linear": True,
}
FP32 = 1e-5
"""Sums in another order; the losses of these layouts were measured to differ by up to 1e-6."""
BF16 = 2e-3
"""Each rounds to 8 bits; measured against fp32: up to 3e-4."""


def train(folder: Path, ranks: int = 1, **changes: object) -> Finished:
    words = [*gpt(**changes), *MOCK_DATA, *CPU_FLAGS]
    return run_script(SCRIPT, words, ranks, folder=folder).require_success()


def resumed(checkpoint: Path, folder: Path, ranks: int = 1, **changes: object) -> dict[int, float]:
    # Not --ckpt-step, which checkpoints in the torch format pass over.
    (checkpoint / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    return train(folder, ranks, load=checkpoint, **changes).losses


def after(losses: dict[int, float]) -> dict[int, float]:
    """What a run has to show that goes on from the checkpoint."""
    return {iteration: loss for iteration, loss in losses.items() if iteration > SAVED}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one") / "checkpoint"


@pytest.fixture(scope="module")
def one(checkpoint: Path) -> Finished:
    """Six iterations in one process, with a checkpoint after the second and an evaluation at the end."""
    return train(checkpoint.parent, save=checkpoint, save_interval=SAVED, eval_iters=1, **RESHARDABLE)


def test_one_process_trains_and_evaluates(one: Finished) -> None:
    losses = list(one.losses.values())
    assert list(one.losses) == [1, 2, 3, 4, 5, 6]
    assert losses[0] == pytest.approx(6.25, abs=0.1)  # ln 512, and a little for the random weights
    assert losses[-1] < losses[0] - 0.1
    assert "lm loss value" in one.out[0]


def test_resume_is_bitwise_the_uninterrupted_run(one: Finished, checkpoint: Path, tmp_path: Path) -> None:
    assert resumed(checkpoint, tmp_path, **RESHARDABLE) == after(one.losses)


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        pytest.param(SPLIT, 2, id="tp2-sequence_parallel"),
        pytest.param(INTERLEAVED, 2, id="pp2-interleaved"),
        pytest.param({}, 2, id="dp2", marks=pytest.mark.slow),
        pytest.param(DEEP, 4, id="tp2-pp2", marks=pytest.mark.slow),
    ],
)
def test_other_layouts_continue_the_loss(
    one: Finished, checkpoint: Path, tmp_path: Path, layout: dict[str, object], ranks: int
) -> None:
    losses = resumed(checkpoint, tmp_path, ranks, **RESHARDABLE, **layout)
    assert losses == pytest.approx(after(one.losses), abs=FP32, rel=0)


@pytest.mark.slow
def test_experts_on_two_ranks_have_the_loss_of_one(tmp_path: Path) -> None:
    """From the same weights: Megatron seeds each rank of experts differently. Their optimizer is saved apart."""
    checkpoint = tmp_path / "checkpoint"
    train(tmp_path / "start", save=checkpoint, save_interval=SAVED, exit_interval=SAVED, **EXPERTS)
    weights = {"no_load_optim": True, "no_load_rng": True, **EXPERTS}
    one = resumed(checkpoint, tmp_path / "one", **weights)
    assert list(one) == [3, 4, 5, 6]
    two = resumed(checkpoint, tmp_path / "two", 2, expert_model_parallel_size=2, **weights)
    assert two == pytest.approx(one, abs=FP32, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
@pytest.mark.parametrize("bf16", [None, True], ids=["fp32", "bf16"])
def test_resume_with_the_distributed_optimizer(
    one: Finished, tmp_path: Path, ckpt_format: str, bf16: bool | None
) -> None:
    """In Megatron-LM's own checkpoint formats, which only the same layout can load."""
    same = {"ckpt_format": ckpt_format, "bf16": bf16, "use_distributed_optimizer": True, **SPLIT}
    checkpoint = tmp_path / "checkpoint"
    whole = train(tmp_path / "whole", 2, save=checkpoint, save_interval=SAVED, **same)
    assert whole.losses == pytest.approx(one.losses, abs=BF16 if bf16 else FP32, rel=0)
    assert resumed(checkpoint, tmp_path / "rest", 2, **same) == after(whole.losses)
