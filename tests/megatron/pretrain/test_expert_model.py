"""A model with experts on Megatron-LM's own training loop, through the launcher."""

from pathlib import Path
from typing import Any

import pytest
from support.lm_recipes import WIDTH, line
from support.lm_runs import SCRIPT, Finished, run_script

from mup_megatron.recipe import recipe, save_recipe
from mup_megatron.yaml_io import read_yaml

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_layer_freq": "[0,1]",
    "moe_shared_expert_gate": True,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.01,
}


def words(width: int = WIDTH, **more: Any) -> list[str]:
    sizes = {"moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": width}
    return line(**EXPERTS, **sizes, disable_bias_linear=True, moe_token_dispatcher_type="alltoall", **more)


def recipe_at(folder: Path, width: int, **hyperparameters: float) -> Path:
    base = {
        **EXPERTS,
        "num_layers": 2,
        "hidden_size": width,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "seq_length": 32,
        "moe_ffn_hidden_size": 32,
        "moe_shared_expert_intermediate_size": width,
        "add_bias_linear": False,
        "transformer_impl": "local",
    }
    content = {
        "base": base,
        "hyperparameters": {"lr": 1e-3, **hyperparameters},
        "schedule": {"lr_decay_style": "constant"},
    }
    path = folder / "r.recipe.yaml"
    save_recipe(recipe(content, source="test"), path)
    return path


def run(folder: Path, given: list[str], ranks: int = 1, *, launcher: bool = True) -> Finished:
    return run_script(SCRIPT, given, ranks, folder=folder, launcher=launcher).require_success()


def test_a_base_that_is_the_target_changes_nothing(tmp_path: Path) -> None:
    own = words(train_iters=3, lr=1e-3, min_lr=0, lr_decay_style="constant")
    without = run(tmp_path / "plain", own, launcher=False)
    given = [*words(train_iters=3), "--mup-recipe", str(recipe_at(tmp_path, WIDTH))]
    assert run(tmp_path / "mup", given).losses == without.losses


def test_ranks_that_hold_different_experts_train_as_the_recipe_says(tmp_path: Path) -> None:
    """What every rank holds is compared with the plan before the first step; then it trains."""
    path = recipe_at(tmp_path, 32, init_method_std=0.05, embedding_multiplier=3.0)
    given = [*words(expert_model_parallel_size=2), "--mup-recipe", str(path)]
    assert len(run(tmp_path / "two", given, 2).losses) == 2
    file = tmp_path / "model.yaml"
    run(tmp_path / "written", [*words(), "--mup-write-model-file", str(file)])
    content = read_yaml(file)
    assert isinstance(content, dict)
    assert {key: content[key] for key in EXPERTS if key != "moe_router_topk"} == {
        **{key: value for key, value in EXPERTS.items() if key != "moe_router_topk"},
        "moe_layer_freq": [0, 1],
    }
