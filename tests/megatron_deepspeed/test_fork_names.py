"""The fork's parameters have the plan's names and shapes, in both of its models, whole, in stages and in shards."""

from collections import Counter
from typing import Any

import pytest
import torch
from support.fork_models import MODELS, GPTModel, GPTModelPipe, Layout
from support.shapes import gpt, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.megatron_deepspeed import core_names
from mup_megatron.megatron_deepspeed.names import global_shape, mismatches, named_parameters

SHAPES = {
    "as GPT-3": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "as Llama": {
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    },
    "grouped queries, four layers": {"group_query_attention": True, "num_query_groups": 2, "num_layers": 4},
    "no positions, padded vocabulary": {"position_embedding_type": "none", "vocab_size": 41},
}


def plan_for(model: ModelFile) -> Any:
    return recipe_for(gpt(1, **model.model_dump(include={"swiglu", "normalization", "position_embedding_type",
        "add_bias_linear", "untie_embeddings_and_output_weights", "group_query_attention", "num_query_groups"}))
    ).plan(model)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_of_the_plan_is_found_once_and_nothing_else(kind: Any, shape: dict[str, Any]) -> None:
    model = gpt(2, **shape)
    built, plan = kind(model), plan_for(model)
    assert Counter(core_names(built).values()) == Counter(entry.name for entry in plan.entries)
    assert mismatches([built], plan, 1) == []


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_shards_have_the_shapes_that_the_plan_expects_of_a_rank(
    kind: Any, shape: dict[str, Any], sequence_parallel: bool
) -> None:
    model = gpt(2, **shape)
    plan = plan_for(model)
    shard = kind(model, Layout(tensor_parallel=2, sequence_parallel=sequence_parallel))
    assert mismatches([shard], plan, 2) == []
    for fork_name, name, parameter in named_parameters([shard]):
        whole = global_shape(parameter, fork_name, name, 2)
        split = [a != b for a, b in zip(whole, parameter.shape, strict=True)]
        assert sum(split) <= 1
    assert mismatches([shard], plan, 1) != []


def test_the_two_models_call_their_parameters_as_the_fork_does() -> None:
    model = gpt(1, untie_embeddings_and_output_weights=True)
    names = core_names(GPTModel(model))
    assert names["language_model.encoder.layers.1.self_attention.query_key_value.weight"] == (
        "decoder.layers.1.self_attention.linear_qkv.weight"
    )
    assert names["language_model.encoder.layers.0.post_attention_layernorm.bias"] == (
        "decoder.layers.0.pre_mlp_layernorm.bias"
    )
    assert names["language_model.output_layer.weight"] == "output_layer.weight"
    names = core_names(GPTModelPipe(model))
    # 0 casts, 1 embeds, then come the layers, the norm and the readout.
    assert names["1.position_embeddings.weight"] == "embedding.position_embeddings.weight"
    assert names["2.self_attention.dense.weight"] == "decoder.layers.0.self_attention.linear_proj.weight"
    assert names["3.mlp.dense_4h_to_h.bias"] == "decoder.layers.1.mlp.linear_fc2.bias"
    assert names["4.weight"] == "decoder.final_layernorm.weight"
    assert names["5.lm_head.weight"] == "output_layer.weight"


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_stages_have_the_names_of_the_whole_model(kind: Any, untied: bool) -> None:
    model = gpt(1, num_layers=4, untie_embeddings_and_output_weights=untied)
    stages = [set(core_names(kind(model, stages=2, stage=stage)).values()) for stage in (0, 1)]
    assert stages[0] | stages[1] == {entry.name for entry in plan_for(model).entries}
    assert "decoder.layers.1.mlp.linear_fc1.weight" in stages[0] - stages[1]
    assert "decoder.layers.2.mlp.linear_fc1.weight" in stages[1] - stages[0]
    # A tied embedding is on both, to embed and to read out.
    assert ("embedding.word_embeddings.weight" in stages[1]) == (not untied)


def test_wrappers_are_looked_through() -> None:
    model = gpt(1)
    wrapped = torch.nn.Module()
    wrapped.module = GPTModel(model)
    assert [name for _, name, _ in named_parameters([wrapped])] == [
        name for _, name, _ in named_parameters([GPTModel(model)])
    ]


def test_a_parameter_that_the_plan_does_not_know_is_named() -> None:
    model = gpt(1)
    built = GPTModelPipe(model)
    built.get_submodule("2").router = torch.nn.Linear(32, 4)
    problems = mismatches([built], plan_for(model), 1)
    assert len(problems) == 2
    assert problems[0].startswith("2.router.weight: the model has this parameter, the plan has not")


def test_zero_3_leaves_an_empty_parameter_that_knows_its_shape() -> None:
    taken_away = torch.nn.Parameter(torch.empty(0))
    taken_away.ds_shape = torch.Size([96, 32])  # type: ignore[attr-defined]
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert global_shape(taken_away, "", name, 2) == (192, 32)
