"""Two sizes of each side and two depths, which count branches: layers of base and target need not be alike."""

from dataclasses import replace
from math import sqrt

import pytest
from support.shapes import HYPERPARAMETERS, gpt, recipe_for

from mup_megatron.architectures.registry import shapes_of
from mup_megatron.theory import Plan, Scaling, Side, Sizes, Stack, Tensor
from mup_megatron.theory.widths import Matrix, scaling

GPT, HYBRID = Stack(layers=2), Stack(layers=4, branches=1)
"""`*-*-`, as two layers of two branches, and as four of one."""
FC2 = "decoder.layers.0.mlp.linear_fc2.weight"


def test_a_ratio_is_of_sizes_that_grow() -> None:
    assert (Sizes(8, 32).ratio, Sizes(8, 32, grows=False).ratio) == (4.0, 1.0)
    still = Scaling(Sizes(8, 32), Sizes(8, 16), Sizes(2, 3)).without_width()
    assert (still.r_in, still.r_out, still.depth) == (1.0, 1.0, Sizes(2, 3))
    assert still.fan_in == Sizes(32, 32)


def test_each_tensor_has_both_sizes_of_both_its_sides() -> None:
    base, target = (Tensor(name="w", shape=(4, n), fan_in=Side(n, grows=True), fan_out=Side(4)) for n in (8, 24))
    found = scaling(base, target, Sizes(2, 6))
    fan_in, fan_out = Sizes(8, 24), Sizes(4, 4, grows=False)
    assert found == Scaling(fan_in, fan_out, Sizes(2, 6), matrices=(Matrix("", fan_out, fan_out, fan_in),))
    assert (found.r_in, found.r_out) == (3.0, 1.0)


def test_a_depth_is_the_number_of_residual_branches() -> None:
    assert (GPT.depth, HYBRID.depth, Stack(7, branches=1).depth, Stack(7).depth) == (4, 4, 7, 14)


def _plan(base: Stack, target: Stack) -> Plan:
    """A GPT's tensors with other stacks."""
    from mup_megatron import theory

    shapes = shapes_of(gpt(1), gpt(4))
    own = [replace(shape, stacks={"decoder": stack}) for shape, stack in zip(shapes, (base, target), strict=True)]
    tuned = {key: HYPERPARAMETERS[key] for key in theory.Tuned.__dataclass_fields__}
    return theory.build_plan(*own, theory.Tuned(**tuned), rules_used=theory.Rules())


def test_what_writes_into_the_stream_counts_the_targets_branches() -> None:
    sigma = HYPERPARAMETERS["init_method_std"] / 2
    deeper = Stack(7, branches=1)
    for base, target in ((GPT, GPT), (GPT, HYBRID), (HYBRID, GPT), (HYBRID, HYBRID), (GPT, deeper), (deeper, GPT)):
        plan = _plan(base, target)
        branches = 7 if target is deeper else 4
        assert plan[FC2].init_std == pytest.approx(sigma / sqrt(branches), rel=1e-15)
        assert plan.num_layers == target.layers
    assert recipe_for(gpt(1)).plan(gpt(4)).entries == _plan(GPT, GPT).entries
