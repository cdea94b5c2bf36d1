"""A hybrid model on Megatron-LM's own training loop, through the launcher, with the recipe of a GPT."""

from pathlib import Path
from typing import Any

import pytest
from support import shapes
from support.lm_recipes import WIDTH, a_recipe, line, recipe_file
from support.lm_runs import SCRIPT, Finished, hybrid, run_script

from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import save_recipe

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

MISTAKEN = Path(__file__).parents[2] / "support" / "lm_mistakes.py"
ROUNDING = 1e-5
"""Absolute, of a loss of about 6 after a few steps in fp32."""
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 16,
    "position_embedding_type": "none",
}
ITERATIONS: dict[str, Any] = {"train_iters": 6, "use_distributed_optimizer": True}


def run(
    folder: Path, words: list[str], ranks: int = 1, *, mistake: str | None = None, launcher: bool = True
) -> Finished:
    script = SCRIPT if mistake is None else MISTAKEN
    more = {"MISTAKE": mistake or ""}
    return run_script(script, words, ranks, folder=folder, launcher=launcher, environment=more)


def test_a_base_that_is_the_target_changes_nothing(tmp_path: Path) -> None:
    """Bitwise the stock model, whose std of residual outputs counts its own layers."""
    plain = {"output_multiplier": 1.0, "embedding_multiplier": 1.0, "init_method_std": 0.02, "weight_decay": 0.01}
    path = recipe_file(tmp_path, width=WIDTH, **plain)
    own = line(**hybrid(), train_iters=4, lr=1e-3, min_lr=0, lr_decay_style="constant")
    without = run(tmp_path / "plain", own, launcher=False).require_success()
    given = [*line(**hybrid(), train_iters=4), "--mup-recipe", str(path)]
    assert run(tmp_path / "mup", given).require_success().losses == without.losses


def test_it_trains_as_the_equal_gpt_does(tmp_path: Path) -> None:
    more = ["--mup-recipe", str(recipe_file(tmp_path))]
    as_gpt = run(tmp_path / "gpt", [*line(), *more]).require_success()
    as_hybrid = run(tmp_path / "hybrid", [*line(**hybrid()), *more]).require_success()
    assert as_hybrid.losses == as_gpt.losses


@pytest.mark.slow  # Mamba layers go on in another one below
def test_it_goes_on_in_other_layouts(tmp_path: Path) -> None:
    """From TP2 to PP2, and from there to one process; each is the run that was never stopped."""
    more = ["--mup-recipe", str(recipe_file(tmp_path))]

    def trained(
        name: str, *, load: str | None = None, ranks: int = 1, pattern: str = "*-*-", **layout: Any
    ) -> Finished:
        saving = {"save": tmp_path / name, "save_interval": 2, "ckpt_format": "torch_dist"}
        if load is not None:
            saving["load"] = tmp_path / load
        words = line(**hybrid(pattern), **ITERATIONS, **saving, dist_ckpt_optim_fully_reshardable=True, **layout)
        return run(tmp_path / f"{name}-ranks", [*words, *more], ranks).require_success()

    def at(name: str, iteration: int) -> None:
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text(str(iteration))

    whole = trained("whole").losses
    tensor = trained("tensor", ranks=2, tensor_model_parallel_size=2, sequence_parallel=True).losses
    assert tensor == pytest.approx(whole, abs=ROUNDING)
    at("tensor", 2)
    pipeline = trained("pipeline", load="tensor", ranks=2, pattern="*-|*-", pipeline_model_parallel_size=2).losses
    assert pipeline == pytest.approx({i: whole[i] for i in (3, 4, 5, 6)}, abs=ROUNDING)
    at("pipeline", 4)
    assert trained("one", load="pipeline").losses == pytest.approx({i: whole[i] for i in (5, 6)}, abs=ROUNDING)


@pytest.mark.parametrize("pattern", [pytest.param("*-M-", marks=pytest.mark.slow), "+-M-/M+"])
def test_mamba_layers_train_and_go_on_in_another_layout(pattern: str, tmp_path: Path) -> None:
    """From TP2 to one process, in which rows of z, x, B, C and dt lie otherwise; with a recipe of a narrower model.

    Latent attention and multi-token prediction are said by the pattern alone.
    """
    latent = "+" in pattern
    if latent and core_version() < (0, 19, 0):
        pytest.skip("megatron-core 0.16 has no latent attention in a pattern")
    path = tmp_path / "mamba.recipe.yaml"
    tuned = a_recipe()
    more = shapes.MAMBA | (LATENT if latent else {})
    base = shapes.hybrid(tuned.megatron_base, pattern, **more, multi_latent_attention=latent)
    save_recipe(tuned.model_copy(update={"base": base}), path)
    own = hybrid(pattern) | more | {"ckpt_format": "torch_dist", "dist_ckpt_optim_fully_reshardable": True}
    own |= {"train_iters": 4, "save": tmp_path / "checkpoints", "save_interval": 2, "mup_recipe": path}
    words = line(**own, tensor_model_parallel_size=2, sequence_parallel=True)
    first = run(tmp_path / "first", words, 2).require_success()
    assert first.losses[4] < first.losses[1]
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    second = run(tmp_path / "second", line(**own, load=tmp_path / "checkpoints")).require_success()
    assert second.losses == pytest.approx({i: first.losses[i] for i in (3, 4)}, abs=ROUNDING)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("attention_ignores_its_scale", "core_attention"),
        ("unknown_parameter", "decoder.layers.0.gate: the model has this parameter, the plan has not"),
        ("frozen_parameter", "decoder.layers.1.mlp.linear_fc1.weight"),
        ("dropped_multiplier", "output_layer"),
        ("weights_drawn_again", "linear_fc1.weight"),
        ("lost_group", "No group of the optimizer holds it"),
        ("flattening_scheduler", "scheduler gives all groups one learning rate"),
    ],
)
def test_a_mistake_is_stopped(tmp_path: Path, mistake: str, said: str) -> None:
    words = [*line(**hybrid()), "--mup-recipe", str(recipe_file(tmp_path))]
    finished = run(tmp_path / "ranks", words, mistake=mistake)
    assert finished.codes == [2], finished.err[0][-2000:]
    assert set(finished.losses) <= {1}
    assert said in finished.err[0]
    assert "Traceback" not in finished.err[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hybrid_layer_pattern": "G*-"}, "--hybrid-layer-pattern: 'G' is a layer of gated delta net"),
        ({"hybrid_layer_pattern": "*-*"}, "the recipe's base is a GPT and the target a hybrid model"),
        ({"spec": "megatron.core.models.gpt.gpt_layer_specs get_gpt_layer_local_spec"}, "--spec: a custom layer"),
    ],
    ids=["gated delta net", "no GPT", "another spec"],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    finished = run(tmp_path / "ranks", [*line(**hybrid() | changes), "--mup-recipe", str(recipe_file(tmp_path))])
    assert finished.codes == [2], finished.err[0][-2000:]
    assert said in finished.err[0]


def test_the_model_file_of_a_line_is_the_hybrid_models(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    words = [*line(**hybrid("*-|*-"), pipeline_model_parallel_size=2), "--mup-write-model-file", str(path)]
    run(tmp_path / "ranks", words).require_success()
    assert "hybrid_layer_pattern: '*-|*-'" in path.read_text()
    assert "transformer_impl: local" in path.read_text()


def test_what_each_layer_puts_out_is_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = {"tensorboard_dir": tmp_path / "board", "tensorboard_log_interval": 1, "mup_coordinates_interval": 1}
    words = [*line(**hybrid(), **board), "--mup-recipe", str(recipe_file(tmp_path))]
    run(tmp_path / "ranks", words).require_success()
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    tags = {tag.removeprefix("mup/rms/") for tag in read.Tags()["scalars"] if tag.startswith("mup/rms/")}
    assert tags == {"embedding", "final_norm", "output_layer", *(f"layer_{index:03d}" for index in range(4))}
