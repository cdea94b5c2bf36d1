"""Names under the wrappers of torch: by what wraps, and by names alone."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mup_megatron.errors import InputError
from mup_megatron.modules import apply_plan, check_optimizer, module_base, param_groups, plan_for_module
from mup_megatron.modules.names import named_parameters, planned_name, unwrapped
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan


class Net(nn.Module):
    """It has a submodule that is called as data parallelism calls its own."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.module = nn.Linear(8, width)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.module(x)
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.head(x)
        return result


def plan() -> Plan:
    base = module_base(lambda: Net(16), lambda: Net(24))
    return plan_for_module(Net, Recipe.model_validate({"base": base, "hyperparameters": {"lr": 0.01}}))


def parts_wrapped(net: Net) -> nn.Module:
    net.module = checkpoint_wrapper(torch.compile(checkpoint_wrapper(net.module)))  # type: ignore[no-untyped-call,assignment]
    net.layers[1] = torch.compile(net.layers[1])  # type: ignore[assignment]
    return net


WRAPPERS: dict[str, Callable[[Net], Any]] = {
    "none": lambda net: net,
    "compile": torch.compile,
    "data parallelism": nn.DataParallel,
    "averaging": torch.optim.swa_utils.AveragedModel,
    "checkpointing": checkpoint_wrapper,
    "compile in data parallelism": lambda net: nn.DataParallel(torch.compile(net)),  # type: ignore[arg-type]
    "data parallelism in compile": lambda net: torch.compile(nn.DataParallel(net)),
    "parts": parts_wrapped,
    "all": lambda net: torch.compile(nn.DataParallel(checkpoint_wrapper(parts_wrapped(net)))),
}


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Megatron's CPU runtime has one pretended, for other tests of this process."""
    # The package has a function of the module's name.
    module = importlib.import_module("torch.nn.parallel.data_parallel")
    monkeypatch.setattr(module, "_get_available_device_type", lambda: None)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_module_has_the_plans_names(kind: str) -> None:
    model, own = WRAPPERS[kind](Net()), plan()
    assert [name for name, _ in named_parameters(model)] == [entry.name for entry in own.entries]
    groups = param_groups(model.named_parameters(), own)
    assert [group["name"] for group in groups] == [
        group["name"] for group in param_groups(Net().named_parameters(), own)
    ]
    apply_plan(model, own)
    check_optimizer(torch.optim.AdamW(groups), own, model)
    net = unwrapped(model)
    assert isinstance(net, Net)
    assert len(net.head._forward_pre_hooks) == 1


@pytest.mark.parametrize("kind", ["compile", "parts", "all"])
def test_a_factory_may_wrap(kind: str) -> None:
    base = module_base(lambda: WRAPPERS[kind](Net(16)), lambda: Net(24))
    recipe = Recipe.model_validate({"base": base, "hyperparameters": {"lr": 0.01}})
    assert plan_for_module(lambda: WRAPPERS[kind](Net()), recipe).entries == plan().entries


class Own(nn.Module):
    """It calls a layer of its own as `torch.compile` calls what it holds."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self._orig_mod = nn.Linear(width, width)


class OwnParameter(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self._orig_mod = nn.Linear(8, width)
        self.shift = nn.Parameter(torch.zeros(width))


@pytest.mark.parametrize("kind", [Own, OwnParameter])
@pytest.mark.parametrize("wrapper", ["none", "compile", "checkpointing", "compile in data parallelism"])
def test_a_layer_of_ones_own_that_is_called_as_a_wrapper_is_none(kind: Callable[..., Any], wrapper: str) -> None:
    recipe = Recipe.model_validate(
        {"base": module_base(lambda: kind(16), lambda: kind(24)), "hyperparameters": {"lr": 0.01}}
    )
    own, model = plan_for_module(kind, recipe), WRAPPERS[wrapper](kind())
    assert [entry.name for entry in own.entries] == [name for name, _ in kind().named_parameters()]
    assert [name for name, _ in named_parameters(model)] == [entry.name for entry in own.entries]
    apply_plan(model, own)
    check_optimizer(torch.optim.AdamW(param_groups(model.named_parameters(), own)), own, model)


def test_a_wrapper_that_was_given_something_is_one_all_the_same() -> None:
    model = torch.compile(Net())
    model.register_parameter("mup_group_padding0", nn.Parameter(torch.zeros(1)))  # type: ignore[attr-defined]
    assert isinstance(unwrapped(model), Net)  # type: ignore[arg-type]


PLANNED = {"own._orig_mod.g", "a.module.b", "a.b", "module.c", "c", "d", "e.module.module.f"}


@pytest.mark.parametrize(
    ("live", "name"),
    [
        ("a.b", "a.b"),
        ("a.module.b", "a.module.b"),
        ("module.module.c", None),  # of `module.c` or of `c`
        ("module._orig_mod.d", "d"),
        ("_fsdp_wrapped_module.module._checkpoint_wrapped_module.d", "d"),
        ("module.e.module.module._orig_mod.f", "e.module.module.f"),
        ("d._orig_mod", "d"),
        ("own._orig_mod.g", "own._orig_mod.g"),
        ("_orig_mod.own._orig_mod.g", "own._orig_mod.g"),
        ("other", None),
    ],
)
def test_names_alone_are_resolved_or_not_at_all(live: str, name: str | None) -> None:
    assert planned_name(live, PLANNED) == name


def test_two_of_a_name_are_refused() -> None:
    net = Net()
    twice = [*net.named_parameters(), *((f"_orig_mod.{name}", p) for name, p in Net().named_parameters())]
    with pytest.raises(InputError, match="there already"):
        param_groups(twice, plan())
