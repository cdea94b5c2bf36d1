"""Optimizers as objects: one is added by registering it, and can leave tensors to another."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.shapes import HYPERPARAMETERS, gpt, recipe_for

from mup_megatron.theory import ADAM, SGD, Optimizer, PlanError, Property, Role, Scaling, Sizes, optimizers
from mup_megatron.theory import optimizers as registered
from mup_megatron.theory.optimizers import _OPTIMIZERS, ONE, Power, register

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
WORDS = "embedding.word_embeddings.weight"


@pytest.fixture(name="own")
def _own() -> Iterator[Optimizer]:
    """Adam with a rule of its own for hidden weights, which leaves embeddings to SGD."""
    own = replace(
        ADAM,
        name="own",
        lr={**ADAM.lr, Role.HIDDEN: Power(r_in=-0.5, r_out=-0.5)},
        others=(SGD,),
        routes=lambda tensor: SGD if Property.EMBEDDING in tensor.properties else optimizers()["own"],
    )
    register(own)
    yield own
    del _OPTIMIZERS["own"]


def test_the_names_are_those_of_a_recipe() -> None:
    assert {name: each.name for name, each in registered().items()} == {
        name: name for name in ("adam", "sgd", "muon", "lion")
    }


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_name_is_registered_once(name: str) -> None:
    before = dict(optimizers())
    with pytest.raises(PlanError, match=f"{name}: an optimizer of this name is registered already"):
        register(replace(ADAM, name=name, lr=dict.fromkeys(Role, ONE)))
    assert optimizers() == before


def test_a_recipe_names_a_registered_optimizer_and_each_entry_says_whose_rules_it_has(own: Optimizer) -> None:
    plan = recipe_for(gpt(1), optimizer="own").plan(gpt(4, ffn_hidden_size=64 * 16))
    assert (plan.optimizer, plan[FC1].rules, plan[WORDS].rules) == ("own", own, SGD)
    assert set(plan.optimizers) == {"own", "sgd"}
    h = HYPERPARAMETERS
    assert (plan[FC1].optimizer, plan[FC1].rule) == ("own", "mup.own.hidden")
    assert plan[FC1].lr == h["lr"] / 2 / 4
    assert (plan[WORDS].optimizer, plan[WORDS].rule) == ("sgd", "mup.sgd.input")
    assert (plan[WORDS].lr, plan[WORDS].eps) == (h["lr"] * 4, None)


def test_an_optimizer_that_routes_nothing_steps_all() -> None:
    assert {entry.optimizer for entry in recipe_for(gpt(1)).plan(gpt(4)).entries} == {"adam"}


def test_how_a_folded_weights_step_grows() -> None:
    # For θ = 1/4: Adam's step is θ times as large, SGD's θ².
    assert (ADAM.folded(0.25), SGD.folded(0.25)) == (0.25, 0.0625)


@pytest.mark.parametrize("name", list(optimizers()))
@pytest.mark.parametrize("role", list(Role))
def test_learning_rate_times_weight_decay_is_the_bases(name: str, role: Role) -> None:
    """With the exponent 1 of every matrix: the timescale on which AdamW and its like forget (arXiv 2405.13698)."""
    optimizer = optimizers()[name]
    grows = {Role.INPUT: (False, True), Role.HIDDEN: (True, True), Role.OUTPUT: (True, False)}.get(role, (False, False))
    s = Scaling(Sizes(64, 256, grows[0]), Sizes(32, 512, grows[1]))
    product = optimizer.learning_rate(role, s, eta=0.5) * optimizer.decayed(role, s, lam=0.25, exponent=1.0)
    assert product == 0.125


@pytest.mark.parametrize("table", ["lr", "eps", "weight_decay"])
def test_a_table_that_lacks_a_role_is_refused(table: str) -> None:
    with pytest.raises(PlanError, match=f"half: its {table} says nothing of the role hidden"):
        register(replace(ADAM, name="half", **{table: {role: ONE for role in Role if role is not Role.HIDDEN}}))
    assert "half" not in optimizers()
