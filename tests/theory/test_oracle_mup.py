"""Our plan against microsoft/mup, on an equivalent plain GPT: per tensor, and over ten steps of training.

What mup says is measured on mup's own objects (`support/mup_oracle.py`). Vectors have no weight decay on either side,
as in Megatron. mup has no rule for eps; that one is tested against gradients in `tests/megatron/test_coordinates.py`.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.mup_oracle import mup_adamw, mup_gpt, mup_numbers, mup_sgd, readout_factor
from support.plan_runs import optimizer_from_plan, plain_from_plan, train
from support.shapes import HYPERPARAMETERS, gpt, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import ADAM, SGD, Role, rules
from mup_megatron.theory.optimizers import ONE, Power

Family = Callable[[float], ModelFile]

FAMILIES: dict[str, Family] = {
    "all sides alike": lambda width: gpt(width),
    "tied": lambda width: gpt(width),
    "ffn grows faster": lambda width: gpt(width, ffn_hidden_size=round(64 * width**1.5)),
    "ffn grows faster, tied": lambda width: gpt(width, ffn_hidden_size=round(64 * width**1.5)),
    "heads grow slower": lambda width: gpt(width, num_attention_heads=4 + round(2 * (width - 1))),
    "head size grows": lambda width: gpt(width, num_attention_heads=4, kv_channels=8 * round(width)),
    "head size grows, query norm": lambda width: gpt(
        width, num_attention_heads=4, kv_channels=8 * round(width), qk_layernorm=True
    ),
    "query norm, rotary, gated": lambda width: gpt(
        width, qk_layernorm=True, position_embedding_type="rope", swiglu=True, normalization="RMSNorm"
    ),
    "grouped queries": lambda width: gpt(width, group_query_attention=True, num_query_groups=round(2 * width)),
    "one group of queries": lambda width: gpt(width, group_query_attention=True, num_query_groups=1),
    "no biases": lambda width: gpt(width, add_bias_linear=False),
    "qkv bias": lambda width: gpt(width, add_bias_linear=False, add_qkv_bias=True),
    "deeper": lambda width: gpt(width, num_layers=2 if width == 1 else 5),
}
WIDTHS = (2, 3, 8)


def _pair(family: str, width: float) -> tuple[ModelFile, ModelFile]:
    untied = {"untie_embeddings_and_output_weights": "tied" not in family}
    return (FAMILIES[family](1).model_copy(update=untied), FAMILIES[family](width).model_copy(update=untied))


def disagreements(family: str, width: float, optimizer: str, **changes: float) -> set[str]:
    """Where plan and mup differ, as "role.number" ("model.softmax_scale" for what is no parameter's)."""
    base, target = _pair(family, width)
    h = {**HYPERPARAMETERS, **changes}
    plan = recipe_for(base, optimizer=optimizer, **changes).plan(target)
    own = {key: h[key] for key in ("output_multiplier", "attention_multiplier")}
    model = mup_gpt(base, target, sigma=h["init_method_std"], **own)
    make = {"adam": mup_adamw, "sgd": mup_sgd}[optimizer]
    oracle = mup_numbers(
        model, make(model, lr=h["lr"], weight_decay=h["weight_decay"]), target, sigma=h["init_method_std"]
    )
    assert list(oracle) == [entry.name for entry in plan.entries]
    found = set()
    for entry in plan.entries:
        # mup has no embedding multiplier: what is left is the tuned α.
        alpha = h["embedding_multiplier"] if entry.is_embedding else 1.0
        expected = replace(oracle[entry.name], multiplier=alpha * oracle[entry.name].multiplier)
        for key in ("init_std", "multiplier", "lr", "weight_decay"):
            ours, theirs = getattr(entry, key), getattr(expected, key)
            if not _equal(ours, theirs):
                found.add(f"{entry.role}.{key}")
    if plan.output_multiplier != pytest.approx(readout_factor(model), rel=1e-12):
        found.add("model.output_multiplier")
    if plan.softmax_scale != pytest.approx(model.decoder.layers[0].self_attention.core_attention.softmax_scale):
        found.add("model.softmax_scale")
    return found


def _equal(ours: float | None, theirs: float | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours == pytest.approx(theirs, rel=1e-12, abs=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_gets_what_mup_gives_it(family: str, optimizer: str) -> None:
    for width in WIDTHS:
        assert disagreements(family, width, optimizer) == set(), width


BREAKS = {
    "hidden init": (rules.INIT_STD, Role.HIDDEN, ONE, "adam", {"hidden.init_std"}),
    "input init": (rules.INIT_STD, Role.INPUT, Power(r_out=-0.5), "adam", {"input.init_std"}),
    "output init": (rules.INIT_STD, Role.OUTPUT, Power(r_in=-0.5), "adam", {"output.init_std"}),
    "readout multiplier": (
        rules.MULTIPLIER,
        Role.OUTPUT,
        ONE,
        "adam",
        {"output.multiplier", "model.output_multiplier"},
    ),
    "one LR for all": (ADAM.lr, Role.HIDDEN, ONE, "adam", {"hidden.lr"}),
    "output LR": (ADAM.lr, Role.OUTPUT, Power(r_in=-1), "adam", {"output.lr"}),
    "SGD input LR": (SGD.lr, Role.INPUT, ONE, "sgd", {"input.lr"}),
    "SGD hidden LR": (SGD.lr, Role.HIDDEN, ONE, "sgd", {"hidden.lr"}),
    "SGD output LR": (SGD.lr, Role.OUTPUT, ONE, "sgd", {"output.lr"}),
    "Adam input decay": (
        ADAM.weight_decay,
        Role.INPUT,
        Power(r_out=-1),
        "adam",
        {"input.weight_decay"},
    ),
    "SGD hidden decay": (SGD.weight_decay, Role.HIDDEN, ONE, "sgd", {"hidden.weight_decay"}),
    "SGD output decay": (SGD.weight_decay, Role.OUTPUT, ONE, "sgd", {"output.weight_decay"}),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_noticed_where_it_is_broken(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, role, power, optimizer, expected = BREAKS[broken]
    monkeypatch.setitem(table, role, power)
    assert disagreements("ffn grows faster", 3, optimizer) == expected


def test_fan_in_and_fan_out_mixed_up_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAM.lr, Role.HIDDEN, Power(r_out=-1))
    # With all sides alike nobody can tell.
    assert disagreements("all sides alike", 2, "adam") == set()
    assert disagreements("ffn grows faster", 2, "adam") == {"hidden.lr"}


def test_attention_of_the_square_root_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    square_root = lambda *, head_size, alpha, **_: alpha / head_size**0.5  # noqa: E731
    monkeypatch.setattr(rules, "softmax_scale", square_root)
    assert disagreements("all sides alike", 2, "adam") == set()
    assert disagreements("head size grows", 2, "adam") == {"model.softmax_scale"}


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, set()), (0.5, {"hidden"}), (0.0, {"hidden"})])
def test_mup_compensates_weight_decay_with_exponent_one(exponent: float, expected: set[str]) -> None:
    base, target = _pair("all sides alike", 4)
    recipe = recipe_for(base)
    parametrization = recipe.parametrization.model_copy(update={"weight_decay_exponent": exponent})
    plan = recipe.model_copy(update={"parametrization": parametrization}).plan(target)
    model = mup_gpt(base, target)
    optimizer = mup_adamw(model, lr=0.003, weight_decay=HYPERPARAMETERS["weight_decay"])
    oracle = mup_numbers(model, optimizer, target, sigma=0.05)
    differ = {e.role for e in plan.entries if e.weight_decay != pytest.approx(oracle[e.name].weight_decay, rel=1e-12)}
    assert differ == expected


def test_mup_does_not_scale_eps() -> None:
    base, target = _pair("all sides alike", 4)
    optimizer = mup_adamw(mup_gpt(base, target), lr=0.003, weight_decay=0.0, eps=1e-6)
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


# Ten steps. mup's eps is the same at every width and ours is not, so here it is too small to matter in either.
NO_EPS = 1e-30
LR = {"adam": 0.003, "sgd": 0.05}


def _losses(family: str, optimizer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten losses by the plan and by mup, from the same weights and batches."""
    base, target = _pair(family, 4)
    lr = LR[optimizer]
    h = {**HYPERPARAMETERS, "adam_eps": NO_EPS, "lr": lr}
    oracle = mup_gpt(
        base,
        target,
        sigma=h["init_method_std"],
        **{key: h[key] for key in ("embedding_multiplier", "output_multiplier", "attention_multiplier")},
    )
    plan = recipe_for(base, optimizer=optimizer, adam_eps=NO_EPS, lr=lr).plan(target)
    ours = plain_from_plan(plan, target)
    weights = {name: parameter.detach().clone() for name, parameter in oracle.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights[name])
    if optimizer == "adam":
        theirs = mup_adamw(oracle, lr=lr, weight_decay=h["weight_decay"], betas=(0.9, 0.95), eps=NO_EPS)
    else:
        theirs = mup_sgd(oracle, lr=lr, weight_decay=h["weight_decay"], momentum=0.9)
    return train(ours, optimizer_from_plan(plan, ours), target), train(oracle, theirs, target)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("family", ["ffn grows faster", "tied", "head size grows", "query norm, rotary, gated"])
def test_ten_steps_are_those_of_mup(family: str, optimizer: str) -> None:
    ours, theirs = _losses(family, optimizer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    assert ours[0] - ours[-1] > 0.01, "a model that learns nothing shows nothing"


@pytest.mark.parametrize(
    ("table", "role", "optimizer"),
    [
        (rules.MULTIPLIER, Role.OUTPUT, "adam"),
        (ADAM.lr, Role.HIDDEN, "adam"),
        (SGD.lr, Role.INPUT, "sgd"),
        (SGD.weight_decay, Role.OUTPUT, "sgd"),
    ],
)
def test_ten_steps_notice_a_broken_rule(
    table: dict[Role, Power], role: Role, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table, role, ONE)
    ours, theirs = _losses("ffn grows faster", optimizer)
    assert (ours - theirs).abs().max() > 1e-6
