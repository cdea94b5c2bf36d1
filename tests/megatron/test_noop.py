"""At the base, with every multiplier 1, the plug-in changes nothing: bitwise stock Megatron-Core."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import LATENT, gpt
from support.stock import Layout

STEPS = 4

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"swiglu": True, "add_bias_linear": False},
    "grouped queries": {"group_query_attention": True, "num_query_groups": 2, "add_qkv_bias": True},
    "untied": {"untie_embeddings_and_output_weights": True},
    "experts": {
        "num_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "moe_shared_expert_gate": True,
        "moe_aux_loss_coeff": 0.01,
        "moe_layer_freq": [0, 1],
        "add_bias_linear": False,
    },
    "q/k norm, RMSNorm, rotary": {"qk_layernorm": True, "normalization": "RMSNorm", "position_embedding_type": "rope"},
    "latent attention, multi-token prediction": {
        **LATENT,
        "qk_layernorm": True,
        "rotary_scaling_factor": 40.0,
        "mscale_all_dim": 1.0,
        "mtp_num_layers": 1,
    },
}


@dataclass(frozen=True)
class Trace:
    """Everything that a run leaves behind, and what the plug-in could have left in the model."""

    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, torch.Tensor]
    groups: list[dict[str, Any]]
    """The optimizer's, in order, each with its number of tensors in the place of the tensors."""
    state: list[dict[str, torch.Tensor]]
    """The optimizer's, in the order of the groups' tensors."""
    softmax_scale: float | None
    hooks: int


def _trace(run: stock.Run) -> Trace:
    losses = stock.train(run, STEPS)
    modules = [module for chunk in run.chunks for module in chunk.module.modules()]
    parameters = {f"{i}.{n}": p.detach() for i, c in enumerate(run.chunks) for n, p in c.module.named_parameters()}
    inner = run.optimizer.optimizer
    return Trace(
        losses=losses,
        grad_norms=run.grad_norms,
        parameters=parameters,
        groups=[{**group, "params": len(group["params"])} for group in inner.param_groups],
        state=[inner.state[p] for group in inner.param_groups for p in group["params"]],
        softmax_scale=run.config.softmax_scale,
        hooks=sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
    )


def _stock_and_planned(shape: dict[str, Any], layout: Layout) -> tuple[Trace, Trace]:
    base = gpt(**shape)
    tuned = planned.recipe(base)
    without, with_plan = (planned.prepare(tuned, base, layout, plug_in=on) for on in (False, True))
    return _trace(without), _trace(with_plan)


def _require_bitwise_equal(a: Trace, b: Trace) -> None:
    assert a.losses == b.losses
    assert a.grad_norms == b.grad_norms
    assert a.groups == b.groups
    assert a.parameters.keys() == b.parameters.keys()
    for name, tensor in a.parameters.items():
        assert tensor.equal(b.parameters[name]), name
    assert len(a.state) == len(b.state) > 0
    for one, other in zip(a.state, b.state, strict=True):
        assert {"exp_avg", "exp_avg_sq"} <= one.keys() == other.keys()
        for key in ("exp_avg", "exp_avg_sq"):
            assert one[key].equal(other[key])


def _all_shapes() -> dict[str, tuple[Trace, Trace]]:
    return {name: _stock_and_planned(shape, Layout()) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def traces() -> dict[str, tuple[Trace, Trace]]:
    """(stock, planned) of each shape."""
    return run_ranks(_all_shapes, 1)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_base_is_bitwise_stock(traces: dict[str, tuple[Trace, Trace]], shape: str) -> None:
    without, with_plan = traces[shape]
    _require_bitwise_equal(without, with_plan)


@pytest.mark.parametrize("shape", SHAPES)
def test_run_clips_and_decays(traces: dict[str, tuple[Trace, Trace]], shape: str) -> None:
    """Without this the equality would say nothing about clipping, weight decay and the schedule."""
    trace = traces[shape][1]
    assert max(trace.grad_norms) > 1.0
    assert {group["weight_decay"] for group in trace.groups} == {0.0, 0.1}
    assert all(group["lr"] > 0 for group in trace.groups)
    assert len(set(trace.losses)) > 1


@pytest.mark.parametrize("shape", SHAPES)
def test_base_leaves_no_trace(traces: dict[str, tuple[Trace, Trace]], shape: str) -> None:
    without, with_plan = traces[shape]
    assert with_plan.softmax_scale is None
    assert with_plan.hooks == without.hooks


def _sharded() -> tuple[Trace, Trace]:
    return _stock_and_planned(
        {"group_query_attention": True, "num_query_groups": 2, "vocab_size": 64},
        Layout(tp=2, sequence_parallel=True, distributed_optimizer=True),
    )


def test_base_is_bitwise_stock_on_two_ranks() -> None:
    for without, with_plan in run_ranks(_sharded, 2):
        _require_bitwise_equal(without, with_plan)


def _overrides_at_base() -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    from mup_megatron.megatron.optimizer import config_overrides

    base = gpt()
    tuned = planned.recipe(base)
    _, _, chunks = planned.built(base, Layout())
    training = planned.training_of(tuned)
    config = OptimizerConfig(
        optimizer="adam", lr=training.lr, min_lr=training.min_lr, weight_decay=0.1, **tuned.optimizer_values
    )
    ours = config_overrides(chunks, tuned.plan(base), config)
    return list(ours.values()), [dict(o) for o in get_standard_config_overrides(config).values()]


def test_only_megatrons_own_override_is_emitted_at_the_base() -> None:
    ours, standard = run_ranks(_overrides_at_base, 1)[0]
    assert ours == standard == [{"wd_mult": 0.0}]


ONE_MULTIPLIER: dict[str, dict[str, Any]] = {
    "embedding_multiplier": {"embedding_multiplier": 2.0},
    "output_multiplier": {"output_multiplier": 2.0},
    "attention_multiplier": {"attention_multiplier": 2.0},
    "lr_mult": {"per_parameter": [{"match": "*.linear_fc1.weight", "lr_mult": 2.0}]},
    "lr_mult of a vector": {"per_parameter": [{"match": "*.linear_fc1.bias", "lr_mult": 2.0}]},
    "init_mult": {"per_parameter": [{"match": "*.linear_fc1.weight", "init_mult": 2.0}]},
    "multiplier": {"per_parameter": [{"match": "*.linear_fc1.weight", "multiplier": 2.0}]},
    "multiplier of one embedding": {"per_parameter": [{"match": "embedding.position*", "multiplier": 2.0}]},
}


def _losses_with_one_multiplier() -> tuple[list[float], dict[str, list[float]]]:
    base = gpt()
    runs = {name: planned.recipe(base, **changes) for name, changes in {"none": {}, **ONE_MULTIPLIER}.items()}
    losses = {name: stock.train(planned.prepare(tuned, base, Layout()), STEPS) for name, tuned in runs.items()}
    return losses.pop("none"), losses


@pytest.fixture(scope="module")
def multiplied() -> tuple[list[float], dict[str, list[float]]]:
    return run_ranks(_losses_with_one_multiplier, 1)[0]


@pytest.mark.parametrize("name", ONE_MULTIPLIER)
def test_any_one_multiplier_changes_the_loss(multiplied: tuple[list[float], dict[str, list[float]]], name: str) -> None:
    unchanged, losses = multiplied
    assert losses[name][-1] != unchanged[-1]
