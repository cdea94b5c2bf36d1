"""Optimizers that are not the plan's, and groups that were changed. A right one of anybody's is accepted."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support.ds_ranks import run_ranks
from torch import nn, optim
from transformers.optimization import Adafactor

from mup_megatron.errors import InputError
from mup_megatron.modules import apply_plan, check_optimizer, module_base, param_groups, plan_for_module
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

Make = Callable[[Iterable[Any]], Any]


def net(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def plan(optimizer: str = "adam", **values: Any) -> Plan:
    base = module_base(lambda: net(16), lambda: net(32))
    content = {"base": base, "hyperparameters": {"lr": 0.01, "weight_decay": 0.1, **values}}
    return plan_for_module(net, Recipe.model_validate(content | {"parametrization": {"optimizer": optimizer}}))


class OwnAdamW(optim.Optimizer):
    """AdamW as a library might have it, with a setting outside its groups."""

    def __init__(self, params: Iterable[Any], eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": eps, "weight_decay": 0.0})
        self.power = 0.5

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            one, two = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if p.grad is None:
                    continue
                state["t"] = state.get("t", 0) + 1
                state["m"] = one * state.get("m", 0.0) + (1 - one) * p.grad
                state["v"] = two * state.get("v", 0.0) + (1 - two) * p.grad**2
                root = (state["v"] / (1 - two ** state["t"])) ** self.power
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * state["m"] / (1 - one ** state["t"]) / (root + group["eps"]))


class Lion(OwnAdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


class Independent(OwnAdamW):
    """With a weight decay that is not multiplied by the learning rate, at all or by its peak."""

    def __init__(self, params: Iterable[Any], follows: bool = False) -> None:
        super().__init__(params)
        self.follows = follows
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            own = group["weight_decay"] / (group["initial_lr"] if self.follows else group["lr"])
            kept, group["weight_decay"] = group["weight_decay"], own
            OwnAdamW.step(self)
            group["weight_decay"] = kept


class Wrapped:
    """As Accelerate's: it has the optimizer, and shows its groups."""

    def __init__(self, params: Iterable[Any]) -> None:
        self.optimizer = optim.AdamW(params)
        self.param_groups = self.optimizer.param_groups


class FusedAdam(optim.Adam):
    """By its name a kernel's, which is told what it does by a switch."""

    def __init__(self, params: Iterable[Any], adam_w_mode: bool = True) -> None:
        super().__init__(params)
        self.adam_w_mode = adam_w_mode

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("needs a GPU")


class Unseen(optim.Optimizer):
    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("needs a GPU")


RIGHT: dict[str, tuple[str, Make]] = {
    "AdamW": ("adam", optim.AdamW),
    "differentiable": ("adam", lambda g: optim.AdamW(g, differentiable=True)),
    "amsgrad": ("adam", lambda g: optim.AdamW(g, amsgrad=True)),
    "fused": ("adam", lambda g: optim.AdamW(g, fused=True)),
    "foreach": ("adam", lambda g: optim.AdamW(g, foreach=True)),
    "decoupled Adam": ("adam", lambda g: optim.Adam(g, decoupled_weight_decay=True)),
    "somebody's AdamW": ("adam", OwnAdamW),
    "a wrapper": ("adam", Wrapped),
    "a kernel": ("adam", FusedAdam),
    "unseen": ("adam", Unseen),
    "SGD": ("sgd", lambda g: optim.SGD(g, momentum=0.9)),
    "Nesterov": ("sgd", lambda g: optim.SGD(g, momentum=0.9, nesterov=True)),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_right_optimizers_are_accepted(kind: str) -> None:
    name, make = RIGHT[kind]
    own, model = plan(name), net()
    optimizer = make(param_groups(model.named_parameters(), own))
    check_optimizer(optimizer, own)
    check_optimizer(optimizer, own, model)


WRONG: dict[str, tuple[str, Make, str]] = {
    "Adam": ("adam", optim.Adam, "weight decay into the gradient"),
    "SGD": ("adam", lambda g: optim.SGD(g, momentum=0.9), "its step is not AdamW's"),
    "RMSprop": ("adam", optim.RMSprop, "its step is not AdamW's"),
    "NAdam": ("adam", optim.NAdam, "its step is not AdamW's"),
    "RAdam": ("adam", optim.RAdam, "its step is not AdamW's"),
    "Adagrad": ("adam", optim.Adagrad, "its step is not AdamW's"),
    "Adafactor": ("adam", optim.Adafactor, "cannot use the plan's groups"),
    "transformers' Adafactor": ("adam", Adafactor, "cannot use the plan's groups"),
    "Lion": ("adam", Lion, "its step is not AdamW's"),
    "independent decay": ("adam", Independent, "weight decay is not multiplied by the learning rate"),
    "decay by the schedule": (
        "adam",
        lambda g: Independent(g, follows=True),
        "weight decay is not multiplied by the learning rate",
    ),
    "a kernel of Adam": ("adam", lambda g: FusedAdam(g, adam_w_mode=False), "weight decay into the gradient"),
    "AdamW for SGD": ("sgd", optim.AdamW, "its step is not SGD's"),
    "a kernel for SGD": ("sgd", FusedAdam, "another optimizer"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_another_optimizer_is_named_with_those_that_fit(kind: str) -> None:
    name, make, words = WRONG[kind]
    own = plan(name)
    optimizer = make(param_groups(net().named_parameters(), own))
    with pytest.raises(InputError) as raised:
        check_optimizer(optimizer, own)
    message = str(raised.value)
    assert message.startswith(f"{type(optimizer).__name__}: ")
    assert words in message
    assert ("torch.optim.AdamW" if name == "adam" else "torch.optim.SGD") in message
    assert len(message) <= 300


def test_muon_has_no_place_for_biases_and_is_another_optimizer() -> None:
    own, model = plan(), net()
    groups = param_groups(model.named_parameters(), own)
    matrices = [group | {"params": [p for p in group["params"] if p.ndim == 2]} for group in groups]
    optimizer = optim.Muon([group for group in matrices if group["params"]])
    with pytest.raises(InputError, match="Muon: its step"):
        check_optimizer(optimizer, own)


def test_adam_without_weight_decay_is_adamw() -> None:
    own = plan(weight_decay=0.0)
    check_optimizer(optim.Adam(param_groups(net().named_parameters(), own)), own)


def test_trying_a_step_leaves_the_optimizer_alone() -> None:
    own, model = plan(), net()
    optimizer = optim.AdamW(param_groups(model.named_parameters(), own))
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        check_optimizer(optimizer, own, model)  # a schedule moves lr, and not where it started
        optimizer.step()
        scheduler.step()
    assert not optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("right", [True, False])
def test_a_cycle_goes_up_to_the_plans_rates(right: bool) -> None:
    own, model = plan(), net()
    optimizer = optim.AdamW(param_groups(model.named_parameters(), own))
    peaks = [group["lr"] for group in optimizer.param_groups] if right else 0.01  # one for all is not the plan's
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=20)
    for _ in range(15):
        if right:
            check_optimizer(optimizer, own, model)
        else:
            with pytest.raises(InputError, match=r"lr should be 0\.0025 and is 0\.01"):
                check_optimizer(optimizer, own, model)
        optimizer.step()
        scheduler.step()


SCHEDULES: dict[str, tuple[Callable[[optim.Optimizer], optim.lr_scheduler.LRScheduler], bool]] = {
    "cosine": (lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 20), True),
    "exponential": (lambda o: optim.lr_scheduler.ExponentialLR(o, 0.9), True),
    "warmup": (lambda o: optim.lr_scheduler.LinearLR(o, 0.01, total_iters=5), True),
    "a floor for all": (lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=1e-3), False),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_multiplies_all_groups(kind: str) -> None:
    make, right = SCHEDULES[kind]
    own, model = plan(), net()
    optimizer = optim.AdamW(param_groups(model.named_parameters(), own))
    scheduler = make(optimizer)
    for _ in range(20):
        check_optimizer(optimizer, own, model)
        optimizer.step()
        scheduler.step()
        if not right:
            with pytest.raises(InputError, match="times its initial_lr"):
                check_optimizer(optimizer, own, model)
            break


def test_rates_that_were_set_to_one_under_a_scheduler() -> None:
    own, model = plan(), net()
    optimizer = optim.AdamW(param_groups(model.named_parameters(), own))
    optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for held in (model, None):
        with pytest.raises(InputError, match=r"group mup 2\.weight: lr is .* times its initial_lr") as raised:
            check_optimizer(optimizer, own, held)
        assert len(str(raised.value)) <= 300


def test_a_parameter_in_another_group_of_the_plan() -> None:
    own, model = plan(), net()
    optimizer = optim.AdamW(param_groups(model.named_parameters(), own))
    one, other = optimizer.param_groups[0]["params"], optimizer.param_groups[2]["params"]
    one[0], other[0] = other[0], one[0]
    with pytest.raises(
        InputError, match=r"^(0|2)\.weight: lr should be .* and is .*\. Make the optimizer of param_groups"
    ):
        check_optimizer(optimizer, own, model)


def test_a_model_of_which_something_was_replaced() -> None:
    own, model = plan(), net()
    apply_plan(model, own)
    model[4] = nn.Linear(64, 4)  # type: ignore[operator]
    groups = param_groups(model.named_parameters(), own)
    with pytest.raises(InputError, match=r"^4: multiplier should be 0\.25 on its input and is none\. The hook is gone"):
        check_optimizer(optim.AdamW(groups), own, model)
    plain = net()
    plain[4] = nn.Linear(64, 6)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"4\.weight: the model's shape is \(6, 64\), the plan's \(4, 64\)"):
        check_optimizer(optim.AdamW(param_groups(plain.named_parameters(), own)), own, plain)


def groups(own: Plan) -> list[dict[str, Any]]:
    return param_groups(net().named_parameters(), own)


@pytest.mark.parametrize("betas", [(0.8, 0.95), [0.8, 0.95], (0.8, 0.95 + 1e-12)])  # as a tuple, loaded, as typed
def test_the_recipes_betas_are_accepted(betas: Any) -> None:
    own = plan(adam_beta1=0.8, adam_beta2=0.95)
    check_optimizer(optim.AdamW(groups(own), betas=betas), own)


def test_other_betas_than_the_recipes_are_not() -> None:
    own = plan()
    with pytest.raises(
        InputError, match=r"^0\.weight: betas\[0\] should be 0\.9 and is 0\.8\. Give .* betas=\(0\.9, 0\.999\)"
    ):
        check_optimizer(optim.AdamW(groups(own), betas=(0.8, 0.999)), own)
    own = plan(adam_beta2=0.95)  # which is not torch's default: a kernel with that
    with pytest.raises(InputError, match=r"^0\.weight: betas\[1\] should be 0\.95 and is 0\.999\."):
        check_optimizer(FusedAdam(groups(own)), own)


@pytest.mark.parametrize("betas", [0.9, None, (0.9,), ("0.9", 0.999), torch.tensor([0.8, 0.999])])
def test_betas_that_are_none(betas: Any) -> None:
    own = plan()
    optimizer = FusedAdam(groups(own))
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises(InputError, match=r"^0\.weight: betas\[[01]\] should be 0\.9+ and is (not set|0\.8)\."):
        check_optimizer(optimizer, own)


def test_betas_may_be_tensors() -> None:
    own = plan()
    betas = (torch.tensor(0.9), torch.tensor(0.999))
    check_optimizer(optim.AdamW(groups(own), betas=betas, foreach=False, capturable=True), own)


def test_momentum_is_the_recipes() -> None:
    own = plan("sgd", sgd_momentum=0.0)
    check_optimizer(optim.SGD(groups(own)), own)
    with pytest.raises(
        InputError, match=r"^0\.weight: momentum should be 0 and is 0\.9\. Give the optimizer momentum=0\.0, or"
    ):
        check_optimizer(optim.SGD(groups(own), momentum=0.9), own)


def test_a_cycle_drives_betas_by_its_own() -> None:
    own = plan()
    optimizer = optim.AdamW(param_groups(net().named_parameters(), own))
    peaks = [group["lr"] for group in optimizer.param_groups]
    optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=20, max_momentum=0.7)
    assert optimizer.param_groups[0]["betas"] == (0.7, 0.999)
    check_optimizer(optimizer, own)
    momenta = [0.7, *(0.8 for _ in peaks[1:])]
    optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=20, max_momentum=momenta)
    with pytest.raises(InputError, match=r"betas differ .* Give all of them the same"):
        check_optimizer(optimizer, own)


def test_a_plan_that_does_not_know_of_betas_says_nothing_of_them() -> None:
    """As earlier releases wrote them."""
    own = dataclasses.replace(plan(), optimizer_values={})
    optimizer = optim.AdamW(groups(own), betas=(0.8, 0.95))
    check_optimizer(optimizer, own)
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    with pytest.raises(InputError, match=r"betas differ .* Give all of them the same"):
        check_optimizer(optimizer, own)


def _popped(groups: list[dict[str, Any]]) -> None:
    groups.pop()


def _emptied(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"].pop()


def _twice(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"].append(groups[1]["params"][0])


CHANGES: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "lr": (lambda groups: groups[0].update(lr=1.0), "0.weight: lr should be 0.01 and is 1. Make the optimizer of"),
    "eps": (lambda groups: groups[1].update(eps=1.0), "0.bias: eps should be 2.5e-09 and is 1."),
    "decay": (lambda groups: groups[0].update(weight_decay=1.0), "0.weight: weight decay should be 0.1 and is 1."),
    "betas": (lambda groups: groups[0].update(betas=(0.1, 0.2)), r"0\.weight: betas\[0\] should be 0\.9 and is 0\.1\."),
    "a group missing": (_popped, "the optimizer does not have it"),
    "a parameter missing": (_emptied, "the optimizer does not have it"),
    "a parameter twice": (_twice, "twice"),
}


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("kind", CHANGES)
def test_groups_that_are_not_the_plans(kind: str, with_model: bool) -> None:
    change, words = CHANGES[kind]
    own, model = plan(), net()
    optimizer = optim.AdamW(param_groups(model.named_parameters(), own))
    change(optimizer.param_groups)
    with pytest.raises(InputError, match=words):
        check_optimizer(optimizer, own, model if with_model else None)


def test_groups_of_ones_own_are_compared_by_parameter() -> None:
    own, model = plan(), net()
    flat = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with pytest.raises(InputError, match="groups are not the plan's"):
        check_optimizer(flat, own)
    with pytest.raises(InputError, match=r"should be .* and is .*\. Make the optimizer of param_groups"):
        check_optimizer(flat, own, model)
    each = [
        {"params": [p], "lr": own[n].lr, "eps": own[n].eps, "weight_decay": own[n].weight_decay}
        for n, p in model.named_parameters()
    ]
    check_optimizer(optim.AdamW(each), own, model)


def test_frozen_parameters_are_known_from_the_model() -> None:
    own, model = plan(), net()
    model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr,operator]
    optimizer = optim.AdamW(param_groups(model.named_parameters(), own))
    check_optimizer(optimizer, own, model)
    with pytest.raises(InputError, match="where they are frozen"):
        check_optimizer(optimizer, own)


def sharded_optimizers() -> list[str]:
    """In a rank."""
    # Not where Megatron's CPU runtime is on: it compiles functions when it is imported.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    own, model = plan(), net()
    said = []
    for kind in (optim.AdamW, optim.SGD):
        optimizer = ZeroRedundancyOptimizer(param_groups(model.named_parameters(), own), optimizer_class=kind, lr=1.0)
        try:
            check_optimizer(optimizer, own, model)
            said.append("")
        except InputError as error:
            said.append(str(error))
    return said


def test_a_wrapper_of_torchs_own() -> None:
    right, wrong = run_ranks(sharded_optimizers, 1)[0]
    assert right == ""
    assert "SGD: its step is not AdamW's" in wrong


class Counting(OwnAdamW):
    """It keeps account outside its state."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.steps: list[int] = []
        self.sums: dict[str, torch.Tensor] = {"steps": torch.zeros(1)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps.append(1)
        self.sums["steps"] += 1
        super().step(closure)


def test_a_look_at_an_optimizer_leaves_it_alone() -> None:
    model = net()
    optimizer = Counting(param_groups(model.named_parameters(), plan()))
    check_optimizer(optimizer, plan(), model)
    assert (optimizer.steps, optimizer.sums["steps"].item(), len(optimizer.state)) == ([], 0, 0)


def test_an_optimizer_that_cannot_be_copied_is_accepted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = OwnAdamW(param_groups(model.named_parameters(), plan()))
    optimizer.held = iter(()), (n for n in ())  # type: ignore[attr-defined]
    check_optimizer(optimizer, plan(), model)
    assert "OwnAdamW: it cannot be copied" in caplog.text
