"""The rule of depth: every tensor's factors, the branches', and a plan without the rule."""

import json
import math
from pathlib import Path

import pytest
from support.shapes import encoder, gpt, hybrid, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.checkpoint_recipe import differences, packed, unpacked
from mup_megatron.errors import InputError
from mup_megatron.recipe import Depth, PerParameter, Recipe, load_recipe, save_recipe
from mup_megatron.theory import ADAM, BRANCH, Plan, PlanEntry, fold_branches, optimizers


def tuned(base: ModelFile, alpha: float | None = 1.0, *, optimizer: str = "adam", **changes: float) -> Recipe:
    recipe = recipe_for(base, optimizer=optimizer, **changes)
    depth = None if alpha is None else Depth(alpha=alpha)
    return recipe.model_copy(update={"parametrization": recipe.parametrization.model_copy(update={"depth": depth})})


def branches(plan: Plan) -> dict[str, float]:
    return {place.module: plan.site(place).factor for place in plan.places if place.carries == BRANCH}


def ratios(entry: PlanEntry, other: PlanEntry) -> dict[str, float | None]:
    """What the rule of depth made of each value."""
    values = {key: getattr(entry, key) for key in ("init_std", "lr", "min_lr", "eps", "weight_decay")}
    return {key: value and value / getattr(other, key) for key, value in values.items()}


LAYERS = 8
M = LAYERS / 2


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_what_a_deeper_stack_gets(alpha: float) -> None:
    """CompleteP's Table 1, relative to a base of two layers."""
    base, target = gpt(1), gpt(4, num_layers=LAYERS)
    with_rule, without = (tuned(base, each).plan(target) for each in (alpha, None))
    same = dict.fromkeys(("init_std", "lr", "min_lr", "eps", "weight_decay"), 1.0)
    for entry in with_rule.entries:
        expected = dict(same)
        if entry.name.startswith("decoder.layers."):
            lr = M ** (alpha - 1)
            expected |= {"lr": lr, "min_lr": lr, "eps": M**-alpha, "weight_decay": 1 / lr}
        if entry.is_residual:
            # Megatron's 1/√(2L) is for the base's L: the branch multiplier stands for the rest.
            expected["init_std"] = math.sqrt(M)
        found = ratios(entry, without[entry.name])
        for key, value in found.items():
            assert value is None or value == 0.0 or value == pytest.approx(expected[key], rel=1e-14), (entry.name, key)
    assert branches(with_rule) == {
        f"decoder.layers.{layer}.{each}": M**-alpha for layer in range(LAYERS) for each in ("self_attention", "mlp")
    }
    assert branches(without) == {}


def test_norms_and_biases_in_blocks_follow_and_the_final_norm_does_not() -> None:
    plan = tuned(gpt(1), 0.5).plan(gpt(1, num_layers=LAYERS))
    for name in ("input_layernorm.weight", "self_attention.linear_qkv.bias", "pre_mlp_layernorm.bias"):
        entry = plan[f"decoder.layers.0.{name}"]
        assert (entry.lr, entry.eps, entry.weight_decay) == (plan.lr / 2, plan.adam_eps / 2, 0.0)
    final = plan["decoder.final_layernorm.weight"]
    assert (final.lr, final.eps) == (plan.lr, plan.adam_eps)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_step_of_sgd_is_made_of_the_gradient(alpha: float) -> None:
    base, target = gpt(1), gpt(1, num_layers=LAYERS)
    plan = tuned(base, alpha, optimizer="sgd").plan(target)
    entry = plan["decoder.layers.0.mlp.linear_fc1.weight"]
    assert entry.lr == pytest.approx(plan.lr * M ** (2 * alpha - 1), rel=1e-14)
    assert entry.lr * entry.weight_decay == pytest.approx(plan.lr * plan.weight_decay, rel=1e-14)


def test_what_every_block_of_an_adam_step_changes_adds_up_to_a_constant() -> None:
    """L branches · multiplier · learning rate, at both exponents: independent of L."""
    for alpha in (1.0, 0.5):
        plans = [tuned(gpt(1), alpha).plan(gpt(1, num_layers=layers)) for layers in (2, 16)]
        changes = [sum(branches(plan).values()) * plan["decoder.layers.0.mlp.linear_fc2.weight"].lr for plan in plans]
        assert changes[0] == pytest.approx(changes[1], rel=1e-14)


def test_the_base_is_as_without_the_rule() -> None:
    base = gpt(1)
    for rule in (tuned(base, 1.0), tuned(base, 0.5)):
        plan, without = rule.plan(base), tuned(base, None).plan(base)
        assert plan.entries == without.entries
        assert not any(plan.site(place).changes for place in plan.places if place.carries == BRANCH)


def test_the_multiplier_of_branches_multiplies_the_rules() -> None:
    plan = tuned(gpt(1), 1.0, residual_multiplier=0.25).plan(gpt(1, num_layers=LAYERS))
    assert set(branches(plan).values()) == {0.25 / M}
    alone = tuned(gpt(1), None, residual_multiplier=0.25).plan(gpt(1, num_layers=LAYERS))
    assert set(branches(alone).values()) == {0.25}
    assert alone.entries == tuned(gpt(1), None).plan(gpt(1, num_layers=LAYERS)).entries


def test_each_stack_has_its_own_depth() -> None:
    base = encoder("t5", decoder_num_layers=2)
    target = encoder("t5", num_layers=8, decoder_num_layers=4)
    plan = tuned(base).plan(target)
    found = branches(plan)
    assert {factor for name, factor in found.items() if name.startswith("encoder")} == {1 / 4}
    assert {factor for name, factor in found.items() if name.startswith("decoder")} == {1 / 2}
    assert found["decoder.layers.3.cross_attention"] == 1 / 2
    assert {name: each.ratio for name, each in plan.deepened.items()} == {"encoder": 4.0, "decoder": 2.0}


def test_a_hybrid_models_layer_is_one_branch() -> None:
    base, target = gpt(1), gpt(1, num_layers=LAYERS)
    one, other = (tuned(base, 0.5).plan(model) for model in (target, hybrid(target)))
    assert len(branches(other)) == 2 * LAYERS == other.stacks["decoder"].layers
    assert set(branches(other).values()) == set(branches(one).values()) == {0.5}
    assert {(e.lr, e.eps, e.weight_decay, e.init_std) for e in one.entries} == {
        (e.lr, e.eps, e.weight_decay, e.init_std) for e in other.entries
    }


def test_multi_token_prediction_is_as_deep_at_any_depth() -> None:
    """Its stream begins anew and has the branches of one layer. Its start is the base's, as of all such."""
    base, target = (
        gpt(1, num_layers=layers, mtp_num_layers=1, position_embedding_type="none") for layers in (2, LAYERS)
    )
    plan, at_base = tuned(base, 1.0, residual_multiplier=0.5).plan(target), tuned(base, 1.0).plan(base)
    found = branches(plan)
    assert found["mtp.layers.0.transformer_layer.mlp"] == found["mtp.layers.0.transformer_layer.self_attention"] == 0.5
    for entry in plan.entries:
        if entry.name.startswith("mtp."):
            assert set(ratios(entry, at_base[entry.name]).values()) <= {None, 0.0, 1.0}, entry.name


def test_experts_and_their_router_follow() -> None:
    own = {"num_experts": 4, "moe_ffn_hidden_size": 24, "add_bias_linear": False}
    plans = [tuned(gpt(1, **own), each).plan(gpt(1, **own, num_layers=LAYERS)) for each in (0.5, None)]
    for name in ("mlp.router.weight", "mlp.experts.local_experts.3.linear_fc1.weight"):
        found = ratios(*(plan[f"decoder.layers.5.{name}"] for plan in plans))
        assert (found["lr"], found["eps"], found["weight_decay"]) == pytest.approx((1 / 2, 1 / 2, 2))
    assert branches(plans[0])["decoder.layers.5.mlp"] == 0.5


def test_an_override_is_relative_to_the_rule() -> None:
    own = (PerParameter(match="*.linear_fc1.weight", lr_mult=3.0),)
    recipe = tuned(gpt(1), 0.5)
    plans = [
        each.plan(gpt(1, num_layers=LAYERS)) for each in (recipe, recipe.model_copy(update={"per_parameter": own}))
    ]
    name = "decoder.layers.7.mlp.linear_fc1.weight"
    assert plans[1][name].lr == 3 * plans[0][name].lr


def test_a_plan_is_the_same_after_json() -> None:
    plan = tuned(gpt(1), 0.5, residual_multiplier=2.0).plan(gpt(2, num_layers=LAYERS))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    without = tuned(gpt(1), None).plan(gpt(2, num_layers=LAYERS)).to_json()
    assert "deepened" not in without["model"]
    assert not [place for place in without["model"]["places"] if place["carries"] == BRANCH]


def test_a_fold_takes_every_factor_into_what_writes_into_the_stream() -> None:
    plan = tuned(gpt(1), 1.0, residual_multiplier=0.5).plan(gpt(1, num_layers=LAYERS))
    folded = fold_branches(plan)
    assert not any(folded.site(place).changes for place in folded.places if place.carries == BRANCH)
    moved = {entry.name.removeprefix("decoder.layers.0.") for entry in folded.entries if entry.folded != 1.0}
    written = {
        f"{each}.{kind}" for each in ("self_attention.linear_proj", "mlp.linear_fc2") for kind in ("weight", "bias")
    }
    assert {name for name in moved if not name.startswith("decoder")} == written
    assert folded["decoder.layers.0.mlp.linear_fc2.weight"].folded == 0.5 / M


def test_recipes_without_the_rule_have_the_fingerprint_that_they_had() -> None:
    content = tuned(gpt(1), None)
    assert content.fingerprint != tuned(gpt(1), 1.0).fingerprint != tuned(gpt(1), 0.5).fingerprint
    assert "depth" not in content.to_yaml()
    assert "residual_multiplier" not in content.to_yaml()
    assert recipe_for(gpt(1)).fingerprint == content.fingerprint


def test_a_recipe_goes_through_a_file_and_a_checkpoint_and_another_rule_is_another_run(tmp_path: Path) -> None:
    whole, half, without = (tuned(gpt(1), alpha, residual_multiplier=0.5) for alpha in (1.0, 0.5, None))
    save_recipe(half, tmp_path / "r.recipe.yaml")
    assert load_recipe(tmp_path / "r.recipe.yaml") == half == unpacked(packed(half), source="a checkpoint")
    assert [*differences(whole, half)] == [("parametrization.depth.alpha", 1.0, 0.5)]
    assert {key for key, _, _ in differences(without, half)} == {
        f"parametrization.depth.{key}" for key in ("rule", "alpha")
    }


@pytest.mark.parametrize("alpha", [0.25, 1.5])
def test_an_exponent_beyond_what_is_known_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        Depth(alpha=alpha)


def test_what_writes_into_the_stream_outside_of_the_branches_is_refused() -> None:
    own = {"custom_tensors": [{"name": "decoder.layers.*.adapter.weight", "fan_in": "hidden_size",
                               "fan_out": "hidden_size", "residual": True}]}  # fmt: skip
    base, target = gpt(1, **own), gpt(1, **own, num_layers=LAYERS)
    tuned(base, None).plan(target)
    with pytest.raises(InputError, match=r"decoder\.layers\.0\.adapter\.weight.*in no branch"):
        tuned(base, 1.0).plan(target)
    with pytest.raises(InputError, match="residual_multiplier"):
        tuned(base, None, residual_multiplier=2.0).plan(target)


def test_every_optimizer_keeps_the_product_of_rate_and_decay() -> None:
    for name in optimizers():
        for alpha in (1.0, 0.5):
            plan = tuned(gpt(1), alpha, optimizer=name).plan(gpt(1, num_layers=LAYERS))
            entry = plan["decoder.layers.3.mlp.linear_fc1.weight"]
            assert entry.lr * entry.weight_decay == pytest.approx(plan.lr * plan.weight_decay, rel=1e-14)
    assert ADAM.step == 0
