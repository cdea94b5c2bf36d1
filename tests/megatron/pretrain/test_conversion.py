"""Megatron-LM converts a checkpoint and ends without training: that is a run of the plug-in too."""

from pathlib import Path

import pytest
from support.lm_recipes import line, recipe_file
from support.lm_runs import SCRIPT, Finished, run_script

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")


def test_a_converted_checkpoint_goes_on_as_the_run_would_have(tmp_path: Path) -> None:
    recipe = ["--mup-recipe", str(recipe_file(tmp_path))]

    def run(name: str, **flags: object) -> Finished:
        words = line(train_iters=4, use_distributed_optimizer=True, **flags)
        return run_script(SCRIPT, [*words, *recipe], folder=tmp_path / name, launcher=True).require_success()

    whole = run("whole", save=tmp_path / "ck", save_interval=2, ckpt_format="torch_dist")
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("2")
    converting = {"ckpt_convert_format": "torch", "ckpt_convert_save": tmp_path / "converted"}
    converted = run("convert", load=tmp_path / "ck", ckpt_format="torch_dist", use_checkpoint_args=True, **converting)
    assert converted.losses == {}
    assert "a model file has no key for it" not in converted.out[0]
    assert (tmp_path / "converted" / "torch" / "iter_0000002" / "mup.recipe.yaml").is_file()
    rest = run("rest", load=tmp_path / "converted" / "torch", ckpt_format="torch")
    assert rest.losses == {iteration: whole.losses[iteration] for iteration in (3, 4)}
