"""Parameter groups from a plan: who is in which, in which order, and what they say."""

import itertools
from typing import Any

import pytest
import torch
from support.hf_plain_modules import Transformer
from torch import nn

from mup_megatron.errors import InputError
from mup_megatron.modules import Form, module_base, param_groups, plan_for_module
from mup_megatron.modules.groups import PADDING
from mup_megatron.recipe import recipe
from mup_megatron.theory import Plan


def plan(width: int = 4, optimizer: str = "adam", **hyperparameters: Any) -> Plan:
    base = module_base(lambda: Transformer(1), lambda: Transformer(3)).model_dump(mode="json")
    own = {"lr": 0.01, "weight_decay": 0.1, "adam_eps": 1e-6} | hyperparameters
    content = {"base": base, "hyperparameters": own, "parametrization": {"optimizer": optimizer}}
    return plan_for_module(lambda: Transformer(width), recipe(content, source="r"))


def _names(model: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [[name_of[parameter] for parameter in group["params"]] for group in groups]


def test_every_parameter_is_in_one_group_with_its_values() -> None:
    model, own = Transformer(4), plan()
    groups = param_groups(model.named_parameters(), own)
    names = _names(model, groups)
    assert sorted(itertools.chain(*names)) == sorted(name for name, _ in model.named_parameters())
    for group, members in zip(groups, names, strict=True):
        assert group["name"] == f"mup {members[0]}"
        for name in members:
            entry = own[name]
            assert (group["lr"], group["weight_decay"], group["eps"]) == (entry.lr, entry.weight_decay, entry.eps)
    assert len({(g["lr"], g["weight_decay"], g["eps"]) for g in groups}) == len(groups)


def test_vectors_stand_apart_even_where_their_values_are_those_of_weights() -> None:
    model = Transformer(4)
    groups = param_groups(model.named_parameters(), plan(weight_decay=0.0))
    for group in groups:
        assert len({parameter.dim() > 1 for parameter in group["params"]}) == 1, group["name"]


def test_ratios_are_to_the_base() -> None:
    model = Transformer(4)
    absolute, ratio = (param_groups(model.named_parameters(), plan(), form=form) for form in Form)
    for one, other in zip(absolute, ratio, strict=True):
        assert one["params"] == other["params"]
        assert other.keys() == {"name", "params", "lr_mult", "wd_mult", "eps"}
        assert one["lr"] == pytest.approx(0.01 * other["lr_mult"])
        assert one["weight_decay"] == pytest.approx(0.1 * other["wd_mult"])
        assert one["eps"] == other["eps"]
    assert {group["lr_mult"] for group in ratio} == {1.0, 0.25}
    assert {group["wd_mult"] for group in ratio} == {0.0, 1.0, 4.0}


def test_sgd_has_no_eps() -> None:
    groups = param_groups(Transformer(4).named_parameters(), plan(optimizer="sgd"))
    assert all("eps" not in group for group in groups)
    torch.optim.SGD(groups)


def test_the_order_is_the_plans_whatever_a_rank_holds() -> None:
    model, own = Transformer(4), plan()
    whole = [group["name"] for group in param_groups(model.named_parameters(), own)]
    backwards = param_groups(reversed(list(model.named_parameters())), own)
    assert [group["name"] for group in backwards] == whole
    held = [(name, parameter) for name, parameter in model.named_parameters() if name.startswith("layers.1")]
    some = [group["name"] for group in param_groups(held, own)]
    assert some == [name for name in whole if name in some]
    assert len(some) < len(whole)


def test_a_stage_that_lacks_groups_is_padded() -> None:
    model, own = Transformer(4), plan()
    whole = [group["name"] for group in param_groups(model.named_parameters(), own)]
    stage = nn.ModuleDict({"layers": nn.ModuleList([model.layers[0]])})
    held = list(stage.named_parameters())
    groups = param_groups(held, own, pad_on=stage)
    assert [group["name"] for group in groups] == whole
    padding = [parameter for name, parameter in stage.named_parameters() if name.startswith(PADDING)]
    assert padding
    assert {tuple(parameter.shape) for parameter in padding} == {(1,)}
    assert sum(len(group["params"]) for group in groups) == len(held) + len(padding)
    # Made again from the stage's own names, it leaves out what it added.
    again = param_groups(stage.named_parameters(), own)
    assert sum(len(group["params"]) for group in again) == len(held)


def test_frozen_parameters_are_left_out() -> None:
    model = Transformer(4)
    model.tokens.weight.requires_grad_(False)
    groups = param_groups(model.named_parameters(), plan())
    assert "tokens.weight" not in itertools.chain(*_names(model, groups))


def test_a_parameter_without_an_entry_is_named() -> None:
    model = Transformer(4, depth=3)
    with pytest.raises(InputError, match=r"^layers\.2\.\S+: the plan has no such parameter"):
        param_groups(model.named_parameters(), plan())
