"""Which models are trained for a target, and with which values."""

from typing import Any

import pytest
from support.shapes import gpt, recipe_for

from mup_megatron.architectures.keys.custom import CustomTensor
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.cost import Expense, expense_of_run
from mup_megatron.check.family.gpt import at_width, condensed, models_for, widths_for
from mup_megatron.check.family.sizes import DEPTH
from mup_megatron.check.family.stress import FLOOR, stressed
from mup_megatron.check.measure.levels import CONTROL_SEEDS, EARLY, LATE, REFERENCE_SEEDS, SEEDS, WIDTHS
from mup_megatron.check.run_megatron import usual_widths
from mup_megatron.errors import InputError
from mup_megatron.recipe import Depth, Hyperparameters, Parametrization, PerParameter, Recipe

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 256,
    "vocab_size": 50257,
    "seq_length": 1024,
}


def recipe(optimizer: str = "adam", hyperparameters: dict[str, Any] | None = None, **base: Any) -> Recipe:
    return Recipe(
        base=ModelFile(**{**BASE, **base}),
        hyperparameters=Hyperparameters(**{"lr": 0.004, **(hyperparameters or {})}),
        parametrization=Parametrization(optimizer=optimizer),
    )


def target(**changes: Any) -> ModelFile:
    return ModelFile(**{**BASE, "hidden_size": 512, "num_attention_heads": 32, "ffn_hidden_size": 2048, **changes})


def test_head_size_ratios_and_depth_are_those_of_the_target_that_is_given() -> None:
    large = target(num_layers=7, ffn_hidden_size=1536)
    for width, model in models_for(large, recipe(), widths_for(large, recipe(), 4)).items():
        assert model.hidden_size == width
        assert model.head_size == large.head_size == 16
        assert model.ffn_size == 3 * width
        assert model.num_layers == 7


def test_widths_double_from_the_smallest_that_keeps_whole_heads() -> None:
    assert widths_for(target(), recipe(), 4) == [32, 64, 128, 256]
    grouped = target(group_query_attention=True, num_query_groups=4)
    assert widths_for(grouped, recipe(group_query_attention=True, num_query_groups=2), 2) == [128, 256]


def test_what_base_and_target_share_stays_fixed() -> None:
    fixed = target(ffn_hidden_size=256)
    assert {model.ffn_size for model in models_for(fixed, recipe(), [32, 64, 128]).values()} == {256}
    few = target(group_query_attention=True, num_query_groups=2)
    models = models_for(few, recipe(group_query_attention=True, num_query_groups=2), [32, 64, 128])
    assert {model.query_groups for model in models.values()} == {2}


def test_heads_per_group_stay_where_groups_grow() -> None:
    model = at_width(
        target(group_query_attention=True, num_query_groups=8),
        recipe(group_query_attention=True, num_query_groups=1),
        128,
    )
    assert (model.num_attention_heads, model.query_groups) == (8, 2)


def test_a_width_that_cannot_be_built_says_what_would_fit() -> None:
    with pytest.raises(InputError, match=r"--widths 40.*multiple of 16"):
        at_width(target(), recipe(), 40)


def test_heads_that_grow_grow_over_the_widths_of_a_check() -> None:
    large = target(num_attention_heads=4)
    models = models_for(large, recipe(), widths_for(large, recipe(), 3))
    assert [(w, m.num_attention_heads, m.head_size) for w, m in models.items()] == [
        (32, 4, 8),
        (64, 4, 16),
        (128, 4, 32),
    ]


@pytest.mark.parametrize("widths", [[64, 128, 256, 512], [32, 64, 128, 256], [16, 32, 64, 128]])
def test_heads_become_four_times_as_large_over_any_four_widths_where_their_number_grows_too(widths: list[int]) -> None:
    found = [m.head_size for m in models_for(target(num_attention_heads=8), recipe(), widths).values()]
    assert found[-1] == 4 * found[0]


@pytest.mark.parametrize(("experts", "chosen"), [((8, 64), (2, 4)), ((4, 16), (2, 4)), ((128, 384), (8, 8))])
def test_the_share_of_tokens_that_an_expert_sees_differs_where_it_does(
    experts: tuple[int, int], chosen: tuple[int, int]
) -> None:
    own: dict[str, Any] = {"add_bias_linear": False, "moe_ffn_hidden_size": 128}
    base = recipe(num_experts=experts[0], moe_router_topk=chosen[0], **own)
    small, small_recipe = condensed(target(num_experts=experts[1], moe_router_topk=chosen[1], **own), base)
    shares = [m.moe_router_topk / (m.num_experts or 1) for m in (small_recipe.megatron_base, small)]
    assert shares[1] < shares[0]


def test_number_and_size_of_heads_grow_in_turn_where_both_do() -> None:
    large = target(num_attention_heads=8)
    found = [(m.num_attention_heads, m.head_size) for m in models_for(large, recipe(), [64, 128, 256, 512]).values()]
    assert found == [(4, 16), (4, 32), (8, 32), (8, 64)]


# ---- what is cut ---------------------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "num_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "group_query_attention": True,
    "num_query_groups": 8,
    "ffn_hidden_size": 28672,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 128256,
    "seq_length": 8192,
}
NARROW = {"hidden_size": 1024, "num_attention_heads": 8, "num_query_groups": 1, "ffn_hidden_size": 3584}
GPT3: dict[str, Any] = {"vocab_size": 50257, "seq_length": 2048}


def pair(target: dict[str, Any], base: dict[str, Any], **recipe: Any) -> tuple[ModelFile, Recipe]:
    tuned = Recipe(base=ModelFile(**{**target, **base}), hyperparameters=Hyperparameters(lr=0.004), **recipe)
    return ModelFile(**target), tuned


def gpt3(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {**GPT3, "num_layers": layers, "hidden_size": width, "num_attention_heads": heads}


PHI = {**GPT3, "num_layers": 32, "position_embedding_type": "rope", "rotary_percent": 0.4}
TARGETS: dict[str, tuple[ModelFile, Recipe]] = {
    "heads of one channel": pair(gpt3(4, 128, 128), {"hidden_size": 64, "num_attention_heads": 64}),
    "heads of one channel, few of which stay": pair(
        {**gpt3(4, 60, 48), "kv_channels": 1}, {"hidden_size": 20, "num_attention_heads": 20}
    ),
    "heads that become larger and turn in part": pair(
        {**PHI, "hidden_size": 2560, "num_attention_heads": 32, "kv_channels": 80, "ffn_hidden_size": 10240},
        {"hidden_size": 2048, "kv_channels": 64, "ffn_hidden_size": 8192},
    ),
    "GPT-3 125M": pair(gpt3(12, 768, 12), {"hidden_size": 256, "num_attention_heads": 4}),
    "GPT-3 6.7B": pair(gpt3(32, 4096, 32), {"hidden_size": 256, "num_attention_heads": 2}),
    "GPT-3 175B": pair(gpt3(96, 12288, 96), {"hidden_size": 256, "num_attention_heads": 2}),
    "175B from itself": pair(gpt3(96, 12288, 96), {}),
    "70B, groups grow": pair(LLAMA, NARROW),
    "70B, groups stay": pair(LLAMA, {**NARROW, "num_query_groups": 8}),
    "70B, ffn stays": pair(LLAMA, {**NARROW, "ffn_hidden_size": 28672}),
    "70B, heads become larger": pair(LLAMA, {"hidden_size": 1024, "ffn_hidden_size": 3584}),
    "70B, both": pair(LLAMA, {**NARROW, "num_attention_heads": 32, "num_query_groups": 4}),
    "heads of 256, wider than the stream": pair(
        {**LLAMA, "hidden_size": 3584, "num_attention_heads": 16, "kv_channels": 256},
        {"hidden_size": 1792, "num_attention_heads": 8, "num_query_groups": 4},
    ),
    "one head, one layer": pair(
        {**GPT3, "num_layers": 1, "hidden_size": 512, "num_attention_heads": 1}, {"hidden_size": 64}
    ),
    "a huge ffn": pair(
        {**gpt3(12, 512, 8), "ffn_hidden_size": 10**6},
        {"hidden_size": 64, "num_attention_heads": 1, "ffn_hidden_size": 256},
    ),
}


@pytest.mark.parametrize(
    ("name", "tensor_parallel"),
    [(name, size) for name, (model, _) in TARGETS.items() for size in (1, 2) if model.query_groups % size == 0],
)
def test_a_check_of_any_target_is_cheap(name: str, tensor_parallel: int) -> None:
    """The predicted cost stands for the time: a core does some 3e10 FLOPs, or 2e5 calls, in a second."""
    whole, tuned = TARGETS[name]
    small, here = condensed(whole, tuned, tensor_parallel=tensor_parallel)
    widths, remarks = usual_widths(small, here, tensor_parallel=tensor_parallel)
    assert (widths[-1], remarks) == (8 * widths[0], [])
    quick, standard = Expense(), Expense()
    for model in models_for(small, here, widths).values():
        shapes = [entry.shape for entry in here.plan(model).entries]
        quick += expense_of_run(shapes, EARLY, tokens=model.seq_length) * (SEEDS + REFERENCE_SEEDS + CONTROL_SEEDS)
        standard += expense_of_run(shapes, LATE, tokens=model.seq_length) * (SEEDS + REFERENCE_SEEDS)
    assert quick.flops < 8e11, f"{quick.flops:.3g}"
    assert quick.calls < 5e6, f"{quick.calls:.3g}"
    assert standard.flops < 4e12, f"{standard.flops:.3g}"
    assert standard.calls < 2e7, f"{standard.calls:.3g}"
    # Of all layers one model may be wider, see `run._Deep`.
    assert at_width(small, here, 2 * widths[-1]).hidden_size == 2 * widths[-1]


def test_a_target_with_layers_of_its_own_is_refused_by_name() -> None:
    tensor = CustomTensor(name="decoder.scale", fan_out="hidden_size", start=1.0)
    model = gpt(custom_tensors=(tensor,))
    with pytest.raises(InputError, match="custom_tensors: a check has no layers of your own"):
        condensed(model, recipe_for(model))


def grows(base: ModelFile, target: ModelFile) -> dict[str, bool]:
    return {key: getattr(base, key) != getattr(target, key) for key in DIMENSIONS}


DIMENSIONS = ("num_attention_heads", "head_size", "query_groups", "ffn_size")


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "175B from itself"])
def test_what_grows_and_what_stays_is_as_between_base_and_target(name: str) -> None:
    whole, tuned = TARGETS[name]
    small, here = condensed(whole, tuned)
    expected = grows(tuned.megatron_base, whole)
    assert grows(here.megatron_base, small) == expected
    narrow, wide = (models_for(small, here, widths_for(small, here, 4))[w] for w in widths_for(small, here, 4)[::3])
    assert grows(narrow, wide) == expected
    assert here.megatron_base.hidden_size <= 2 * narrow.hidden_size


def test_a_base_as_wide_as_the_target_is_moved_among_the_widths() -> None:
    whole, tuned = TARGETS["175B from itself"]
    small, here = condensed(whole, tuned)
    assert here.megatron_base.hidden_size == 64
    ratios = [
        here.plan(m).by_name["decoder.layers.0.mlp.linear_fc2.weight"].width_ratio
        for m in models_for(small, here, [32, 64, 128]).values()
    ]
    assert ratios == [0.5, 1, 2]


def test_layers_that_a_recipe_tells_apart_are_all_trained_and_keep_their_factors() -> None:
    own = ({"match": "decoder.layers.77.*", "lr_mult": 2.0}, {"match": "decoder.layers.?.mlp.*", "lr_mult": 3.0})
    whole, tuned = pair(LLAMA, NARROW, per_parameter=own)
    small, here = condensed(whole, tuned)
    plan = here.plan(at_width(small, here, 64))
    assert plan.num_layers == DEPTH
    rates = [plan[f"decoder.layers.{layer}.mlp.linear_fc1.weight"].lr / plan.lr for layer in range(DEPTH)]
    assert rates == [3.0, 3.0, 1.0, 2.0]
    full, there = condensed(whole, tuned, depth=None)
    at_full = there.plan(at_width(full, there, 64))
    assert at_full.num_layers == 80
    assert at_full["decoder.layers.77.mlp.linear_fc1.weight"].lr == 2 * at_full.lr


def test_a_depth_that_differs_from_the_bases_still_does_and_stages_share_it() -> None:
    whole, tuned = pair(gpt3(96, 12288, 96), {"num_layers": 32, "hidden_size": 256, "num_attention_heads": 2})
    small, here = condensed(whole, tuned, stages=3)
    assert (small.num_layers, here.megatron_base.num_layers) == (6, 3)


@pytest.mark.parametrize(("layers", "base_layers"), [(96, 2), (96, 4), (96, 48), (8, 4), (2, 1), (4, 12)])
def test_a_rule_of_depth_has_something_to_say_in_a_check(layers: int, base_layers: int) -> None:
    whole, tuned = pair(
        gpt3(layers, 12288, 96), {"num_layers": base_layers, "hidden_size": 256, "num_attention_heads": 2}
    )
    tuned = tuned.model_copy(update={"parametrization": Parametrization(depth=Depth())})
    small, here = condensed(whole, tuned)
    plan = here.plan(at_width(small, here, 64))
    assert [stack.ratio for stack in plan.deepened.values()] != [1.0]
    assert {entry.depth_ratio for entry in plan.entries} - {1.0}


# ---- stress --------------------------------------------------------------------------------------------------------


def test_stress_makes_mistakes_visible_and_keeps_what_is_transferred() -> None:
    tuned = recipe(hyperparameters={"output_multiplier": 3.0, "min_lr": 0.0, "weight_decay": 0.1})
    stress = stressed(tuned, steps=8, eps=1e-4)
    h = stress.hyperparameters
    assert (h.lr, h.adam_eps) == (0.004, 1e-4)
    assert h.min_lr == pytest.approx(FLOOR * h.lr)
    assert h.lr * h.weight_decay * 8 > 0.5
    assert (stress.base, stress.per_parameter, stress.parametrization) == (
        tuned.base,
        tuned.per_parameter,
        tuned.parametrization,
    )
    assert (h.output_multiplier, h.init_method_std) == (3.0, tuned.hyperparameters.init_method_std)


def test_a_learning_rate_that_moves_nothing_is_raised_and_a_larger_floor_stays() -> None:
    tuned = recipe(hyperparameters={"lr": 1e-6, "min_lr": 5e-7})
    h = stressed(tuned, steps=8).hyperparameters
    assert h.lr == pytest.approx(0.02 / 8)
    assert h.min_lr == pytest.approx(h.lr / 2)


@pytest.mark.parametrize(
    ("key", "value", "least", "most"),
    [
        ("lr", 3.0, 0.0025, 0.005),
        ("init_method_std", 1e-4, 0.01, 0.1),
        ("init_method_std", 1.0, 0.01, 0.1),
        ("output_multiplier", 0.01, 0.1, 10),
        ("embedding_multiplier", 100, 0.1, 10),
        ("attention_multiplier", 1e-6, 0.1, 10),
        ("adam_eps", 1.0, 1e-5, 1e-3),
        ("weight_decay", 100.0, 1, 50),
        ("clip_grad", 1e-9, 0.01, 1),
    ],
)
def test_values_at_which_nothing_trains_are_brought_to_where_it_does(
    key: str, value: float, least: float, most: float
) -> None:
    h = stressed(recipe(hyperparameters={key: value}), steps=8, eps=1e-4).hyperparameters
    assert least <= getattr(h, key) <= most


def test_overrides_are_kept_within_bounds_and_zeros_stay() -> None:
    own = ({"match": "*", "lr_mult": 1e4, "init_mult": 0.0, "multiplier": 1e-5},)
    tuned = recipe().model_copy(update={"per_parameter": tuple(PerParameter(**one) for one in own)})
    [found] = stressed(tuned, steps=8).per_parameter
    assert (found.lr_mult, found.init_mult, found.multiplier) == (10.0, 0.0, 0.1)


def test_sgds_learning_rate_is_brought_to_where_gradients_move_weights() -> None:
    tuned = recipe("sgd", {"lr": 0.5})
    assert stressed(tuned, steps=8).hyperparameters.lr == 0.5
    assert stressed(tuned, steps=8, rate=0.1).hyperparameters.lr == 0.1
    assert stressed(tuned, steps=8, rate=8.0).hyperparameters.lr == 2.0


@pytest.mark.parametrize("rotary_percent", [1e-6, 0.01, 0.1, 0.3, 0.9])
@pytest.mark.parametrize(("heads", "channels"), [((4, 16), (6, 6)), ((8, 8), (4, 32)), ((7, 7), (112, 16))])
def test_whatever_share_of_heads_turns_there_is_a_family(
    heads: tuple[int, int], channels: tuple[int, int], rotary_percent: float
) -> None:
    own = {"position_embedding_type": "rope", "rotary_percent": rotary_percent}
    base = recipe(num_attention_heads=heads[0], kv_channels=channels[0], **own)
    target = {**BASE, **own, "hidden_size": 256, "ffn_hidden_size": 1024}
    model = ModelFile(**{**target, "num_attention_heads": heads[1], "kv_channels": channels[1]})
    small, small_recipe = condensed(model, base)
    widths = widths_for(small, small_recipe, WIDTHS)
    assert all(model.rotary_percent in (0.5, 1.0) for model in models_for(small, small_recipe, widths).values())


def test_heads_that_fit_nowhere_are_refused_and_not_looked_for_without_end() -> None:
    base = recipe(hidden_size=2560, num_attention_heads=25, kv_channels=4)
    target = ModelFile(**{**BASE, "hidden_size": 2560, "num_attention_heads": 8, "kv_channels": 96})
    with pytest.raises(InputError, match=r"num_attention_heads, num_query_groups, kv_channels: .* whole at no width"):
        widths_for(*condensed(target, base, tensor_parallel=8), WIDTHS, tensor_parallel=8)
