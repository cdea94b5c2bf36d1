"""Layers of somebody's own, whose tensors a model file lists: the plan has them, the live model is compared with it."""

from typing import Any

import pytest
from support import planned, stock
from support.processes import run_ranks
from support.shapes import gpt, hybrid, recipe_for
from support.stock import Layout

from mup_megatron.architectures.cost import parameter_count
from mup_megatron.architectures.registry import model_file
from mup_megatron.errors import InputError

TENSORS: list[dict[str, Any]] = [
    {"name": "decoder.layers.*.gate.weight", "fan_in": "hidden_size", "fan_out": 1},
    {"name": "decoder.layers.*.mix", "fan_in": "hidden_size", "fan_out": "hidden_size", "residual": True},
    {"name": "decoder.layers.*.scale", "fan_out": "hidden_size", "start": 0.5},
]
PLAIN = {"vocab_size": 64}


def own(width: float, tensors: list[dict[str, Any]] = TENSORS, **changes: Any) -> Any:
    content = gpt(width, **PLAIN, **changes).model_dump(mode="json", exclude_defaults=True)
    return model_file({**content, "custom_tensors": tensors}, source="file")


BASE, TARGET = own(1), own(4)
RECIPE = recipe_for(BASE, lr=0.01)


def test_each_gets_what_its_sides_say() -> None:
    plan, h = RECIPE.plan(TARGET), RECIPE.hyperparameters
    layer = "decoder.layers.1"
    expected = {
        f"{layer}.gate.weight": ("output", h.init_method_std / 4, h.lr / 4, h.adam_eps, 4 * h.weight_decay),
        f"{layer}.mix": ("hidden", h.init_method_std / 2 / 4**0.5, h.lr / 4, h.adam_eps / 4, 4 * h.weight_decay),
        f"{layer}.scale": ("input", None, h.lr, h.adam_eps / 4, 0.0),
    }
    for name, (role, *values) in expected.items():
        entry = plan[name]
        assert entry.role == role
        assert (entry.init_std, entry.lr, entry.eps, entry.weight_decay) == pytest.approx(values), name
    assert {site.module for site in plan.sites if site.changes} == {
        "embedding.word_embeddings",
        "embedding.position_embeddings",
        "output_layer",
    } | {f"decoder.layers.{index}.self_attention.core_attention" for index in (0, 1)}, "no factor acts in such a layer"
    assert parameter_count(TARGET) == parameter_count(gpt(4, **PLAIN)) + 2 * (128 + 128**2 + 128)


def test_a_product_is_a_size_and_a_side_may_say_itself_whether_it_grows() -> None:
    fixed = {"size": "num_attention_heads", "grows": False}
    tensors = [
        {"name": "decoder.a", "fan_in": "2*ffn_hidden_size", "fan_out": fixed, "role": "hidden"},
        {"name": "decoder.layers.*.b", "within": "attention", "fan_in": 3, "fan_out": "seq_length", "start": "kept"},
    ]
    plan = recipe_for(own(1, tensors)).plan(own(2, tensors, num_attention_heads=4, kv_channels=16))
    assert (plan["decoder.a"].shape, plan["decoder.a"].width_ratio) == ((4, 256), 2.0)
    assert plan["decoder.layers.0.b"].role == "scalar", "sequences are as long at both"


# ---- live ------------------------------------------------------------------------------------------------------------


def trained(layouts: list[Layout]) -> list[Any]:
    """In a rank: losses with the plug-in in these layouts, and those of the base without and with it."""
    from support.custom_layer import spec

    from mup_megatron.megatron.guard import require_as_planned

    found: list[Any] = []
    for layout in layouts:
        run = planned.prepare(RECIPE, TARGET, layout, layer_spec=spec)
        require_as_planned(run.chunks, RECIPE.plan(TARGET), run.optimizer, run.scheduler, weights=True)
        found.append(stock.train(run, 3))
    tuned = planned.recipe(BASE)
    for plug_in in (False, True):
        found.append(stock.train(planned.prepare(tuned, BASE, Layout(), layer_spec=spec, plug_in=plug_in), 3))
    return found


def refusals() -> dict[str, str]:
    """In a rank: what is said of a plan that lacks a tensor, has one more, or another shape."""
    from support.custom_layer import spec

    wrong = {
        "unlisted": TENSORS[1:],
        "not there": [*TENSORS, {"name": "decoder.layers.*.more", "fan_out": "hidden_size", "start": 1.0}],
        "shape": [*TENSORS[:2], {"name": "decoder.layers.*.scale", "fan_out": "ffn_hidden_size", "start": 0.5}],
    }
    found = {}
    for case, tensors in wrong.items():
        with pytest.raises(InputError) as raised:
            planned.prepare(recipe_for(own(1, tensors)), own(4, tensors), Layout(), layer_spec=spec)
        found[case] = str(raised.value)
    return found


def test_a_listed_layer_trains_and_at_the_base_nothing_changes() -> None:
    [[planned_losses, without, at_base]] = run_ranks(trained, 1, [Layout()])
    assert without == at_base
    assert planned_losses[-1] < planned_losses[0]


def test_what_is_not_as_listed_is_refused() -> None:
    [said] = run_ranks(refusals, 1)
    assert "decoder.layers.0.gate.weight: the model has this parameter, the plan has not" in said["unlisted"]
    assert "decoder.layers.0.more: the plan has this parameter, the model has not" in said["not there"]
    assert "decoder.layers.0.scale: the model's shape is (128,), the plan's (256,)" in said["shape"]


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ({"name": "decoder.layers.0.gate", "fan_out": 1, "start": 0}, "layers cannot be named one by one"),
        ({"name": "decoder gate", "fan_out": 1, "start": 0}, "decoder gate: no name of a parameter"),
        ({"name": "decoder.a", "fan_out": 1, "start": 0, "within": "mlp"}, "within mlp is for names with layers.*"),
        ({"name": "decoder.layers.*.a", "fan_out": 1, "start": 0, "within": "mamba"}, "no layer has mamba"),
        ({"name": "encoder.layers.*.a", "fan_out": 1, "start": 0}, "no such stack of layers. Correct name."),
        ({"name": "decoder.a", "fan_out": "hidden_size"}, "a vector is not drawn. Give start"),
        ({"name": "decoder.a", "fan_out": "hidden", "start": 0}, "'hidden' is no size: 'hidden' is no key"),
        ({"name": "decoder.a", "fan_out": "__class__", "start": 0}, "'__class__' is no size"),
        ({"name": "decoder.a", "fan_out": "swiglu", "start": 0}, "'swiglu' is no size"),
        ({"name": "decoder.a", "fan_out": "2 * -1", "start": 0}, "'2 * -1' is no size"),
        ({"name": "decoder.a", "fan_in": 3, "fan_out": 4, "shape": [5, 5]}, "no whole number of matrices"),
        ({"name": "decoder.a", "fan_in": "hidden_size", "fan_out": 4, "start": "kept"}, "kept, its start does not"),
        ({"name": "decoder.a", "fan_out": 1, "start": 0, "code": "x"}, "unknown key"),
        ({"name": "output_layer.weight", "fan_out": 1, "fan_in": 1}, "two tensors of the architecture have this name"),
    ],
)
def test_what_cannot_be_a_tensor_is_refused(tensor: dict[str, Any], said: str) -> None:
    untied = {"untie_embeddings_and_output_weights": True}
    with pytest.raises(InputError) as raised:
        recipe_for(own(1, [tensor], **untied)).plan(own(2, [tensor], **untied))
    assert said in str(raised.value)
    assert all(len(line) <= 300 for line in str(raised.value).splitlines())


def test_base_and_target_list_the_same_of_one_architecture() -> None:
    with pytest.raises(InputError, match="custom_tensors of the recipe's base and of the target differ"):
        RECIPE.plan(own(4, TENSORS[1:]))
    with pytest.raises(InputError, match="custom_tensors: their names are of one architecture"):
        RECIPE.plan(hybrid(TARGET))
