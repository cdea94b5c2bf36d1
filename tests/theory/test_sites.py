"""The sites of a plan: every place where a forward factor acts, with its factor; and a plan with them as JSON."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from support.shapes import HYPERPARAMETERS, gpt, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import PerParameter
from mup_megatron.theory import Acts, Plan, PlanError, Site

WORDS, POSITIONS = "embedding.word_embeddings", "embedding.position_embeddings"
ATTENTION = [f"decoder.layers.{index}.self_attention.core_attention" for index in (0, 1)]
ALPHA = {key: HYPERPARAMETERS[f"{key}_multiplier"] for key in ("embedding", "output", "attention")}


def plan(*overrides: PerParameter, target: ModelFile | None = None, **changes: Any) -> Plan:
    recipe = recipe_for(gpt(1, **changes)).model_copy(update={"per_parameter": overrides})
    return recipe.plan(target or gpt(4, **changes))


def acting(found: Plan) -> dict[tuple[str, Acts], float]:
    assert len({(site.module, site.acts) for site in found.sites}) == len(found.sites)
    assert all(site.reason for site in found.sites)
    return {(site.module, site.acts): site.factor for site in found.sites}


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_readout_and_attention(tied: bool) -> None:
    found = plan(untie_embeddings_and_output_weights=not tied)
    scale = ALPHA["attention"] * (1 / 8**0.5)
    assert acting(found) == {
        (WORDS, Acts.OUTPUT): ALPHA["embedding"],
        (POSITIONS, Acts.OUTPUT): ALPHA["embedding"],
        (ATTENTION[0], Acts.SCALE): pytest.approx(scale, rel=1e-15),
        (ATTENTION[1], Acts.SCALE): pytest.approx(scale, rel=1e-15),
        ("output_layer", Acts.INPUT): ALPHA["output"] / 4,
    }


def test_a_model_without_positions_has_no_site_for_them() -> None:
    assert (POSITIONS, Acts.OUTPUT) not in acting(plan(position_embedding_type="rope"))


def test_a_weights_own_factor_acts_on_its_modules_input() -> None:
    own = PerParameter(match="*.layers.1.mlp.linear_fc1.weight", multiplier=3.0)
    extra = acting(plan(own)).items() - acting(plan()).items()
    assert extra == {(("decoder.layers.1.mlp.linear_fc1", Acts.INPUT), 3.0)}


@pytest.mark.parametrize("tied", [True, False])
def test_an_override_of_a_weight_with_a_place_acts_there(tied: bool) -> None:
    untied = {"untie_embeddings_and_output_weights": not tied}
    found = acting(plan(PerParameter(match=f"{WORDS}.weight", multiplier=2.0), **untied))
    assert found[WORDS, Acts.OUTPUT] == 2 * ALPHA["embedding"]
    assert found[POSITIONS, Acts.OUTPUT] == ALPHA["embedding"]
    assert found["output_layer", Acts.INPUT] == ALPHA["output"] / 4
    if not tied:
        found = acting(plan(PerParameter(match="output_layer.weight", multiplier=2.0), **untied))
        assert found["output_layer", Acts.INPUT] == 2 * ALPHA["output"] / 4


def test_a_site_with_the_stock_factor_has_nothing_to_do() -> None:
    ones = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), 1.0)
    at_base = recipe_for(gpt(1), **ones).plan(gpt(1))
    assert len(at_base.sites) == 5
    assert not any(site.changes for site in at_base.sites)
    wider = recipe_for(gpt(1), **ones).plan(gpt(4, num_attention_heads=4, kv_channels=32))
    assert {site.module for site in wider.sites if site.changes} == {*ATTENTION, "output_layer"}
    assert Site("x", Acts.INPUT, 2.0, 1.0, "").changes


# ---- as JSON -------------------------------------------------------------------------------------------------------

TARGETS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, llama": {
        "untie_embeddings_and_output_weights": True,
        "swiglu": True,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "position_embedding_type": "rope",
    },
}


@pytest.mark.parametrize("case", TARGETS)
def test_json_gives_the_same_plan_back_bit_by_bit(case: str) -> None:
    changes = TARGETS[case]
    target = gpt(3, num_layers=3, num_attention_heads=4, kv_channels=24, **changes)
    found = plan(PerParameter(match="*.linear_fc1.weight", multiplier=1 / 3), target=target, **changes)
    again = Plan.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert json.dumps(again.to_json()) == json.dumps(found.to_json())
    assert again.sites == found.sites
    assert [entry.rules for entry in again.entries] == [entry.rules for entry in found.entries]


Damage = Callable[[dict[str, Any]], object]
DAMAGED: dict[str, Damage] = {
    "an optimizer that is none": lambda plan: plan.update(optimizer="adagrad"),
    "an entry's optimizer that is none": lambda plan: plan["parameters"][0].update(optimizer="adagrad"),
    "a property that is none": lambda plan: plan["parameters"][0].update(properties=["chooser"]),
    "a role that is none": lambda plan: plan["parameters"][0].update(role="router"),
    "no properties": lambda plan: plan["parameters"][0].pop("properties"),
    "an entry's key": lambda plan: plan["parameters"][0].update(kind="weight"),
    "a way to act that is none": lambda plan: plan["model"]["places"][0].update(acts="twice"),
    "a place without its module": lambda plan: plan["model"]["places"][0].pop("module"),
    "a stack's key": lambda plan: plan["model"]["stacks"]["decoder"].update(depth=3),
    "no stacks": lambda plan: plan["model"].pop("stacks"),
    "no places": lambda plan: plan["model"].pop("places"),
    "no model": lambda plan: plan.pop("model"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_json_that_is_damaged_is_refused(case: str) -> None:
    content = json.loads(json.dumps(plan().to_json()))
    DAMAGED[case](content)
    with pytest.raises(PlanError, match=r"^Not a plan: .* Write it anew with"):
        Plan.from_json(content)
