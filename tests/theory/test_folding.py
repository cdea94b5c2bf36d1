"""Folding: the same function and the same training run, with a multiplier inside the weight instead of beside it."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from support.plain_gpt import draw_weights
from support.plan_runs import optimizer_from_plan, plain_from_plan, train
from support.shapes import HYPERPARAMETERS, gpt, recipe_for
from torch import Tensor

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import PerParameter
from mup_megatron.theory import Plan, PlanEntry, PlanError
from mup_megatron.theory.folding import READOUT, fold, fold_attention, unfold

WORDS = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
LR = {"adam": 1e-3, "sgd": 1e-3}

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "query norm": {"qk_layernorm": True, "untie_embeddings_and_output_weights": True},
    "query norm, RMS, rotary": {"qk_layernorm": True, "normalization": "RMSNorm", "position_embedding_type": "rope"},
    "query norm, gains around 0, tied": {"qk_layernorm": True, "apply_layernorm_1p": True},
}


def _case(shape: str, optimizer: str) -> tuple[Plan, ModelFile]:
    """A plan with all kinds of multipliers, weight decay on."""
    changes = SHAPES[shape]
    # Heads grow in size too, so that attention has a scale of its own.
    target = gpt(2, kv_channels=16, num_attention_heads=4, **changes)
    recipe = recipe_for(gpt(1, **changes), optimizer=optimizer, lr=LR[optimizer], min_lr=0.0)
    own = (PerParameter(match="*.linear_fc1.weight", multiplier=1.5, lr_mult=0.7),)
    return recipe.model_copy(update={"per_parameter": own}).plan(target), target


def run(plan: Plan, target: ModelFile, explicit: Plan) -> Tensor:
    """Ten losses by a plan that was folded from `explicit`, from weights that are folded alike."""
    model = plain_from_plan(plan, target)
    draw_weights(model, {entry.name: entry.init_std for entry in plan.entries}, seed=5)
    # Norms that have left their starting values, in the plan's own terms.
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                entry, start = plan[name], explicit[name].init_value
                moved = start + 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(entry.folded * moved + entry.fold_offset)
    return train(model, optimizer_from_plan(plan, model), target)


def assert_same_run(folded: Plan, explicit: Plan, target: ModelFile) -> None:
    ours, theirs = run(folded, target, explicit), run(explicit, target, explicit)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert (theirs[0] - theirs[-1]).abs() > 1e-3


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_folded_plan_is_the_same_run(shape: str, optimizer: str) -> None:
    plan, target = _case(shape, optimizer)
    folded = fold(plan)
    assert {entry.multiplier for entry in folded.entries} == {1.0}
    assert folded.embedding_multiplier == folded.output_multiplier == 1.0
    assert_same_run(folded, plan, target)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ("tied", {FC1}),
        ("tied", {READOUT}),
        ("tied", {POSITIONS}),
        ("tied", {WORDS}),
        ("untied", {FC1, READOUT}),
        ("untied", {WORDS}),
        ("untied", {WORDS, POSITIONS}),
    ],
)
def test_any_part_can_be_folded_alone(shape: str, names: set[str], optimizer: str) -> None:
    plan, target = _case(shape, optimizer)
    assert_same_run(fold(plan, names), plan, target)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "query norm" in shape])
def test_attention_is_folded_into_the_query_norm(shape: str, optimizer: str) -> None:
    plan, target = _case(shape, optimizer)
    folded = fold_attention(plan)
    assert plan.changes_softmax_scale
    assert not folded.changes_softmax_scale
    assert_same_run(fold(folded, {READOUT, FC1}), plan, target)


def test_attention_cannot_be_folded_without_a_query_norm() -> None:
    plan, _ = _case("untied", "adam")
    with pytest.raises(PlanError, match=r"without a query norm.* Keep it as softmax_scale, or use qk_layernorm"):
        fold_attention(plan)


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "init_std"])
def test_every_value_that_folding_moves_is_needed(key: str) -> None:
    plan, target = _case("untied", "adam")
    folded = fold(plan)
    values = {entry.name: getattr(entry, key) for entry in plan.entries}
    # Large enough an eps for ten steps to feel it.
    eps = 1e-3 if key == "eps" else None
    plan, folded = _with_eps(plan, eps), _with_eps(folded, eps)
    entries = tuple(
        dataclasses.replace(entry, **{key: eps or values[entry.name]}) if entry.folded != 1.0 else entry
        for entry in folded.entries
    )
    broken = dataclasses.replace(folded, entries=entries)
    assert (run(broken, target, plan) - run(plan, target, plan)).abs().max() > 1e-7


def _with_eps(plan: Plan, eps: float | None) -> Plan:
    if eps is None:
        return plan
    entries = tuple(dataclasses.replace(entry, eps=eps / entry.folded) for entry in plan.entries)
    return dataclasses.replace(plan, entries=entries)


# ---- and back ------------------------------------------------------------------------------------------------------


def _assert_equal(ours: Plan, theirs: Plan) -> None:
    """Equal to a few roundings."""
    for field in dataclasses.fields(Plan):
        if field.name != "entries":
            _assert_close(getattr(ours, field.name), getattr(theirs, field.name), field.name)
    for mine, other in zip(ours.entries, theirs.entries, strict=True):
        for field in dataclasses.fields(PlanEntry):
            _assert_close(getattr(mine, field.name), getattr(other, field.name), f"{mine.name}: {field.name}")


def _assert_close(ours: object, theirs: object, where: str) -> None:
    if isinstance(ours, float) and isinstance(theirs, float):
        # What starts at 0 comes back as the difference of two numbers of order 1.
        assert math.isclose(ours, theirs, rel_tol=1e-15, abs_tol=1e-15 if theirs in (0.0, 1.0) else 0.0), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unfolding_gives_the_plan_back(shape: str, optimizer: str) -> None:
    plan, _ = _case(shape, optimizer)
    _assert_equal(unfold(fold(plan)), plan)
    for names in ({FC1}, {READOUT}, {FC1, READOUT}):
        _assert_equal(unfold(fold(plan, names)), plan)
    if "query norm" in shape:
        _assert_equal(unfold(fold(fold_attention(plan))), plan)


def test_unfolding_one_of_two_embeddings_gives_the_plan_back() -> None:
    plan, _ = _case("untied", "adam")
    _assert_equal(unfold(fold(plan, {WORDS})), plan)


def test_unfolding_gives_back_what_an_override_did_to_one_embedding() -> None:
    own = (PerParameter(match=WORDS, multiplier=2.0),)
    plan = recipe_for(gpt(1)).model_copy(update={"per_parameter": own}).plan(gpt(4))
    _assert_equal(unfold(fold(plan)), plan)


def test_folding_twice_is_folding_once() -> None:
    plan, _ = _case("untied", "adam")
    assert fold(fold(plan)) == fold(plan)


def test_a_folded_plan_survives_json() -> None:
    plan, _ = _case("query norm, gains around 0, tied", "adam")
    folded = fold(fold_attention(plan))
    assert Plan.from_json(json.loads(json.dumps(folded.to_json()))) == folded
    _assert_equal(unfold(Plan.from_json(folded.to_json())), plan)


def test_nothing_to_fold_changes_nothing() -> None:
    ones = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), 1.0)
    plan = recipe_for(gpt(1), **ones).plan(gpt(1))
    assert fold(plan) == unfold(plan) == plan


def test_an_unknown_name_is_an_error_that_names_it() -> None:
    plan, _ = _case("untied", "adam")
    with pytest.raises(PlanError, match=r"decoder\.layers\.9\.x: the plan has no such parameter"):
        fold(plan, {FC1, "decoder.layers.9.x"})


def test_what_a_folded_readout_gets() -> None:
    # By the abc-symmetry with θ = α_out/r: std θσ, LR θη, eps ε/θ, weight decay λ/θ, multiplier 1.
    plan, _ = _case("untied", "adam")
    h = HYPERPARAMETERS
    theta = h["output_multiplier"] / 2
    head = fold(plan)[plan.readout]
    assert head.init_std == pytest.approx(theta * h["init_method_std"], rel=1e-15)
    assert head.lr == pytest.approx(theta * LR["adam"], rel=1e-15)
    assert head.eps == pytest.approx(plan[plan.readout].eps / theta, rel=1e-15)
    assert head.weight_decay == pytest.approx(h["weight_decay"] / theta, rel=1e-15)
    assert head.multiplier == 1.0
