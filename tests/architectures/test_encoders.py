"""BERT and T5: what is stated of them against the live models, what each tensor gets, and their cost."""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import encoder, gpt, recipe_for
from support.stock import Layout

from mup_megatron.architectures.cost import parameter_count, training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.proxy import Search, choose_proxy
from mup_megatron.architectures.registry import architecture_of, load_model_file, model_file, shapes_of
from mup_megatron.check.run_launch_line import check_launch_line
from mup_megatron.check.subjects.launch_line import LaunchLine
from mup_megatron.errors import InputError
from mup_megatron.theory import Acts, Plan, Role, Tensor

UNTIED = {"untie_embeddings_and_output_weights": True}
RELATIVE = {"position_embedding_type": "relative"}
MODELS: dict[str, ModelFile] = {
    "BERT": encoder("bert"),
    "BERT, untied, no binary head, padded": encoder("bert", bert_binary_head=False, vocab_size=49, **UNTIED),
    "BERT, gated, RMSNorm, no biases": encoder("bert", swiglu=True, normalization="RMSNorm", add_bias_linear=False),
    "T5": encoder("t5"),
    "T5 of two depths, own head size": encoder("t5", decoder_num_layers=3, kv_channels=6),
    "T5, untied, relative positions": encoder("t5", **UNTIED, **RELATIVE),
    "T5, gated, no biases, rotary": encoder(
        "t5", swiglu=True, add_bias_linear=False, position_embedding_type="rope", kv_channels=8
    ),
}
LAYOUTS = {"one process": Layout(), "TP2": Layout(tp=2), "PP2": Layout(pp=2)}
_OTHER_NAMES = {"position_embeddings.weight", "output_layer.weight", "output_layer.bias"}
"""A T5 has these modules twice, once under a name of their own."""

Shapes = dict[str, tuple[int, ...]]


def saved(models: dict[str, ModelFile], layout: Layout) -> dict[str, tuple[Shapes, Shapes]]:
    """In a rank: global name → global shape as each model would save it, and as the adapter reads it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from mup_megatron.megatron import names
    from mup_megatron.megatron.builders import build_chunk

    found = {}
    for case, model in models.items():
        stock.init_parallel(layout)
        config = stock.transformer_config(planned.sizes_of(model, layout.tp), layout)
        chunk = build_chunk(model, config, None)
        shapes: Shapes = {}
        for entry in nested_values(chunk.sharded_state_dict()):
            # The two halves of a gated layer are saved apart.
            parts = list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
            shapes |= {part.key: tuple(part.global_shape) for part in parts if isinstance(part, ShardedTensor)}
        read = {
            name: names.global_shape(name, parameter)
            for name, parameter in names.named_parameters([chunk], tied=model.tied)
        }
        found[case] = (shapes, read)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_are_those_of_the_live_model(layout: str) -> None:
    how = LAYOUTS[layout]
    models = {case: model for case, model in MODELS.items() if how.pp == 1 or architecture_of(model).pipelines}
    ranks = run_ranks(saved, how.world_size, models, how)
    for case, model in models.items():
        stored: Shapes = {}
        read: Shapes = {}
        for rank in ranks:
            stored |= rank[case][0]
            read |= rank[case][1]
        assert read == {tensor.name: tensor.shape for tensor in tensors_of(model, how.tp)}, case
        expected = as_saved(model, how.tp)
        assert {name: stored[name] for name in stored.keys() - (_OTHER_NAMES - expected.keys())} == expected, case


def tensors_of(model: ModelFile, tensor_parallel: int = 1, **changes: Any) -> tuple[Tensor, ...]:
    """With the vocabulary as it is padded there."""
    size = model.padded_vocab_size(tensor_parallel)
    own = model.model_copy(update={"vocab_size": size, "make_vocab_size_divisible_by": 1, **changes})
    return shapes_of(own, own)[1].tensors


def as_saved(model: ModelFile, tensor_parallel: int) -> Shapes:
    """Megatron stacks layers that are alike, and saves norms under the name of Transformer Engine's fused layers."""
    alike: dict[str, list[tuple[int, ...]]] = {}
    for tensor in tensors_of(model, tensor_parallel, transformer_impl="transformer_engine"):
        alike.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.", tensor.name), []).append(tensor.shape)
    return {name: (len(own), *own[0]) if ".layers." in name else own[0] for name, own in alike.items()}


# ---- what each gets ------------------------------------------------------------------------------------------------

VALUES = {"lr": 0.01, "min_lr": 0.001, "init_method_std": 0.05, "weight_decay": 0.1, "adam_eps": 1e-6}
MULTIPLIERS = {"embedding_multiplier": 5.0, "output_multiplier": 0.5}


def planned_at(architecture: str, width: float = 4, **changes: Any) -> Plan:
    """At so many times the base's width."""
    tuned = recipe_for(encoder(architecture, 1, **changes), **VALUES, **MULTIPLIERS)
    return tuned.plan(encoder(architecture, width, **changes))


def got(plan: Plan, name: str) -> tuple[Any, ...]:
    entry = plan[name]
    std = entry.init_value if entry.init_std is None else entry.init_std
    return (entry.role, std, entry.multiplier, entry.lr, entry.eps, entry.weight_decay)


BERTS = {
    "embedding.tokentype_embeddings.weight": (Role.INPUT, 0.05, 5.0, 0.01, 1e-6 / 4, 0.1),
    "lm_head.dense.weight": (Role.HIDDEN, 0.05 / 2, 1.0, 0.01 / 4, 1e-6 / 4, 0.4),
    "lm_head.dense.bias": (Role.INPUT, 0.0, 1.0, 0.01, 1e-6 / 4, 0.0),
    "pooler.dense.weight": (Role.HIDDEN, 0.05 / 2, 1.0, 0.01 / 4, 1e-6 / 4, 0.4),
    "binary_head.weight": (Role.OUTPUT, 0.05, 0.5 / 4, 0.01, 1e-6 / 4, 0.1),
    "binary_head.bias": (Role.SCALAR, 0.0, 1.0, 0.01, 1e-6, 0.0),
    "output_layer.bias": (Role.SCALAR, 0.0, 1.0, 0.01, 1e-6, 0.0),
    "encoder.layers.1.mlp.linear_fc2.weight": (Role.HIDDEN, 0.05 / 2 / 2, 1.0, 0.01 / 4, 1e-6 / 4, 0.4),
}
T5S = {
    "encoder_relative_pos_emb.relative_attention_bias.weight": (Role.INPUT, 0.05, 1.0, 0.01, 1e-6 / 4, 0.1),
    "decoder_relative_pos_emb.relative_attention_bias.weight": (Role.INPUT, 0.05, 1.0, 0.01, 1e-6 / 4, 0.1),
    "decoder.layers.0.cross_attention.linear_q.weight": (Role.HIDDEN, 0.05 / 2, 1.0, 0.01 / 4, 1e-6 / 4, 0.4),
    "decoder.layers.0.cross_attention.linear_kv.weight": (Role.HIDDEN, 0.05 / 2, 1.0, 0.01 / 4, 1e-6 / 4, 0.4),
    # Each stack's own number of layers, two branches each as the stock model counts them.
    "encoder.layers.0.mlp.linear_fc2.weight": (Role.HIDDEN, 0.05 / 2 / 2, 1.0, 0.01 / 4, 1e-6 / 4, 0.4),
    "decoder.layers.0.cross_attention.linear_proj.weight": (
        Role.HIDDEN,
        0.05 / 2 / math.sqrt(6),
        1.0,
        0.01 / 4,
        1e-6 / 4,
        0.4,
    ),
    "lm_head.output_layer.bias": (Role.SCALAR, 0.0, 1.0, 0.01, 1e-6, 0.0),
}


@pytest.mark.parametrize(
    ("plan", "expected"),
    [(planned_at("bert"), BERTS), (planned_at("t5", decoder_num_layers=3, **RELATIVE), T5S)],
    ids=["BERT", "T5"],
)
def test_every_tensor_gets_its_own_sides(plan: Plan, expected: dict[str, tuple[Any, ...]]) -> None:
    for name, values in expected.items():
        assert got(plan, name)[0] == values[0], name
        assert got(plan, name)[1:] == pytest.approx(values[1:]), name


def test_factors_act_on_both_heads_and_on_every_table() -> None:
    bert = {(site.module, site.acts): site.factor for site in planned_at("bert").sites if site.changes}
    tables = {f"embedding.{each}_embeddings" for each in ("word", "position", "tokentype")}
    assert {module for module, acts in bert if acts is Acts.OUTPUT} == tables
    assert bert["output_layer", Acts.INPUT] == bert["binary_head", Acts.INPUT] == 0.5 / 4
    t5 = {(site.module, site.acts): site.factor for site in planned_at("t5", **RELATIVE).sites}
    assert t5["lm_head.output_layer", Acts.INPUT] == 0.5 / 4
    assert t5["encoder_relative_pos_emb.relative_attention_bias", Acts.OUTPUT] == 1.0
    assert ("decoder.layers.1.cross_attention.core_attention", Acts.SCALE) in t5


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("bert", {"bert_binary_head": False}, "bert_binary_head is True in the recipe's base but False in the target"),
        ("t5", {**RELATIVE, "relative_attention_num_buckets": 8}, "position_embedding_type"),
    ],
)
def test_base_and_target_share_what_is_no_size(architecture: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        recipe_for(encoder(architecture)).plan(encoder(architecture, 2, **changes))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"architecture": "bert", "position_embedding_type": "rope"}, "Megatron's BERT has learned positions"),
        ({"architecture": "bert", "qk_layernorm": True}, "qk_layernorm: Megatron's BERT and T5 have no such layers"),
        ({"architecture": "bert", "decoder_num_layers": 2}, "architecture: bert has no decoder_num_layers"),
        ({"architecture": "t5", "encoder_num_layers": 3}, "num_layers 2 beside encoder_num_layers 3"),
        ({"architecture": "t5", "group_query_attention": True, "num_query_groups": 2}, "no grouped queries"),
        ({"architecture": "t5", "decoder_seq_length": 99}, "smaller than decoder_seq_length 99"),
        (
            {"architecture": "t5", "relative_attention_num_buckets": 8},
            "relative_attention_num_buckets: without position_embedding_type relative Megatron does not read it",
        ),
        ({"architecture": "t5", "rotary_base": 99}, "rotary_base: Megatron's T5 does not take it"),
        ({"position_embedding_type": "relative"}, "position_embedding_type"),
        ({"architecture": "bert", "num_experts": 4, "moe_router_topk": 2}, "num_experts: Megatron's BERT and T5"),
    ],
)
def test_what_megatron_would_not_build_is_refused(content: dict[str, Any], said: str) -> None:
    plain = {key: value for key, value in dict(gpt()).items() if value is not None}
    with pytest.raises(InputError, match=said):
        model_file({**plain, **content}, source="here")


def test_a_file_says_the_encoders_sizes_in_either_word() -> None:
    plain = {key: value for key, value in dict(gpt()).items() if value is not None}
    other = {key: value for key, value in plain.items() if key not in ("num_layers", "seq_length")}
    said = {"encoder_num_layers": 2, "decoder_num_layers": 2, "encoder_seq_length": 12}
    assert model_file({**other, **said}, source="here") == encoder("t5")
    assert model_file({**plain, "bert_binary_head": True}, source="here") == encoder("bert")


# ---- live, at the base ---------------------------------------------------------------------------------------------


def traces(model: ModelFile) -> list[dict[str, torch.Tensor]]:
    """In a rank: every parameter after three steps, without the plug-in and with it."""
    from mup_megatron.training.build import Built
    from mup_megatron.training.loop import train_iteration
    from mup_megatron.training.objectives import objective_of
    from mup_megatron.training.options import BatchSizes

    found = []
    for plug_in in (False, True):
        run = planned.prepare(planned.recipe(model), model, Layout(), plug_in=plug_in)
        assert not plug_in or not any(
            module._forward_hooks or module._forward_pre_hooks for module in run.chunks[0].module.modules()
        )
        built = Built(run.config, run.chunks, run.optimizer, run.scheduler, objective_of(model))
        for iteration in range(3):
            train_iteration(built, Sequences(model), iteration, BatchSizes(**SIZES), problem=False)
            run.scheduler.step(increment=1)
        found.append({name: p.detach().clone() for name, p in run.chunks[0].module.named_parameters()})
    return found


SIZES = {"global_batch": 4, "micro_batch": 2, "data_parallel": 1}


class Sequences:
    """Made-up samples, as the training loop asks for them."""

    def __init__(self, model: ModelFile) -> None:
        self.model, self.config = model, argparse.Namespace(sequence_length=model.seq_length)

    def __len__(self) -> int:
        return 99

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        row = torch.randint(self.model.vocab_size, (self.model.seq_length + 1,), generator=generator)
        mask, positions = torch.ones(len(row) - 1), torch.arange(len(row) - 1)
        return {"tokens": row[:-1], "labels": row[1:], "loss_mask": mask, "position_ids": positions}


def all_traces(models: list[ModelFile]) -> list[list[dict[str, torch.Tensor]]]:
    return [traces(model) for model in models]


def test_the_base_is_bitwise_stock() -> None:
    models = [encoder("bert"), encoder("bert", bert_binary_head=False, **UNTIED), encoder("t5", decoder_num_layers=3)]
    for without, with_plan in run_ranks(all_traces, 1, models)[0]:
        assert without.keys() == with_plan.keys()
        assert all(without[name].equal(with_plan[name]) for name in without)


# ---- cost and proxies ----------------------------------------------------------------------------------------------


def test_the_cost_is_that_of_all_parts() -> None:
    bert, t5 = encoder("bert", 4), encoder("t5", 4, decoder_num_layers=3, decoder_seq_length=4)
    for model in (bert, t5):
        assert parameter_count(model) == sum(math.prod(tensor.shape) for tensor in tensors_of(model))
    assert training_flops(bert).items["lm_head"] == 6.0 * 128**2
    # Of 16 tokens 12 are the encoder's; keys and values of cross-attention are counted for the decoder's.
    found = training_flops(t5).items
    assert found["readout"] == 6.0 * 128 * 48 / 4
    assert found["mlp"] == 6.0 * 2 * 128 * 256 * (2 * 12 + 3 * 4) / 16
    assert found["attention_scores"] == 12.0 * 128 * (2 * 12 * 12 + 3 * 4 * (4 + 12)) / 16


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_a_proxy_is_of_the_same_kind(architecture: str) -> None:
    target = encoder(architecture, 32, num_layers=12, **({"decoder_num_layers": 6} if architecture == "t5" else {}))
    proxy = choose_proxy(target, Search(trials=100, trial_tokens=1e9, target_tokens=1e11)).model
    assert type(proxy) is type(target)
    assert (proxy.hidden_size, proxy.head_size) == (256, 8)
    layers = {stack: len(own) for stack, own in architecture_of(proxy).stacks(proxy).items()}
    assert layers["encoder"] == proxy.num_layers
    assert architecture != "t5" or layers["decoder"] == round(proxy.num_layers / 2)
    recipe_for(proxy).plan(target)


def test_base_and_large_have_one_proxy() -> None:
    shipped = Path(__file__).parents[2] / "configs" / "models"
    proxy, base, large = (load_model_file(shipped / f"bert_{name}.yaml") for name in ("proxy", "base", "large"))
    tuned = recipe_for(proxy, **VALUES)
    for target, width in ((base, 768), (large, 1024)):
        plan = tuned.plan(target)
        fc2 = plan[f"encoder.layers.{target.num_layers - 1}.mlp.linear_fc2.weight"]
        # Its fan_in is an MLP's of 256 in the proxy, and of four widths in the target.
        assert fc2.width_ratio == 4 * width / 256
        assert fc2.init_std == pytest.approx(0.05 / math.sqrt(2 * target.num_layers * fc2.width_ratio))
        assert plan["binary_head.weight"].multiplier == pytest.approx(0.5 * 256 / width)
        # Heads of 64 in place of 32.
        assert plan.softmax_scale == pytest.approx(1.5 * math.sqrt(32) / 64)


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_a_check_refuses_its_launch_line_by_name(architecture: str) -> None:
    words = f"python -m mup_megatron.launch pretrain_{architecture}.py --num-layers 2 --hidden-size 64 --seq-length 16"
    line = [*words.split(), "--num-attention-heads", "4", "--max-position-embeddings", "16"]
    assert architecture_of(LaunchLine.of(line).model()).name == architecture
    own = {"bert": "a BERT", "t5": "a T5"}[architecture]
    with pytest.raises(InputError, match=f"the launch line trains {own}, .* Check its model file"):
        check_launch_line(line, recipe_for(encoder(architecture)))
