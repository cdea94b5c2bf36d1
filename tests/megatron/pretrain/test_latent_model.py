"""Latent attention and multi-token prediction on Megatron-LM's own training loop, through the launcher."""

from pathlib import Path
from typing import Any

import pytest
from support.lm_recipes import a_recipe, line
from support.lm_runs import SCRIPT, Finished, run_script

from mup_megatron.recipe import save_recipe

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

ROUNDING = 1e-5
"""Absolute, of a loss of about 6 after a few steps in fp32."""
LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 16,
    "qk_layernorm": True,
    "rotary_scaling_factor": 40.0,
    "mscale_all_dim": 1.0,
    "mtp_num_layers": 1,
    "position_embedding_type": "none",
    "untie_embeddings_and_output_weights": True,
}


def recipe_file(folder: Path) -> Path:
    tuned = a_recipe()
    base = tuned.megatron_base.model_copy(update=LATENT)
    save_recipe(tuned.model_copy(update={"base": base}), folder / "latent.recipe.yaml")
    return folder / "latent.recipe.yaml"


def run(folder: Path, words: list[str], ranks: int = 1) -> Finished:
    return run_script(SCRIPT, words, ranks, folder=folder, launcher=True)


def test_it_trains_and_goes_on_in_other_layouts(tmp_path: Path) -> None:
    """From TP2 to PP2; each is the run that was never stopped, and none is the one without the plug-in."""
    more = ["--mup-recipe", str(recipe_file(tmp_path))]

    def trained(name: str, *, load: str | None = None, ranks: int = 1, **layout: Any) -> Finished:
        saving = {"save": tmp_path / name, "save_interval": 2, "ckpt_format": "torch_dist"}
        if load is not None:
            saving["load"] = tmp_path / load
        own: dict[str, Any] = {"train_iters": 4, "use_distributed_optimizer": True, **LATENT, **saving, **layout}
        return run(tmp_path / f"{name}-ranks", [*line(**own, dist_ckpt_optim_fully_reshardable=True), *more], ranks)

    whole = trained("whole").require_success().losses
    tensor = trained("tensor", ranks=2, tensor_model_parallel_size=2, sequence_parallel=True).require_success()
    assert tensor.losses == pytest.approx(whole, abs=ROUNDING)
    (tmp_path / "tensor" / "latest_checkpointed_iteration.txt").write_text("2")
    pipeline = trained("pipeline", load="tensor", ranks=2, pipeline_model_parallel_size=2).require_success()
    assert pipeline.losses == pytest.approx({i: whole[i] for i in (3, 4)}, abs=ROUNDING)


def test_the_model_file_of_a_line_has_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    run(tmp_path / "ranks", [*line(**LATENT), "--mup-write-model-file", str(path)]).require_success()
    written = path.read_text()
    said = ("multi_latent_attention: true", "q_lora_rank: 16", "mscale_all_dim: 1.0", "mtp_num_layers: 1")
    assert all(words in written for words in said)
    assert "kv_channels" not in written
