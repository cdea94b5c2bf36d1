"""Which weight of a module is its readout, and that its multiplier is there; what may be one and cannot be told."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from mup_megatron.errors import InputError
from mup_megatron.live.hooks import ScaledInput
from mup_megatron.modules import apply_plan, module_base, plan_for_module
from mup_megatron.modules.applied import require_applied
from mup_megatron.recipe import Hyperparameters, Recipe
from mup_megatron.theory import Plan, Property

VOCABULARY = 12


class Tied(nn.Module):
    """A language model of two layers. Its head has the embedding's weight, as a layer or as a function."""

    def __init__(self, width: int, *, layer: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.hidden = nn.Linear(width, width)
        if layer:
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.hidden(self.embed(tokens)))
        return self.head(x) if hasattr(self, "head") else functional.linear(x, self.embed.weight)


class Listed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3)])


class Own(nn.Module):
    """A readout that is no layer."""

    def __init__(self, width: int, *, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.register_parameter(name, nn.Parameter(torch.randn(*shape, width)))


def planned(make: Callable[[int], nn.Module], *, readout: str | None = None, output: float = 1.0) -> Plan:
    base = module_base(lambda: make(16), lambda: make(32))
    recipe = Recipe(base=base, hyperparameters=Hyperparameters(lr=0.1, output_multiplier=output))
    return plan_for_module(lambda: make(64), recipe, readout=readout)


def scaled(layer: nn.Module) -> list[float]:
    return [hook.factor for hook in layer._forward_pre_hooks.values() if isinstance(hook, ScaledInput)]


@pytest.mark.parametrize("readout", [None, "embed.weight", "head.weight"])
def test_a_table_that_a_linear_layer_shares_is_the_readout_by_whichever_name(readout: str | None) -> None:
    plan = planned(Tied, readout=readout, output=3.0)
    assert (plan.readout, plan.tied, plan.output_multiplier) == ("embed.weight", True, 0.75)
    model = Tied(64)
    apply_plan(model, plan)
    assert scaled(model.head) == [0.75]
    require_applied(model, plan)


@pytest.mark.parametrize(
    ("readout", "message"),
    [("embd.weight", "the model has no such parameter"), ("hidden.weight", "no weight from a growing side to a fixed")],
)
def test_a_readout_that_is_none_is_refused(readout: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(Tied, readout=readout)


def test_a_tied_readout_that_is_no_layer_has_no_place_for_its_multiplier() -> None:
    def make(width: int) -> nn.Module:
        return Tied(width, layer=False)

    plan = planned(make, readout="embed.weight")
    with pytest.raises(InputError, match=r"embed\.weight: the readout is tied, and no layer .* computes it"):
        apply_plan(make(64), plan)


def test_a_readout_among_layers_has_the_output_multiplier_if_it_is_named() -> None:
    plan = planned(Listed, readout="layers.2.weight", output=3.0)
    assert (set(plan["layers.2.weight"].properties), plan["layers.2.weight"].multiplier) == ({Property.READOUT}, 0.75)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("scores", (10,)), ("direction", ()), ("weight", (1, 10))],
    ids=["matrix", "vector", "leading 1"],
)
def test_a_parameter_of_ones_own_that_may_be_a_readout_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"{name} .* cannot be known from the layer"):
        planned(lambda width: Own(width, name=name, shape=shape))


@pytest.mark.parametrize(("name", "shape"), [("pos_embed", (1, 10)), ("cls_token", (1, 1)), ("mask_token", ())])
def test_what_is_called_a_token_or_a_position_is_added(name: str, shape: tuple[int, ...]) -> None:
    assert planned(lambda width: Own(width, name=name, shape=shape))[name].width_ratio == 1.0


def test_bilinear_layers_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be known"):
        planned(lambda width: nn.Bilinear(4, width, 1))


def test_a_layer_that_was_replaced_after_the_plan_was_applied_is_noticed() -> None:
    plan = planned(Tied)
    model = Tied(64)
    apply_plan(model, plan)
    model.head = nn.Linear(64, VOCABULARY, bias=False)
    model.head.weight = model.embed.weight
    with pytest.raises(
        InputError, match=r"^head: multiplier should be 0\.25 on its input and is none\. The hook is gone"
    ):
        require_applied(model, plan)


def test_a_copy_of_a_model_with_a_plan_is_not_planned_twice() -> None:
    plan = planned(Tied)
    model = Tied(64)
    apply_plan(model, plan)
    with pytest.raises(InputError, match="a plan was applied to this model already"):
        apply_plan(copy.deepcopy(model), plan)
