"""One model as a `GPTModel` and as a `HybridModel` with the pattern `*-*-`: one recipe, the same losses."""

from pathlib import Path
from typing import Any

import pytest
from support.processes import RankFailure, run_ranks
from support.shapes import hybrid, recipe_for
from support.training_runs import base, make_text, options, target

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import Parametrization, PerParameter, Recipe, Schedule
from mup_megatron.training.options import require_possible
from mup_megatron.training.train import TrainingResult, run_training

UNTIED = {"untie_embeddings_and_output_weights": True}
GPT_BASE, GPT_TARGET = base(**UNTIED), target(**UNTIED, hidden_size=128, num_attention_heads=16, ffn_hidden_size=256)
SAME = 1e-6
"""They are bitwise the same on one process; on others the sums are in the order of the layout."""


def tuned_at(model: ModelFile, *own: str) -> Recipe:
    """A recipe with every value off its default, `own` naming two tensors as the base calls them."""
    attention, mlp = own
    overrides = (
        PerParameter(match="output_layer.weight", lr_mult=1.5, init_mult=0.5, multiplier=2.0),
        PerParameter(match=attention, lr_mult=0.5, init_mult=2.0),
        PerParameter(match=mlp, multiplier=1.25),
    )
    return recipe_for(model, lr=0.01, min_lr=1e-3, adam_beta1=0.85, adam_eps=1e-7, clip_grad=0.5).model_copy(
        update={
            "per_parameter": overrides,
            "schedule": Schedule(lr_decay_style="cosine", lr_warmup_fraction=0.2),
            "parametrization": Parametrization(weight_decay_exponent=0.5),
        }
    )


FROM_GPT = tuned_at(GPT_BASE, "decoder.layers.1.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.*fc2.weight")
FROM_HYBRID = tuned_at(
    hybrid(GPT_BASE), "decoder.layers.2.self_attention.linear_qkv.weight", "decoder.layers.1.mlp.*fc2.weight"
)
LAYOUTS: dict[str, tuple[int, dict[str, Any], str | None]] = {
    "one process": (1, {}, None),
    "TP2": (2, {"tensor_model_parallel_size": 2}, None),
    "PP2, split evenly": (2, {"pipeline_model_parallel_size": 2}, None),
    "PP2, as the pattern says": (2, {"pipeline_model_parallel_size": 2}, "*-|*-"),
    "TP2 × PP2, sequence parallel, distributed optimizer": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
        },
        "*-|*-",
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix: Path = run_ranks(make_text, 1, tmp_path_factory.mktemp("text"))[0]
    return prefix


def losses(model: ModelFile, recipe: Recipe, text: Path, folder: Path, layout: str) -> tuple[float, ...]:
    ranks, changes, _ = LAYOUTS[layout]
    told = options(folder, train_iters=10, eval_iters=0, **changes)
    result: TrainingResult = run_ranks(run_training, ranks, model, recipe, text, told)[0]
    assert len(result.losses) == 10
    return result.losses


@pytest.fixture(scope="module", params=LAYOUTS)
def as_gpt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[str, Any]:
    """A layout, and the losses there of the GPT."""
    return request.param, losses(GPT_TARGET, FROM_GPT, text, tmp_path_factory.mktemp("gpt"), request.param)


def test_a_gpts_recipe_trains_the_equal_hybrid_model_alike(as_gpt: tuple[str, Any], text: Path, tmp_path: Path) -> None:
    layout, expected = as_gpt
    if "|" in (LAYOUTS[layout][2] or "") and core_version() < (0, 17, 0):
        pytest.skip("megatron-core 0.16 splits evenly")
    model = hybrid(GPT_TARGET, LAYOUTS[layout][2])
    assert losses(model, FROM_GPT, text, tmp_path, layout) == pytest.approx(expected, abs=SAME)


def test_a_hybrid_models_recipe_trains_the_equal_gpt_alike(text: Path, tmp_path: Path) -> None:
    found = [
        losses(model, recipe, text, tmp_path / str(index), "one process")
        for index, (model, recipe) in enumerate(
            [(GPT_TARGET, FROM_GPT), (GPT_TARGET, FROM_HYBRID), (hybrid(GPT_TARGET), FROM_HYBRID)]
        )
    ]
    assert found[0] == found[1] == found[2]
    plain = losses(GPT_TARGET, recipe_for(GPT_BASE, lr=0.01), text, tmp_path / "plain", "one process")
    assert max(abs(one - other) for one, other in zip(found[0], plain, strict=True)) > 0.01, "the values act"


def test_stages_of_several_kinds_train(text: Path, tmp_path: Path) -> None:
    """Interleaved, and not all of one length: what `|` says, and no even split of a GPT's. 0.16 refuses both."""
    for index, pattern in enumerate(("*|-|*|-", "*-*|-")):
        more = {"micro_batch_size": 2, "pipeline_model_parallel_size": 2}
        told = options(tmp_path / str(index), train_iters=2, eval_iters=0, **more)
        model = hybrid(GPT_TARGET, pattern)
        if core_version() < (0, 17, 0):
            with pytest.raises(RankFailure, match="this Megatron-Core splits patterns evenly"):
                run_ranks(run_training, 2, model, FROM_GPT, text, told)
        else:
            assert len(run_ranks(run_training, 2, model, FROM_GPT, text, told)[0].losses) == 2


@pytest.mark.parametrize(
    ("pattern", "changes", "said"),
    [
        ("*-|*|-", {}, "--pipeline-model-parallel-size 2 does not divide the 3 stages of the model file"),
        (
            "*-|*-",
            {"num_layers_per_virtual_pipeline_stage": 1},
            "--num-layers-per-virtual-pipeline-stage 1: the model file says its stages itself",
        ),
        ("*|-|*|-", {"micro_batch_size": 8}, "several stages on each rank: the 1 micro-batches"),
        ("*-*", {}, "--pipeline-model-parallel-size 2 does not divide num_layers 3"),
    ],
)
def test_stages_that_do_not_fit_are_refused(pattern: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    told = options(tmp_path, pipeline_model_parallel_size=2, **changes)
    with pytest.raises(InputError) as raised:
        require_possible(hybrid(GPT_TARGET, pattern), FROM_GPT, told, world_size=2)
    assert said in str(raised.value)
