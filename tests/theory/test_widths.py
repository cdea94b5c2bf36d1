"""Two sizes of each side and two depths, and how a depth is counted where layers of base and target are not alike."""

from dataclasses import replace
from math import sqrt

import pytest
from support.shapes import HYPERPARAMETERS, gpt, recipe_for

from mup_megatron.architectures.registry import shapes_of
from mup_megatron.theory import Plan, Scaling, Side, Sizes, Stack, Tensor
from mup_megatron.theory.widths import layers_as_counted, scaling

GPT, HYBRID = Stack(layers=2), Stack(layers=4, branches=1)
"""`*-*-`, as two layers of two branches, and as four of one."""
FC2 = "decoder.layers.0.mlp.linear_fc2.weight"


def test_a_ratio_is_of_sizes_that_grow() -> None:
    assert (Sizes(8, 32).ratio, Sizes(8, 32, grows=False).ratio) == (4.0, 1.0)
    still = Scaling(Sizes(8, 32), Sizes(8, 16), Sizes(2, 3)).without_width()
    assert (still.r_in, still.r_out, still.layers) == (1.0, 1.0, Sizes(2, 3))
    assert still.fan_in == Sizes(32, 32)


def test_each_tensor_has_both_sizes_of_both_its_sides() -> None:
    base, target = (Tensor(name="w", shape=(4, n), fan_in=Side(n, grows=True), fan_out=Side(4)) for n in (8, 24))
    found = scaling(base, target, Sizes(2, 6))
    assert found == Scaling(Sizes(8, 24), Sizes(4, 4, grows=False), Sizes(2, 6))
    assert (found.r_in, found.r_out) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("base", "target", "layers"),
    [
        (GPT, Stack(6), Sizes(2, 6)),
        (HYBRID, Stack(12, branches=1), Sizes(4, 12)),
        (GPT, HYBRID, Sizes(2, 2)),
        (HYBRID, GPT, Sizes(4, 4)),
        (GPT, Stack(7, branches=1), Sizes(2, 3.5)),
        (HYBRID, Stack(3), Sizes(4, 6)),
    ],
)
def test_depth_is_counted_in_layers_of_the_bases_kind(base: Stack, target: Stack, layers: Sizes) -> None:
    assert layers_as_counted(base, target) == layers


def _plan(base: Stack, target: Stack) -> Plan:
    """A GPT's tensors with other stacks."""
    from mup_megatron import theory

    shapes = shapes_of(gpt(1), gpt(4))
    own = [replace(shape, stacks={"decoder": stack}) for shape, stack in zip(shapes, (base, target), strict=True)]
    tuned = {key: HYPERPARAMETERS[key] for key in theory.Tuned.__dataclass_fields__}
    return theory.build_plan(*own, theory.Tuned(**tuned), rules_used=theory.Rules())


def test_what_writes_into_the_stream_has_the_l_of_its_bases_counting() -> None:
    sigma = HYPERPARAMETERS["init_method_std"] / 2
    for base, target, layers in ((GPT, GPT, 2), (GPT, HYBRID, 2), (HYBRID, GPT, 4), (HYBRID, HYBRID, 4)):
        plan = _plan(base, target)
        assert plan.residual_layers == {"decoder": layers}
        assert plan[FC2].init_std == pytest.approx(sigma / sqrt(2 * layers), rel=1e-15)
        assert plan.num_layers == target.layers
    assert recipe_for(gpt(1)).plan(gpt(4)).entries == _plan(GPT, GPT).entries
