"""BERT and T5 trained with a recipe: the same losses at every layout, and others than without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import stock
from support.processes import run_ranks
from support.shapes import encoder, recipe_for
from support.training_runs import VOCABULARY, make_text, options

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe
from mup_megatron.training.options import require_possible
from mup_megatron.training.train import run_training

DATA = {"vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 8}
T5 = {**DATA, "decoder_num_layers": 3, "decoder_seq_length": 8}
MODELS: dict[str, tuple[ModelFile, ModelFile]] = {
    "bert": (encoder("bert", 1, **DATA), encoder("bert", 4, **DATA)),
    "t5": (encoder("t5", 1, **T5), encoder("t5", 4, **T5)),
}
ONE: dict[str, Any] = {}
TP2 = {"tensor_model_parallel_size": 2}
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
DP2 = {"use_distributed_optimizer": True}
LAYOUTS = [("bert", 2, TP2), ("bert", 2, SP2), ("bert", 2, PP2), ("bert", 2, DP2), ("t5", 2, TP2), ("t5", 2, DP2)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix: Path = run_ranks(make_text, 1, tmp_path_factory.mktemp("text"))[0]
    return prefix


def tuned(name: str, **changes: Any) -> Recipe:
    return recipe_for(MODELS[name][0], lr=0.01, adam_eps=1e-7, **changes)


def trained(model: ModelFile, recipe: Recipe, text: Path, folder: Path, **layout: Any) -> tuple[float, ...]:
    """In a rank: the first losses from weights that are the same numbers on every layout."""
    from mup_megatron.training import build

    def drawn(*arguments: Any) -> Any:
        chunk: Any = build_chunk(*arguments)
        std = chunk.config.init_method.keywords["std"]
        stock.draw_weights([chunk], std)
        with torch.no_grad():
            for stack in layers_of(chunk):
                own = getattr(chunk, stack)
                for name, parameter in own.named_parameters():
                    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                        parameter *= own.config.output_layer_init_method.keywords["std"] / std
        return chunk

    from mup_megatron.megatron.builders import build_chunk
    from mup_megatron.megatron.names import layers_of

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_chunk", drawn)
        result = run_training(model, recipe, text, options(folder, train_iters=10, eval_iters=0, **layout))
    return result.losses


def both(text: Path, folder: Path) -> dict[str, list[tuple[float, ...]]]:
    """In a rank: of each model the losses with the recipe, and with the base's values at this width."""
    found = {}
    for name, (_, model) in MODELS.items():
        found[name] = [
            trained(model, tuned(name, rule=rule), text, folder / name / rule) for rule in ("mup", "standard")
        ]
    return found


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, ...]]]:
    found: dict[str, list[tuple[float, ...]]] = run_ranks(both, 1, text, tmp_path_factory.mktemp("alone"))[0]
    return found


@pytest.mark.parametrize(("name", "ranks", "layout"), LAYOUTS)
def test_every_layout_trains_alike(
    name: str, ranks: int, layout: dict[str, Any], alone: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    found = run_ranks(trained, ranks, MODELS[name][1], tuned(name), text, tmp_path, **layout)
    assert len(found[0]) == 10
    assert found[0] == pytest.approx(alone[name][0], abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_acts_and_the_model_learns(name: str, alone: dict[str, Any]) -> None:
    planned, standard = alone[name]
    assert max(abs(one - other) for one, other in zip(planned, standard, strict=True)) > 0.01
    assert planned[-1] < planned[0] - 0.1


def test_a_t5_has_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--pipeline-model-parallel-size 2: Megatron-Core does not split a T5"):
        require_possible(MODELS["t5"][1], tuned("t5"), options(tmp_path, **PP2), world_size=2)
