"""Weights and sequences divided among ranks by FSDP and context parallelism: the losses of one process."""

from pathlib import Path
from typing import Any

import pytest
from support.lm_recipes import line, recipe_file
from support.lm_runs import SCRIPT, Finished, run_script

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

ROUNDING = 1e-6
FSDP = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
"""Megatron wants more than one with it."""
DIVIDED: dict[str, dict[str, Any]] = {
    "torch FSDP2": {"use_torch_fsdp2": True, "ckpt_format": "torch_dist"},
    "Megatron-FSDP": {
        "use_megatron_fsdp": True,
        "use_distributed_optimizer": True,
        "data_parallel_sharding_strategy": "optim_grads_params",
        "ckpt_format": "fsdp_dtensor",
        "no_gradient_reduce_div_fusion": True,  # an operation that gloo lacks
    },
}


def run(folder: Path, recipe: Path, flags: dict[str, Any], ranks: int = 1, script: Path = SCRIPT) -> Finished:
    words = [*line(train_iters=4, **flags), "--mup-recipe", str(recipe)]
    own = FSDP if ranks > 1 and script == SCRIPT else None
    return run_script(script, words, ranks, folder=folder, launcher=True, environment=own).require_success()


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    folder = tmp_path_factory.mktemp("untied")
    path = recipe_file(folder)
    said = "untie_embeddings_and_output_weights: "
    path.write_text(path.read_text().replace(f"{said}false", f"{said}true"))
    return path, run(folder / "one", path, {"untie_embeddings_and_output_weights": True})


@pytest.mark.parametrize("kind", DIVIDED)
def test_weights_in_pieces_have_the_losses_of_whole_ones(
    tmp_path: Path, untied: tuple[Path, Finished], kind: str
) -> None:
    """The guard looks at the start and after iterations 1, 2 and 4, when Megatron-FSDP has other tensors in place."""
    recipe, whole = untied
    found = run(tmp_path / "two", recipe, {"untie_embeddings_and_output_weights": True, **DIVIDED[kind]}, ranks=2)
    assert found.losses == pytest.approx(whole.losses, abs=ROUNDING)


def test_sequences_in_pieces_have_the_losses_of_whole_ones(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    whole = run(tmp_path / "one", recipe, {})
    script = Path(__file__).parents[2] / "support" / "lm_sequences.py"
    found = run(tmp_path / "two", recipe, {"context_parallel_size": 2}, ranks=2, script=script)
    assert found.losses == pytest.approx(whole.losses, abs=ROUNDING)
