"""An optimizer may leave some tensors to another: then each tensor's entry says which one steps it, and each is looked
at in its own. What cannot train with two of them says so.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import planned, small_nets
from support.processes import run_ranks
from support.shapes import gpt
from support.shapes import recipe_for as megatron_recipe
from support.stock import Layout
from torch import nn, optim

from mup_megatron.check.measure.optimizers import CHECKED_OPTIMIZERS, CheckedOptimizer, replay_for
from mup_megatron.deepspeed.entry import optimizer_params
from mup_megatron.deepspeed.optimizers import DEEPSPEED_OPTIMIZERS, DeepSpeedOptimizer
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.convert import flags
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS
from mup_megatron.modules import apply_plan, check_optimizer, module_base, param_groups, plan_for_module
from mup_megatron.modules.groups import members
from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS
from mup_megatron.recipe import Recipe, recipe
from mup_megatron.theory import ADAM, SGD, Optimizer, Plan, PlanEntry, Role, Tensor, optimizers
from mup_megatron.theory.optimizers import register

VALUES = {"lr": 0.01, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-3, "sgd_momentum": 0.7, "weight_decay": 0.1}
TABLES: tuple[dict[str, Any], ...] = (
    TORCH_OPTIMIZERS,
    MEGATRON_OPTIMIZERS,
    DEEPSPEED_OPTIMIZERS,
    CHECKED_OPTIMIZERS,
    optimizers(),  # type: ignore[assignment]
)


def by_role(tensor: Tensor) -> Optimizer:
    """Hidden weights keep their own; everything else is SGD's."""
    return optimizers()["split"] if tensor.role is Role.HIDDEN else SGD


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    make_known()
    yield
    for table in TABLES:
        del table["split"]


def make_known() -> None:
    """Adam for hidden weights, which leaves the rest to SGD, in every adapter's table."""
    keys = (*ADAM.hyperparameters, "sgd_momentum")
    register(replace(ADAM, name="split", title="Split", hyperparameters=keys[:2], others=(SGD,), routes=by_role))
    TORCH_OPTIMIZERS.register("split", replace(TORCH_OPTIMIZERS["adam"], fitting="torch.optim.AdamW"))
    MEGATRON_OPTIMIZERS.register("split", MEGATRON_OPTIMIZERS["adam"])
    DEEPSPEED_OPTIMIZERS.register("split", DeepSpeedOptimizer(type="Split"))
    CHECKED_OPTIMIZERS.register("split", CheckedOptimizer(replay=CHECKED_OPTIMIZERS["adam"].replay))


def net(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def own_recipe(**values: float) -> Recipe:
    base = module_base(lambda: net(16), lambda: net(32))
    content = {"base": base, "hyperparameters": VALUES | values, "parametrization": {"optimizer": "split"}}
    return recipe(content, source="here")


def own_plan(**values: float) -> Plan:
    return plan_for_module(net, own_recipe(**values))


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_each_entry_has_the_rules_of_the_one_that_steps_it() -> None:
    plan = own_plan()
    assert {entry.name: entry.optimizer for entry in plan.entries} == {
        "0.weight": "sgd",
        "0.bias": "sgd",
        "2.weight": "split",
        "2.bias": "sgd",
        "4.weight": "sgd",
        "4.bias": "sgd",
    }
    assert plan.optimizers == ("sgd", "split")
    assert (plan["0.weight"].lr, plan["0.weight"].eps) == (0.01 * 4, None)
    assert (plan["2.weight"].lr, plan["2.weight"].eps) == (0.01 / 4, 1e-3 / 4)


def test_a_recipe_says_what_both_read() -> None:
    own = own_recipe()
    assert own.optimizers == ("split", "sgd")
    assert own.optimizer_values == {"adam_beta1": 0.8, "adam_beta2": 0.95, "sgd_momentum": 0.7}


def test_one_that_it_leaves_tensors_to_has_to_be_among_its_others() -> None:
    optimizers()["split"] = replace(optimizers()["split"], others=())  # type: ignore[index]
    with pytest.raises(InputError, match=r"split: it leaves 0.weight to sgd\. Add that to its `others`"):
        own_plan()


# ---- torch ---------------------------------------------------------------------------------------------------------


def made(model: nn.Module, plan: Plan) -> list[optim.Optimizer]:
    """One of each, with the recipe's settings."""
    groups = param_groups(model.named_parameters(), plan)
    h = own_recipe().hyperparameters
    return [
        TORCH_OPTIMIZERS[name].made([group for group in groups if group["optimizer"] == name], h)
        for name in plan.optimizers
    ]


def applied() -> tuple[nn.Module, Plan]:
    model, plan = net(), own_plan()
    apply_plan(model, plan)
    return model, plan


def test_groups_are_of_one_optimizer_also_where_their_values_are_alike() -> None:
    plan = own_plan()
    alike = [replace(entry, lr=0.01, weight_decay=0.1, eps=None) for entry in plan.entries]
    of_group = members(replace(plan, entries=tuple(alike)))
    kinds = {
        group: {(plan[name].optimizer, plan[name].is_vector) for name in names} for group, names in of_group.items()
    }
    assert sorted(map(sorted, kinds.values())) == [[("sgd", False)], [("sgd", True)], [("split", False)]]


def test_one_optimizer_of_each_is_right_and_steps_as_its_own_rule_says() -> None:
    model, plan = applied()
    both = made(model, plan)
    assert [type(each) for each in both] == [optim.SGD, optim.AdamW]
    check_optimizer(both, plan, model)
    check_optimizer(both, plan)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    nn.functional.mse_loss(model(torch.ones(4, 8)), torch.ones(4, 4)).backward()
    for each in both:
        each.step()
    for name, p in model.named_parameters():
        assert p.grad is not None
        entry = plan[name]
        torch.testing.assert_close(p.detach(), _stepped(before[name], p.grad, entry), rtol=1e-5, atol=1e-7)
    check_optimizer(both, plan, model)


def _stepped(w: torch.Tensor, g: torch.Tensor, entry: PlanEntry) -> torch.Tensor:
    if entry.eps is None:
        return w - entry.lr * (g + entry.weight_decay * w)
    return w * (1 - entry.lr * entry.weight_decay) - entry.lr * g / (g.abs() + entry.eps)


Make = Callable[[nn.Module, Plan], Any]


def one_for_all(model: nn.Module, plan: Plan) -> optim.Optimizer:
    return optim.AdamW(param_groups(model.named_parameters(), plan), betas=(0.8, 0.95))


def swapped(model: nn.Module, plan: Plan) -> list[optim.Optimizer]:
    of = {group["name"]: group for group in param_groups(model.named_parameters(), plan)}
    hidden = [group for group in of.values() if group["optimizer"] == "split"]
    rest = [group for group in of.values() if group["optimizer"] == "sgd"]
    return [optim.SGD(hidden, lr=0.01), optim.AdamW(rest)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (one_for_all, r"AdamW: it has parameters of sgd and of split, and the plan steps them by one of each\. Make"),
        (lambda *given: [one_for_all(*given)], "AdamW: it has parameters of sgd and of split"),
        (swapped, r"SGD: its step is not AdamW's, and the plan is for split.*Use torch\.optim\.AdamW"),
        (lambda *given: made(*given)[1], "0.weight and 4 more: the optimizer does not have it"),
        (lambda *given: made(*given)[:1] * 2, "the optimizer has a parameter twice"),
    ],
    ids=["one for all", "a list of one for all", "swapped", "one alone", "one twice"],
)
def test_what_is_not_one_of_each_is_refused(make: Make, said: str) -> None:
    model, plan = applied()
    with pytest.raises(InputError, match=rf"\A{said}"):
        check_optimizer(make(model, plan), plan, model)


@pytest.mark.parametrize(
    ("one", "key", "value", "said"),
    [
        (0, "momentum", 0.9, r"4\.bias: momentum should be 0\.7 and is 0\.9\."),
        (1, "betas", (0.8, 0.9), r"2\.weight: betas\[1\] should be 0\.95 and is 0\.9\."),
    ],
)
def test_each_has_its_own_of_the_recipes_values(one: int, key: str, value: Any, said: str) -> None:
    model, plan = applied()
    both = made(model, plan)
    both[one].param_groups[-1][key] = value
    with pytest.raises(InputError, match=rf"\A{said}"):
        check_optimizer(both, plan, model)


# ---- Megatron ------------------------------------------------------------------------------------------------------


def _live() -> dict[str, Any]:
    """What the guard says of a run of one optimizer, where the plan leaves the embeddings to SGD; and what Megatron's
    optimizer is to be told of a plan of two."""
    from megatron.core.optimizer import OptimizerConfig

    from mup_megatron.megatron.guard import optimizer_problems
    from mup_megatron.megatron.optimizer import overrides_by_name, require_base_values

    make_known()
    own = planned.recipe(gpt(vocab_size=64), per_parameter=[{"match": "embedding.*", "lr_mult": 2.0}])
    target = gpt(4, vocab_size=64)
    run = planned.prepare(own, target, Layout())
    plan = own.plan(target)
    split = replace(plan, entries=tuple(replace(e, optimizer="sgd") if e.is_embedding else e for e in plan.entries))

    def said(plan: Plan) -> list[str]:
        return sorted({str(each) for each in optimizer_problems(run.chunks, plan, run.optimizer)})

    found: dict[str, Any] = {"one": said(plan), "not split": said(split)}
    two = megatron_recipe(gpt(), optimizer="split").plan(gpt(4))
    found["overrides"] = overrides_by_name(two), overrides_by_name(plan)
    try:
        require_base_values(OptimizerConfig(optimizer="split"), two)
    except InputError as error:
        found["refused"] = str(error)
    embeddings = {
        id(p.main_param if hasattr(p, "main_param") else p) for p in run.chunks[0].module.embedding.parameters()
    }
    for group in run.optimizer.param_groups:
        if {id(p) for p in group["params"]} & embeddings:
            group.update(optimizer="sgd", betas=(0.1, 0.2))
    return found | {"split": said(split), "one after all": said(plan)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    (of_rank,) = run_ranks(_live, 1)
    return of_rank


def test_the_guard_looks_at_each_in_its_own_optimizer(found: dict[str, Any]) -> None:
    assert (found["one"], found["split"]) == ([], [])
    assert len(found["not split"]) == 2
    assert all("optimizer" in each and "sgd" in each and "adam" in each for each in found["not split"])
    assert any("betas" in each for each in found["one after all"])
    assert any("should be adam" in each for each in found["one after all"])


def test_megatrons_overrides_say_which_optimizer_steps_what(found: dict[str, Any]) -> None:
    plan = megatron_recipe(gpt(), optimizer="split").plan(gpt(4))
    overrides, of_one = found["overrides"]
    assert {name for name, each in overrides.items() if each.get("optimizer") == "sgd"} == {
        entry.name for entry in plan.entries if entry.role is not Role.HIDDEN
    }
    assert not any("optimizer" in each for each in of_one.values())


# ---- who has one optimizer a run -----------------------------------------------------------------------------------


def told(framework: str) -> str:
    return (
        rf"the recipe's steps some tensors by \w+ and some by \w+, and for {framework} a run has one optimizer\. Take"
    )


@pytest.mark.parametrize(
    ("asked", "framework"),
    [
        (lambda: flags(gpt(), megatron_recipe(gpt(), optimizer="split")), "Megatron"),
        (lambda: optimizer_params("Split", {}, own_recipe()), "DeepSpeed"),
        (lambda: replay_for(small_nets.recipe_for(optimizer="split")), "a check"),
    ],
    ids=["args", "DeepSpeed's", "check"],
)
def test_where_a_run_has_one_optimizer_it_says_so(asked: Callable[[], object], framework: str) -> None:
    with pytest.raises(InputError, match=told(framework)) as error:
        asked()
    assert len(str(error.value)) <= 300


def test_megatrons_optimizer_says_so_before_it_is_built(found: dict[str, Any]) -> None:
    assert re.search(told("Megatron"), found["refused"])
