"""Experts in any torch module: as a list and in one tensor, and what is around them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mup_megatron.errors import InputError
from mup_megatron.modules import module_base, plan_for_module
from mup_megatron.recipe import Hyperparameters, Recipe
from mup_megatron.theory import Plan, Property, Role

EXPERTS = 3


class Listed(nn.Module):
    """Experts as modules, each with a feed-forward of a fixed size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, EXPERTS)
        self.gate = nn.Linear(width, 1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 8), nn.Linear(8, width)) for _ in range(EXPERTS))


class Fused(nn.Module):
    """Experts in one tensor, with a raw router."""

    def __init__(self, width: int, *, transposed: bool | None) -> None:
        super().__init__()
        self.router = nn.Module()
        self.router.weight = nn.Parameter(torch.randn(EXPERTS, width))
        self.experts = nn.Module()
        sides = (width, 2 * width) if transposed else (2 * width, width)
        self.experts.up = nn.Parameter(torch.randn(EXPERTS, *sides))
        self.experts.up_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * width))
        if transposed is not None:
            self.experts.is_transposed = transposed


class Model(nn.Module):
    def __init__(self, width: int, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, width)
        self.layers = nn.ModuleList([layer])
        self.head = nn.Linear(width, 12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.embed(tokens), self.head.weight)


def planned(make: type[nn.Module], **own: object) -> Plan:
    base = module_base(lambda: Model(16, make(16, **own)), lambda: Model(32, make(32, **own)))
    recipe = Recipe(base=base, hyperparameters=Hyperparameters(lr=0.1, weight_decay=0.01))
    return plan_for_module(lambda: Model(64, make(64, **own)), recipe)


def test_experts_in_a_list() -> None:
    found = planned(Listed)
    for index in range(EXPERTS):
        up, down = (found[f"layers.0.experts.{index}.{part}.weight"] for part in (0, 1))
        assert (up.role, up.lr, up.properties) == (Role.HIDDEN, 0.025, {Property.EXPERT})
        # Its own size stays, so it sums over as much as before.
        assert (down.role, down.lr, down.properties) == (Role.HIDDEN, 0.1, {Property.EXPERT})
    for name, router in (("router", {Property.ROUTER}), ("gate", set())):
        entry = found[f"layers.0.{name}.weight"]
        assert entry.properties == {Property.FOLDED} | router
        assert (entry.role, entry.lr, entry.multiplier, entry.weight_decay) == (Role.OUTPUT, 0.025, 1.0, 0.04)
    assert found["layers.0.router.bias"].role is Role.SCALAR
    assert (found["head.weight"].multiplier, found.readout) == (0.25, "head.weight")


@pytest.mark.parametrize("transposed", [True, False])
def test_experts_in_one_tensor_that_says_which_side_comes_first(transposed: bool) -> None:
    found = planned(Fused, transposed=transposed)
    up, bias = found["layers.0.experts.up"], found["layers.0.experts.up_bias"]
    assert (up.fan_in, up.fan_out, up.role, up.width_ratio) == (64, 128, Role.HIDDEN, 4.0)
    assert (bias.fan_out, bias.role, bias.is_vector, bias.weight_decay) == (128, Role.INPUT, True, 0.0)
    assert found["layers.0.router.weight"].properties == {Property.FOLDED, Property.ROUTER}


def test_experts_in_one_tensor_that_does_not_are_refused() -> None:
    with pytest.raises(InputError, match=r"layers\.0\.experts\.up \(3, 128, 64\): which side is fan_in"):
        planned(Fused, transposed=None)
