"""A plan applied to a plain torch module: multipliers where they have a place, refusals where they have none."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.hf_plain_modules import MODULES, Transformer, inputs, mlp
from torch import nn

from mup_megatron.errors import InputError
from mup_megatron.modules import Initialize, applied_plan, apply_plan, module_base, plan_for_module
from mup_megatron.recipe import recipe
from mup_megatron.theory import Plan


def plan_of(make: Callable[[int], nn.Module], width: int, **content: Any) -> Plan:
    base = module_base(lambda: make(1), lambda: make(3)).model_dump(mode="json")
    own = recipe(
        {"base": base, "hyperparameters": {"lr": 0.01, **content.pop("hyperparameters", {})}, **content}, source="r"
    )
    return plan_for_module(lambda: make(width), own)


def _refused(make: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as raised:
        make()
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "  " not in message


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_multipliers_act_on_weights_and_not_on_biases(kind: str, training: bool) -> None:
    """In evaluation torch's transformer layers have a way around their own submodules."""
    make = MODULES[kind]
    embedding = {"embedding_multiplier": 3.0} if kind == "transformer" else {}
    plan = plan_of(make, 4, hyperparameters={"output_multiplier": 2.0, **embedding})
    model = make(4).double().train(training)
    apply_plan(model, plan)
    plain = make(4).double().train(training)
    plain.load_state_dict(model.state_dict())
    head = plan.readout
    assert head is not None
    with torch.no_grad():
        plain.get_parameter(head).mul_(plan[head].multiplier)
        if kind == "transformer":
            plain.tokens.weight.mul_(3.0)
        x = inputs(kind)
        x = x.double() if x.is_floating_point() else x
        torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["layers.0.linear1.weight", "layers.1.linear2.weight"])
def test_a_weights_own_multiplier_acts_in_training_and_evaluation(name: str) -> None:
    plan = plan_of(Transformer, 1, per_parameter=[{"match": name, "multiplier": 3.0}])
    model = Transformer(1).double()
    apply_plan(model, plan)
    plain = Transformer(1).double()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain.get_parameter(name).mul_(3.0)
        for training in (True, False):
            ours, theirs = (each.train(training)(inputs("transformer")) for each in (model, plain))
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj.weight", "positions"]
)
def test_a_multiplier_without_a_place_is_refused(name: str) -> None:
    plan = plan_of(Transformer, 2, per_parameter=[{"match": name, "multiplier": 3.0}])
    model = Transformer(2)
    before = copy.deepcopy(model.state_dict())
    _refused(lambda: apply_plan(model, plan), f"{name}: ", "no place for a multiplier", "per_parameter")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert applied_plan(model) is None


def test_torchs_attention_at_another_scale_is_refused() -> None:
    def growing_heads(width: int) -> nn.Module:
        return Transformer(width, heads=2)

    model = growing_heads(4)
    _refused(
        lambda: apply_plan(model, plan_of(growing_heads, 4)),
        "layers.0.self_attn: MultiheadAttention has no scale to set",
        "1/√head_dim",
    )
    tuned = plan_of(Transformer, 2, hyperparameters={"attention_multiplier": 2.0})
    _refused(lambda: apply_plan(Transformer(2), tuned), "MultiheadAttention has no scale to set")
    apply_plan(Transformer(2), plan_of(Transformer, 2))


def test_no_attention_at_all_and_a_tuned_scale() -> None:
    plan = plan_of(mlp, 2, hyperparameters={"attention_multiplier": 2.0})
    _refused(lambda: apply_plan(mlp(2), plan), "the model has no attention that says its scale")


class OwnAttention(nn.Module):
    """Somebody's own, that can be told its scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 3 * 8 * width)
        self.head_dim = 8 * width
        self.scaling = self.head_dim**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scaling)


def test_an_attention_of_ones_own_is_told_its_scale() -> None:
    plan = plan_of(OwnAttention, 4, hyperparameters={"attention_multiplier": 1.5})
    model = OwnAttention(4)
    apply_plan(model, plan)
    assert model.scaling == plan.softmax_scale == pytest.approx(1.5 * 8**0.5 / 32, rel=1e-12)


def test_heads_of_several_sizes_are_refused() -> None:
    def several(width: int) -> nn.Module:
        return nn.ModuleList([OwnAttention(width), OwnAttention(2 * width)])

    _refused(lambda: plan_of(several, 2), "heads of different sizes (16 in ", ", 8 in ", "choose another model")


def test_a_plan_is_applied_once() -> None:
    model = mlp(2)
    plan = plan_of(mlp, 2)
    apply_plan(model, plan)
    assert applied_plan(model) is plan
    _refused(lambda: apply_plan(model, plan), "applied to this model already")


def test_a_copy_has_the_plan_already() -> None:
    model = mlp(2)
    plan = plan_of(mlp, 2)
    apply_plan(model, plan)
    _refused(lambda: apply_plan(copy.deepcopy(model), plan, initialize=Initialize.KEEP), "that it is a copy of")


def test_a_row_for_padding_stays_empty_when_weights_are_drawn_anew() -> None:
    def padded(width: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(10, 8 * width, padding_idx=3), nn.Linear(8 * width, 2))

    model = padded(4)
    apply_plan(model, plan_of(padded, 4), initialize=Initialize.REDRAW)
    empty = (model[0].weight == 0).all(dim=1)
    assert empty.nonzero().flatten().tolist() == [3]


def test_weights_that_are_not_as_drawn() -> None:
    model = mlp(4)
    with torch.no_grad():
        model[4].weight.mul_(2.0)
    before = copy.deepcopy(model.state_dict())
    plan = plan_of(mlp, 4)
    _refused(lambda: apply_plan(model, plan), "4.weight has an RMS of", '"keep"', '"redraw"')
    apply_plan(model, plan, initialize=Initialize.KEEP)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_drawn_anew() -> None:
    model = mlp(16)
    plan = plan_of(mlp, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.manual_seed(0)
    apply_plan(model, plan, initialize=Initialize.REDRAW)
    for name, parameter in model.named_parameters():
        error = 5 / (2 * parameter.numel()) ** 0.5
        assert parameter.square().mean().sqrt().item() == pytest.approx(plan[name].init_std, rel=error), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_precision(dtype: torch.dtype) -> None:
    plan = plan_of(mlp, 16)
    model = mlp(16).to(dtype)
    apply_plan(model, plan)
    weight = model[4].weight.detach().double()
    assert weight.square().mean().sqrt().item() == pytest.approx(plan["4.weight"].init_std, rel=0.05)


def test_frozen_parameters_are_initialised_as_well() -> None:
    model = mlp(4)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = model[4].weight.clone()
    apply_plan(model, plan_of(mlp, 4))
    assert not torch.equal(model[4].weight, before)
    assert not model[4].weight.requires_grad
