"""The same faults are found through each adapter: with the name, what was expected and found, and nothing when right.

A fault that an adapter does not look for is not in its table: DeepSpeed's guard sees an engine of a model whose weights
and shapes were looked at before, and a module's constants are the caller's.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ds_ranks, planned
from support.ds_models import build, ds_config, recipe_for, write
from support.fork_models import GPTModel
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout, Run
from torch import nn

from mup_megatron.errors import InputError
from mup_megatron.live.hooks import ScaledInput
from mup_megatron.modules import apply_plan, check_optimizer, module_base, param_groups, plan_for_module
from mup_megatron.modules.applied import require_applied
from mup_megatron.recipe import Hyperparameters, PerParameter, Recipe
from mup_megatron.theory import Plan

RIGHT = "nothing"


def _said(look: Callable[[], object]) -> str | None:
    try:
        look()
    except InputError as error:
        return str(error)
    return None


def _changed(parameter: nn.Parameter, change: Callable[[torch.Tensor], object]) -> None:
    with torch.no_grad():
        change(parameter)


def _again(module: nn.Module, factor: float) -> None:
    module.register_forward_pre_hook(ScaledInput(factor))


# ---- Megatron's guard ----------------------------------------------------------------------------------------------

TARGET = gpt(4, num_layers=2, vocab_size=64)
TUNED = planned.recipe(gpt(num_layers=2, vocab_size=64), output_multiplier=2.0, attention_multiplier=4.0)
FC1 = "decoder.layers.0.mlp.linear_fc1"


def _group(run: Run) -> dict[str, Any]:
    from mup_megatron.megatron.optimizer import parameters_with_groups

    found = parameters_with_groups(run.optimizer, run.chunks, tied=True)
    return next(groups[0] for name, _, groups in found if name == f"{FC1}.weight")


def _update(run: Run, key: str, factor: float) -> None:
    group = _group(run)
    group[key] *= factor
    run.scheduler.step(0)


def _lose(run: Run) -> None:
    group, lost = _group(run), _model(run).get_parameter(f"{FC1}.weight")
    group["params"] = [parameter for parameter in group["params"] if parameter is not lost]


def _model(run: Run) -> Any:
    return run.chunks[0].module


def _fc1(run: Run) -> Any:
    return _model(run).get_submodule(FC1)


MEGATRON: dict[str, tuple[Callable[[Run], object], str]] = {
    RIGHT: (lambda run: None, ""),
    "missing parameter": (
        lambda run: setattr(_fc1(run), "bias", None),
        f"{FC1}.bias: the plan has this parameter, the model has not. Make the model file",
    ),
    "wrong shape": (
        lambda run: setattr(_fc1(run), "bias", nn.Parameter(torch.zeros(7))),
        f"{FC1}.bias: the model's shape is (7,), the plan's (256,). Make the model file",
    ),
    "in no group": (_lose, f"{FC1}.weight: optimizer group should be one and is none. No group"),
    "lr": (
        lambda run: _update(run, "max_lr", 1.5),
        f"{FC1}.weight (and 1 more layer): max_lr should be 0.00025 and is 0.000375. Some",
    ),
    "eps": (
        lambda run: _update(run, "eps", 8.0),
        f"{FC1}.weight (and 1 more layer): eps should be 2.5e-09 and is 2e-08. Another eps",
    ),
    "weight decay": (
        lambda run: _update(run, "wd_mult", 2.0),
        f"{FC1}.weight (and 1 more layer): weight decay should be 0.4 and is 0.8. Something changed",
    ),
    "missing hook": (
        lambda run: _model(run).output_layer._forward_pre_hooks.clear(),
        "output_layer: multiplier should be 0.5 on its input and is none. The hook is gone",
    ),
    "double hook": (
        lambda run: _again(_model(run).output_layer, 0.5),
        "output_layer: multiplier should be 0.5 on its input and is 0.5 on its input and 0.5 on its input. The plan",
    ),
    "foreign hook": (
        lambda run: _again(_fc1(run), 3.0),
        f"{FC1}: multiplier should be none and is 3 on its input. The plan has no multiplier here",
    ),
    "softmax scale": (
        lambda run: setattr(_model(run).decoder.layers[1].self_attention.core_attention, "softmax_scale", 0.5),
        "decoder.layers.1.self_attention.core_attention: softmax scale should be",
    ),
    "std": (
        lambda run: _changed(_fc1(run).weight, lambda w: w.mul_(1.5)),
        f"{FC1}.weight: initial std should be 0.01 and is 0.01",
    ),
    "constant": (
        lambda run: _changed(_model(run).decoder.final_layernorm.weight, lambda w: w.fill_(1.5)),
        "decoder.final_layernorm.weight: initial value should be 1 and is 1.5. Something changed it",
    ),
}


def _through_megatron(faults: list[str]) -> dict[str, str | None]:
    from mup_megatron.megatron.guard import require_as_planned

    said, plan = {}, TUNED.plan(TARGET)
    for fault in faults:
        run = planned.prepare(TUNED, TARGET, Layout())
        MEGATRON[fault][0](run)
        look = partial(require_as_planned, run.chunks, plan, run.optimizer, run.scheduler, weights=True)
        said[fault] = _said(look)
    return said


# ---- modules -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.head_dim = width
        self.scaling = self.head_dim**-0.5


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.attention = Attention(width)
        self.head = nn.Linear(width, 4)


def plan_of_net() -> Plan:
    base = module_base(lambda: Net(16), lambda: Net(32))
    numbers = Hyperparameters(lr=0.01, weight_decay=0.1, attention_multiplier=2.0)
    return plan_for_module(lambda: Net(64), Recipe(base=base, hyperparameters=numbers))


def _of_group(optimizer: Any, net: Net, key: str, value: float) -> None:
    next(group for group in optimizer.param_groups if net.attention.qkv.weight in set(group["params"]))[key] = value


Broken = Callable[[Net, Any], object]
QKV = "attention.qkv"
MODULES: dict[str, tuple[Broken, str]] = {
    RIGHT: (lambda net, optimizer: None, ""),
    "missing parameter": (
        lambda net, optimizer: setattr(net.first, "bias", None),
        "first.bias: the plan has this parameter, the model has not. Make the plan",
    ),
    "wrong shape": (
        lambda net, optimizer: setattr(net.first, "bias", nn.Parameter(torch.zeros(7))),
        "first.bias: the model's shape is (7,), the plan's (64,). Make the plan",
    ),
    "in no group": (
        lambda net, optimizer: optimizer.param_groups[0].update(params=optimizer.param_groups[0]["params"][1:]),
        "first.weight: the optimizer does not have it. Freeze it",
    ),
    "lr": (
        lambda net, optimizer: _of_group(optimizer, net, "lr", 0.01),
        f"{QKV}.weight: lr should be 0.0025 and is 0.01. Make the optimizer",
    ),
    "eps": (
        lambda net, optimizer: _of_group(optimizer, net, "eps", 1e-8),
        f"{QKV}.weight: eps should be 2.5e-09 and is 1e-08. Make the optimizer",
    ),
    "weight decay": (
        lambda net, optimizer: _of_group(optimizer, net, "weight_decay", 0.1),
        f"{QKV}.weight: weight decay should be 0.4 and is 0.1. Make the optimizer",
    ),
    "missing hook": (
        lambda net, optimizer: net.head._forward_pre_hooks.clear(),
        "head: multiplier should be 0.25 on its input and is none. The hook is gone",
    ),
    "double hook": (
        lambda net, optimizer: _again(net.head, 0.25),
        "head: multiplier should be 0.25 on its input and is 0.25 on its input and 0.25 on its input. The plan",
    ),
    "foreign hook": (
        lambda net, optimizer: _again(net.first, 3.0),
        "first: multiplier should be none and is 3 on its input. The plan has no multiplier here",
    ),
    "softmax scale": (
        lambda net, optimizer: setattr(net.attention, "scaling", 0.5),
        "attention: softmax scale should be 0.125 and is 0.5. Its attention was changed",
    ),
}


def _through_modules(fault: str) -> str | None:
    net, plan = Net(64), plan_of_net()
    apply_plan(net, plan)
    optimizer = torch.optim.AdamW(param_groups(net.named_parameters(), plan))
    MODULES[fault][0](net, optimizer)

    def look() -> None:
        require_applied(net, plan)
        check_optimizer(optimizer, plan, net)

    return _said(look)


def test_a_std_that_is_not_the_librarys_is_found_through_modules() -> None:
    net = Net(64)
    _changed(net.head.weight, lambda w: w.mul_(1.5))
    said = _said(lambda: apply_plan(net, plan_of_net()))
    assert said is not None
    assert "head.weight has an RMS of" in said


# ---- DeepSpeed's guard ---------------------------------------------------------------------------------------------

HIDDEN = "transformer.h.0.attn.c_attn"


def _set(engine: Any, key: str, value: float) -> None:
    next(g for g in engine.optimizer.param_groups if f"{HIDDEN}.weight" in g["name"])[key] = value


DEEPSPEED: dict[str, tuple[Callable[[Any], object], str]] = {
    RIGHT: (lambda engine: None, ""),
    "in no group": (
        lambda engine: engine.optimizer.param_groups.pop(),
        f"{HIDDEN}.weight (and 1 more layer): optimizer group should be one and is none",
    ),
    "lr": (
        lambda engine: _set(engine, "lr", 0.004),
        f"{HIDDEN}.weight (and 1 more layer): lr should be 0.001 and is 0.004",
    ),
    "eps": (
        lambda engine: _set(engine, "eps", 1e-7),
        f"{HIDDEN}.weight (and 1 more layer): eps should be 2.5e-08 and is 1e-07",
    ),
    "weight decay": (
        lambda engine: _set(engine, "weight_decay", 0.1),
        f"{HIDDEN}.weight (and 1 more layer): weight decay should be 0.4 and is 0.1",
    ),
    "missing hook": (
        lambda engine: engine.module.transformer.wte._forward_hooks.clear(),
        "transformer.wte: multiplier should be 2 on its output and is none. The hook is gone",
    ),
    "double hook": (
        lambda engine: _again(engine.module.transformer.wte, 2.0),
        "transformer.wte: multiplier should be 2 on its output and is 2 on its input and 2 on its output",
    ),
    "foreign hook": (
        lambda engine: _again(engine.module.get_submodule(HIDDEN), 3.0),
        f"{HIDDEN}: multiplier should be none and is 3 on its input",
    ),
    "softmax scale": (
        lambda engine: setattr(engine.module.transformer.h[1].attn, "scaling", 0.5),
        "transformer.h.1.attn: softmax scale should be 0.25 and is 0.5",
    ),
}


def _through_deepspeed(recipe_path: str) -> dict[str, str | None]:
    import deepspeed

    import mup_megatron.deepspeed
    from mup_megatron.deepspeed import guard

    said = {}
    for fault, (broken, _) in DEEPSPEED.items():
        content = ds_config(world_size=1) | {"mup": {"recipe": recipe_path}}
        engine = deepspeed.initialize(model=build("gpt2", 4), config=content)[0]
        plan = mup_megatron.deepspeed.plan_of(engine)
        assert plan is not None
        broken(engine)
        said[fault] = "\n".join(guard.problems(engine, plan, 0.7, at_peak=True)) or None
        engine.destroy()
    return said


# ---- the fork's adapter --------------------------------------------------------------------------------------------


def _through_the_fork(fault: str) -> str | None:
    from mup_megatron.megatron_deepspeed.names import mismatches

    model: Any = GPTModel(gpt(2))
    layer = model.language_model.encoder.layers[0].mlp.dense_h_to_4h
    FORK[fault][0](layer)
    plan = TUNED_FORK.plan(gpt(2))
    return "\n".join(mismatches([model], plan, 1)) or None


TUNED_FORK = planned.recipe(gpt(1)).model_copy(update={"per_parameter": (PerParameter(match="*fc1*", lr_mult=2.0),)})
FORK: dict[str, tuple[Callable[[Any], object], str]] = {
    RIGHT: (lambda layer: None, ""),
    "missing parameter": (
        lambda layer: setattr(layer, "bias", None),
        f"{FC1}.bias: the plan has this parameter, the model has not. Is the model",
    ),
    "wrong shape": (
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(7))),
        f"mlp.dense_h_to_4h.bias ({FC1}.bias): the model's shape is (7,), the plan's (128,). Is the model",
    ),
}


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str | None]]:
    recipe_path = write(recipe_for("gpt2"), Path(tmp_path_factory.mktemp("recipe")))
    return {
        "megatron": run_ranks(_through_megatron, 1, list(MEGATRON))[0],
        "modules": {fault: _through_modules(fault) for fault in MODULES},
        "deepspeed": ds_ranks.run_ranks(_through_deepspeed, 1, recipe_path)[0],
        "fork": {fault: _through_the_fork(fault) for fault in FORK},
    }


ADAPTERS = {"megatron": MEGATRON, "modules": MODULES, "deepspeed": DEEPSPEED, "fork": FORK}


@pytest.mark.parametrize(("adapter", "fault"), [(name, fault) for name, faults in ADAPTERS.items() for fault in faults])
def test_fault_is_found_through_the_adapter(said: dict[str, dict[str, str | None]], adapter: str, fault: str) -> None:
    found, (_, words) = said[adapter][fault], ADAPTERS[adapter][fault]  # type: ignore[index]
    if fault == RIGHT:
        assert found is None
    else:
        assert found is not None, "not noticed"
        assert words in found
