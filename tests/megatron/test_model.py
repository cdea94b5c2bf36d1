"""A plan on a live model: each multiplier acts where the rules say, the attention scale arrives, and loading leaves
weights alone.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout

from mup_megatron.recipe import Recipe
from mup_megatron.theory import folding

BASE = gpt(vocab_size=64)
WIDE = gpt(4, vocab_size=64, kv_channels=16, num_attention_heads=8)
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


class Captured(list[torch.Tensor]):
    """Copies of what a module was given or gave, call by call. (The loss is computed in the place of the logits.)"""

    def input_of(self, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda _module, args: self.append(args[0].detach().clone()))

    def output_of(self, module: torch.nn.Module) -> None:
        module.register_forward_hook(
            lambda _module, _args, out: self.append((out[0] if isinstance(out, tuple) else out).detach().clone())
        )


# ---- embedding -----------------------------------------------------------------------------------------------------


def _embedded(layout: Layout, multiplier: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters and what leaves the embedding's dropout in the first forward pass."""
    run = planned.prepare(
        planned.recipe(BASE, embedding_multiplier=multiplier),
        BASE,
        layout,
        same_weights=True,
        config_changes={"hidden_dropout": 0.5},
    )
    before, after = Captured(), Captured()
    embedding = run.chunks[0].module.embedding
    before.input_of(embedding.embedding_dropout)
    after.output_of(embedding)
    stock.train(run, 1)
    return before[0], after[0]


def _embedded_with_and_without(layout: Layout) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [_embedded(layout, multiplier) for multiplier in (1.0, 2.0)]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence_parallel=True)], ids=["TP1", "sequence parallel"])
def test_embedding_multiplier_is_on_token_plus_position_before_dropout(layout: Layout) -> None:
    for (plain, _), (doubled, dropped) in run_ranks(_embedded_with_and_without, layout.world_size, layout):
        assert plain.any()
        assert doubled.equal(2 * plain)
        assert (dropped == 0).any()
        assert dropped[dropped != 0].equal(2 * doubled[dropped != 0])


# ---- readout -------------------------------------------------------------------------------------------------------


def _readout(recipe: Recipe, layout: Layout, tied: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(normed hidden state, weight, logits) of the first forward pass, where the rank has a readout."""
    run = planned.prepare(
        recipe, recipe.base.model_copy(update={"untie_embeddings_and_output_weights": not tied}), layout
    )
    model = run.chunks[-1].module
    if not model.post_process:
        stock.train(run, 1)
        return None
    hidden, logits = Captured(), Captured()
    hidden.output_of(model.decoder.final_layernorm)
    logits.output_of(model.output_layer)
    # The first step's learning rate is 0: the weight is still the one that gave the logits.
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    stock.train(run, 1)
    return hidden[0], weight.detach(), logits[0]


@pytest.mark.parametrize(
    ("layout", "tied"),
    [(Layout(), True), (Layout(), False), (Layout(pp=2), True)],
    ids=["tied", "untied", "tied over two stages"],
)
def test_output_multiplier_is_on_the_readouts_input(layout: Layout, tied: bool) -> None:
    base = BASE.model_copy(update={"untie_embeddings_and_output_weights": not tied})
    recipe = planned.recipe(base, output_multiplier=0.3)
    of_last_stage = run_ranks(_readout, layout.world_size, recipe, layout, tied)[-1]
    assert of_last_stage is not None
    hidden, weight, logits = of_last_stage
    assert logits.equal(torch.matmul(0.3 * hidden, weight.t()))
    assert not logits.equal(0.3 * torch.matmul(hidden, weight.t())), "the two forms cannot be told apart here"


# ---- single tensors ------------------------------------------------------------------------------------------------


def _linear_layers(layout: Layout) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Output of each linear layer of the last block with a multiplier of 2, and what 2·W x + b should be."""
    recipe = planned.recipe(
        BASE, per_parameter=[{"match": f"*.1.{name}.weight", "multiplier": 2.0} for name in LINEARS]
    )
    run = planned.prepare(recipe, BASE, layout, same_weights=True)
    outputs = {}
    for name in LINEARS:
        module = run.chunks[0].module.decoder.layers[1].get_submodule(name)
        with torch.no_grad():
            module.bias.normal_(generator=torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(torch.distributed.get_rank())
        column = name in ("self_attention.linear_qkv", "mlp.linear_fc1")
        x = torch.randn(5, 2, module.weight.shape[1], generator=None if column else generator)
        if column:
            torch.distributed.broadcast(x, 0)
        found, own_bias = module(x)
        expected = torch.matmul(2 * x, module.weight.t())
        if not column:
            torch.distributed.all_reduce(expected)
        if own_bias is not None:
            found = found + own_bias
        outputs[name] = (found.detach(), (expected + module.bias).detach())
    return outputs


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=["TP1", "TP2"])
def test_a_tensors_own_multiplier_is_on_its_weight_and_not_its_bias(layout: Layout) -> None:
    for of_rank in run_ranks(_linear_layers, layout.world_size, layout):
        for name, (found, expected) in of_rank.items():
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6), name


def _recomputed() -> list[list[float]]:
    recipe = planned.recipe(
        BASE,
        embedding_multiplier=3.0,
        attention_multiplier=2.0,
        per_parameter=[{"match": "*.linear_fc1.weight", "multiplier": 2.0}],
    )
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return [
        stock.train(planned.prepare(recipe, WIDE, Layout(), config_changes=changes, same_weights=True), 4)
        for changes in ({}, full)
    ]


def test_multipliers_survive_recomputation() -> None:
    kept, recomputed = run_ranks(_recomputed, 1)[0]
    assert recomputed == kept


# ---- attention -----------------------------------------------------------------------------------------------------


def _attention_scales(configured_first: bool, by_layer: bool) -> tuple[dict[str, float], Any, list[float]]:
    from mup_megatron.megatron.model import apply_plan, configure, softmax_scales

    recipe = planned.recipe(BASE, attention_multiplier=4.0)
    sizes = planned.sizes_of(WIDE)
    stock.init_parallel(Layout())
    changes = {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True} if by_layer else {}
    config = stock.transformer_config(sizes, Layout(), **changes)
    if configured_first:
        configure(config, recipe.plan(WIDE))
    chunks = stock.build_chunks(sizes, Layout(), config)
    apply_plan(chunks, recipe.plan(WIDE))
    run = stock.finish(sizes, Layout(), planned.training_of(recipe), config, chunks)
    return softmax_scales(chunks[0]), config.softmax_scale, stock.train(run, 3)


def test_attention_scale_arrives_before_and_after_the_model_is_built() -> None:
    plan = planned.recipe(BASE, attention_multiplier=4.0).plan(WIDE)
    assert plan.softmax_scale == pytest.approx(4 * math.sqrt(8) / 16)
    losses = []
    for configured_first in (False, True):
        scales, of_config, run_losses = run_ranks(_attention_scales, 1, configured_first, False)[0]
        assert list(scales.values()) == [plan.softmax_scale] * 2
        assert of_config == plan.softmax_scale
        losses.append(run_losses)
    assert losses[0] == losses[1]


def test_attention_scale_is_kept_where_megatron_divides_it_by_the_layers_number() -> None:
    plain, by_layer = (run_ranks(_attention_scales, 1, False, by_layer)[0] for by_layer in (False, True))
    assert by_layer[0] == pytest.approx(plain[0], rel=1e-15)
    assert by_layer[2] == pytest.approx(plain[2], abs=1e-6)


# ---- weights -------------------------------------------------------------------------------------------------------


def _weights_without_initialization() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    from mup_megatron.megatron.model import applied_plan, apply_plan

    recipe = planned.recipe(BASE, embedding_multiplier=3.0)
    _, _, chunks = planned.built(WIDE, Layout(), config_changes={"init_method": torch.nn.init.ones_})
    before = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
    apply_plan(chunks, recipe.plan(WIDE), initialize=False)
    assert applied_plan(chunks[0]) == recipe.plan(WIDE)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in chunks[0].modules())
    return before, dict(chunks[0].named_parameters()), hooks


def test_weights_that_are_about_to_be_loaded_are_left_alone() -> None:
    """Then the std of the draw does not matter either; multipliers act all the same: token, position, readout."""
    before, after, hooks = run_ranks(_weights_without_initialization, 1)[0]
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert hooks == 3


def _explicit_and_folded() -> list[tuple[list[float], int]]:
    """Losses and number of hooks with multipliers in the forward pass, and with all of them inside the weights."""
    from mup_megatron.megatron.model import apply_plan
    from mup_megatron.megatron.optimizer import config_overrides

    recipe = planned.recipe(BASE, embedding_multiplier=3.0, output_multiplier=2.0, clip_grad=0.0)
    found = []
    # Embeddings are not folded: a tied readout would have to be divided by the same factor.
    explicit = recipe.plan(WIDE)
    for plan in (explicit, folding.fold(explicit, [folding.READOUT])):
        sizes, config, chunks = planned.built(WIDE, Layout(), same_weights=True)
        apply_plan(chunks, plan)
        hooks = sum(len(m._forward_pre_hooks) for m in chunks[0].modules())
        training = replace(planned.training_of(recipe), adam_eps=recipe.hyperparameters.adam_eps)
        run = stock.finish(
            sizes, Layout(), training, config, chunks, lambda c, o, plan=plan: config_overrides(c, plan, o)
        )
        found.append((stock.train(run, 5), hooks))
    return found


def test_a_folded_plan_trains_as_the_explicit_one() -> None:
    """To rounding; a tied readout's multiplier is then in the gain and bias of the last norm."""
    (explicit, hooked), (folded, unhooked) = run_ranks(_explicit_and_folded, 1)[0]
    assert (hooked, unhooked) == (1, 0)
    assert folded == pytest.approx(explicit, abs=1e-5)
    assert max(explicit) - min(explicit) > 1e-2
