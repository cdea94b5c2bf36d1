"""Plans of Hugging Face models against microsoft/mup on the same models: per tensor, and over five steps of training.

What mup says is measured on mup's own objects (`support/hf_oracle.py`). Vectors have no weight decay on either side.
mup has no rule for eps; that one is held against gradients in `test_hf_coordinates.py`, and written out by hand in
`test_hf_plans.py`.
"""

import functools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import hf_oracle
from support.hf_families import FAMILIES, config, recipe_at
from support.hf_models import built, trained, with_class
from support.mup_oracle import Numbers
from transformers import PretrainedConfig

from mup_megatron.huggingface import apply_plan, param_groups, plan_for
from mup_megatron.modules import parameters
from mup_megatron.theory import ADAM, SGD, Optimizer, Plan, Role, rules
from mup_megatron.theory.optimizers import ONE, Power

BASE = 32
WIDTHS = (2, 4)
HYPERPARAMETERS = {"lr": 0.003, "init_method_std": 0.05, "output_multiplier": 3.0, "weight_decay": 0.07}
SCALE = 0.05 / 0.02
"""What the tuned `init_method_std` makes of the library's draws."""


def _deep(family: str, width: int, **changes: Any) -> PretrainedConfig:
    return config(family, width, **{"n": 2 if family == "resnet" else 3} | changes)


# Widths of one model that grow apart: nobody mistakes fan_in for fan_out there.
UNEVEN: dict[str, Any] = {
    "gpt2": lambda r: {"n_inner": round(96 * r**1.5)},
    "llama": lambda r: {"intermediate_size": round(80 * r**1.5)},
    "bert": lambda r: {"intermediate_size": round(80 * r**1.5)},
    "resnet": lambda r: {"hidden_sizes": [32 * r, round(48 * r**1.5)]},
    "t5": lambda r: {"d_ff": round(80 * r**1.5)},
}
CASES = [*FAMILIES, *(f"{family}, uneven" for family in UNEVEN)]


def _configs(case: str, ratio: int) -> tuple[str, PretrainedConfig, PretrainedConfig, PretrainedConfig]:
    """(family, base at the target's depth, a wider one that shows what grows, target)."""
    family, _, uneven = case.partition(", ")
    changes = UNEVEN[family] if uneven else lambda _: {}
    base, target = (_deep(family, BASE * r, **changes(r)) for r in (1, ratio))
    return family, base, _deep(family, BASE * 3, **changes(3)), target


def _tuned(case: str) -> PretrainedConfig:
    """The base of the recipe, at another depth than the target."""
    family, _, uneven = case.partition(", ")
    return config(family, BASE, **(UNEVEN[family](1) if uneven else {}))


def _plan(case: str, ratio: int, optimizer: str = "adam", **changes: float) -> Plan:
    family, _, _, target = _configs(case, ratio)
    recipe = recipe_at(
        _tuned(case), hyperparameters=HYPERPARAMETERS | changes, parametrization={"optimizer": optimizer}
    )
    return plan_for(with_class(family, target), recipe)


@functools.cache
def of_mup(case: str, ratio: int, optimizer: str) -> tuple[dict[str, Numbers], set[float]]:
    """(every parameter's numbers, the factors of the readouts), asked once: no rule of ours that a test breaks is in
    them.
    """
    family, base, delta, target = _configs(case, ratio)
    model = built(family, target)
    hf_oracle.mup_shapes(family, model, base, delta)
    draws = hf_oracle.mup_draws(family, model, base, scale=SCALE)
    parameters = dict(model.named_parameters())
    stds = {name: hf_oracle.drawn_std(parameters[name], draw) for name, draw in draws.items()}
    made = hf_oracle.optimizer_of(model, optimizer, lr=0.003, weight_decay=0.07)
    factors = {hf_oracle.readout_factor(model, name) for name in hf_oracle.READOUTS[family]}
    return hf_oracle.numbers(model, made, family, stds), factors


def disagreements(case: str, ratio: int, optimizer: str) -> set[str]:
    """Where plan and mup differ, as "role.number"."""
    family = _configs(case, ratio)[0]
    plan = _plan(case, ratio, optimizer)
    oracle, factors = of_mup(case, ratio, optimizer)
    assert [entry.name for entry in plan.entries] == list(oracle)
    found = set()
    for entry in plan.entries:
        theirs = oracle[entry.name]
        is_head = entry.name in {f"{name}.weight" for name in hf_oracle.READOUTS[family]}
        theirs = replace(theirs, multiplier=theirs.multiplier * (3.0 if is_head else 1.0))
        for key in ("init_std", "multiplier", "lr", "weight_decay"):
            # mup's draws are in single precision here.
            if not _equal(getattr(entry, key), getattr(theirs, key), 1e-5 if key == "init_std" else 1e-12):
                found.add(f"{entry.role}.{key}")
    of_model = {3.0 * factor for factor in factors}
    if [plan.output_multiplier] * len(of_model) != pytest.approx(sorted(of_model), rel=1e-5):
        found.add("model.output_multiplier")
    return found


def _equal(ours: float | None, theirs: float | None, relative: float) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours == pytest.approx(theirs, rel=relative, abs=0)


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [
        pytest.param(case, optimizer, marks=() if optimizer == "adam" or "uneven" in case else pytest.mark.slow)
        for case in CASES
        for optimizer in ("adam", "sgd")
    ],
)
def test_every_tensor_gets_what_mup_gives_it(case: str, optimizer: str) -> None:
    # Convolutions of the smaller ratio: images are large. Both ratios once.
    for ratio in WIDTHS if case == "gpt2" else (2,) if case == "resnet" else (4,):
        assert disagreements(case, ratio, optimizer) == set(), ratio


# ---- what must go red ----------------------------------------------------------------------------------------------

BREAKS: dict[str, tuple[dict[Role, Power], Role, Power, str, set[str]]] = {
    "hidden init": (rules.INIT_STD, Role.HIDDEN, ONE, "adam", {"hidden.init_std"}),
    "readout init": (rules.INIT_STD, Role.OUTPUT, Power(r_in=-0.5), "adam", {"output.init_std"}),
    "one LR for all": (ADAM.lr, Role.HIDDEN, ONE, "adam", {"hidden.lr"}),
    "LR by fan_out": (ADAM.lr, Role.HIDDEN, Power(r_out=-1), "adam", {"hidden.lr"}),
    "no readout multiplier": (
        rules.MULTIPLIER,
        Role.OUTPUT,
        ONE,
        "adam",
        {"output.multiplier", "model.output_multiplier"},
    ),
    "SGD input LR": (SGD.lr, Role.INPUT, ONE, "sgd", {"input.lr"}),
    "SGD LR by fan_in alone": (SGD.lr, Role.HIDDEN, Power(r_in=-1), "sgd", {"hidden.lr"}),
    "decay not compensated": (SGD.weight_decay, Role.HIDDEN, ONE, "sgd", {"hidden.weight_decay"}),
}


@pytest.mark.parametrize("case", ["llama, uneven", "resnet, uneven"])
@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_noticed_where_it_is_broken(broken: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, role, power, optimizer, expected = BREAKS[broken]
    monkeypatch.setitem(table, role, power)
    assert disagreements(case, 4, optimizer) == expected


def test_weight_decay_that_is_not_compensated_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Optimizer.decayed
    monkeypatch.setattr(Optimizer, "decayed", lambda *args, **rest: original(*args, **rest | {"exponent": 0.0}))
    assert disagreements("gpt2", 4, "adam") == {"hidden.weight_decay"}


def test_conv1d_taken_for_linear_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = parameters.linear_sides
    monkeypatch.setattr(parameters, "linear_sides", lambda *args: original(*args) and (0, 1))
    assert disagreements("gpt2", 4, "adam") == set(), "with all widths alike nobody can tell"
    assert disagreements("gpt2, uneven", 4, "adam") == {"hidden.init_std", "hidden.lr", "hidden.weight_decay"}


def test_a_kernel_that_is_not_counted_is_noticed_where_fan_in_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan("resnet", 4)
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    assert (plan[name].fan_in, plan[name].fan_out, plan[name].width_ratio) == (128 * 9, 128, 4.0)
    assert plan["resnet.embedder.embedder.convolution.weight"].fan_in == 3 * 7 * 7
    monkeypatch.setattr(parameters, "math", SimpleNamespace(prod=lambda *_: 1))  # of this module alone
    assert _plan("resnet", 4)[name].fan_in == 128


# ---- five steps ----------------------------------------------------------------------------------------------------

NO_EPS = 1e-30
"""mup's eps is the same at every width and ours is not: too small to matter in either."""
LR = {"adam": 0.003, "sgd": 0.1}


def _losses(case: str, optimizer: str, **changes: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Five losses by our plan and by mup, from the same weights and in double precision."""
    ratio = 2 if case.startswith("resnet") else 4
    family, base, delta, target = _configs(case, ratio)
    if family == "gpt2":  # the head size grows
        base, delta, target = (_with_heads(own, 2) for own in (base, delta, target))
    at_base = _with_heads(_tuned(case), 2) if family == "gpt2" else _tuned(case)
    own = HYPERPARAMETERS | {"lr": LR[optimizer], "adam_eps": NO_EPS} | changes
    plan = plan_for(
        with_class(family, target), recipe_at(at_base, hyperparameters=own, parametrization={"optimizer": optimizer})
    )
    ours = built(family, target, dtype=torch.float64)
    apply_plan(ours, plan)
    groups = param_groups(ours.named_parameters(), plan)
    mine: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95)) if optimizer == "adam" else torch.optim.SGD(groups, momentum=0.9)
    )

    oracle = built(family, target, dtype=torch.float64)
    hf_oracle.mup_shapes(family, oracle, base, delta)
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.copy_(weights[name])
    for name in hf_oracle.READOUTS[family]:
        oracle.get_submodule(name).output_mult = own["output_multiplier"]
        if family == "t5":  # which has 1/√d_model of its own there, and mup's user keeps it as it is at the base
            oracle.get_submodule(name).output_mult *= math.sqrt(ratio)
    if family == "gpt2":
        for block in oracle.transformer.h:
            block.attn.scaling = math.sqrt(BASE // 2) / (ratio * BASE // 2)
    other = {"betas": (0.9, 0.95), "eps": NO_EPS} if optimizer == "adam" else {"momentum": 0.9}
    theirs = hf_oracle.optimizer_of(oracle, optimizer, lr=own["lr"], weight_decay=own["weight_decay"], **other)
    return trained(ours, mine, family, 5), trained(oracle, theirs, family, 5)


def _with_heads(own: PretrainedConfig, heads: int) -> PretrainedConfig:
    own.n_head = heads
    return own


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("case", ["gpt2, uneven", "resnet, uneven", "t5"])
def test_five_steps_are_those_of_mup(case: str, optimizer: str) -> None:
    ours, theirs = _losses(case, optimizer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    assert (ours[0] - ours[-1]).abs() > 0.01, "a model that learns nothing shows nothing"


@pytest.mark.parametrize(
    ("table", "role", "optimizer"),
    [
        (rules.MULTIPLIER, Role.OUTPUT, "adam"),
        (ADAM.lr, Role.HIDDEN, "adam"),
        (SGD.lr, Role.INPUT, "sgd"),
    ],
)
def test_five_steps_notice_a_broken_rule(
    table: dict[Role, Power], role: Role, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table, role, ONE)
    ours, theirs = _losses("gpt2, uneven", optimizer)
    assert (ours - theirs).abs().max() > 1e-6


def test_five_steps_notice_attention_of_the_square_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "softmax_scale", lambda *, head_size, **_: head_size**-0.5)
    ours, theirs = _losses("gpt2, uneven", "adam")
    assert (ours - theirs).abs().max() > 1e-6
