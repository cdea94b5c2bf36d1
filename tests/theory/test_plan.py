"""A plan: the rules, tensor by tensor, for a whole model."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shapes import HYPERPARAMETERS, gpt, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.recipe import PerParameter, Recipe
from mup_megatron.theory import (
    ModelShape,
    Override,
    Plan,
    PlanError,
    Role,
    Rules,
    Side,
    Tensor,
    Tuned,
    build_plan,
)

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
WORDS = "embedding.word_embeddings.weight"
GAIN = "decoder.final_layernorm.weight"


@st.composite
def model_files(draw: st.DrawFn) -> ModelFile:
    """Any GPT that a model file can describe, small or large."""
    groups = draw(st.integers(1, 8))
    heads = groups * draw(st.integers(1, 4))
    head_size = 2 * draw(st.integers(1, 64))
    return ModelFile(
        num_layers=draw(st.integers(1, 6)),
        hidden_size=draw(st.integers(1, 5000)),
        num_attention_heads=heads,
        kv_channels=head_size,
        group_query_attention=draw(st.booleans()),
        num_query_groups=groups,
        ffn_hidden_size=draw(st.integers(1, 20000)),
        vocab_size=draw(st.integers(1, 60000)),
        seq_length=draw(st.integers(1, 4096)),
        swiglu=draw(st.booleans()),
        normalization=draw(st.sampled_from(["LayerNorm", "RMSNorm"])),
        apply_layernorm_1p=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
        position_embedding_type=draw(st.sampled_from(["learned_absolute", "rope", "none"])),
        add_bias_linear=draw(st.booleans()),
        add_qkv_bias=draw(st.booleans()),
        untie_embeddings_and_output_weights=draw(st.booleans()),
        transformer_impl=draw(st.sampled_from(["local", "transformer_engine"])),
    )


@settings(max_examples=60, deadline=None)
@given(
    model=model_files(),
    optimizer=st.sampled_from(["adam", "sgd"]),
    value=st.floats(1e-6, 1.0),
    alpha=st.floats(0.1, 10.0),
)
def test_at_the_base_every_entry_is_standard_bit_by_bit(
    model: ModelFile, optimizer: str, value: float, alpha: float
) -> None:
    tuned = {"lr": value, "min_lr": 0.0, "init_method_std": value, "weight_decay": value, "adam_eps": value}
    multipliers = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), alpha)
    plan = recipe_for(model, optimizer=optimizer, **tuned, **multipliers).plan(model)
    for entry in plan.entries:
        residual = entry.name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        is_vector = len(entry.shape) == 1
        std = value / math.sqrt(2.0 * model.num_layers) if residual else value
        assert entry.init_std == (None if is_vector else std)
        assert (entry.lr, entry.eps) == (value, value if optimizer == "adam" else None)
        assert entry.weight_decay == (0.0 if is_vector else value)
        multiplied = entry.name.startswith("embedding.") or entry.name == "output_layer.weight"
        assert entry.multiplier == (alpha if multiplied else 1.0)
        assert entry.width_ratio == 1.0
    assert plan.output_multiplier == plan.embedding_multiplier == alpha
    assert plan.softmax_scale == alpha * (1.0 / math.sqrt(model.head_size))


@given(model=model_files())
def test_with_all_multipliers_1_the_base_needs_no_change_at_all(model: ModelFile) -> None:
    ones = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), 1.0)
    plan = recipe_for(model, **ones).plan(model)
    assert not plan.changes_softmax_scale
    assert {entry.multiplier for entry in plan.entries} == {1.0}


@settings(max_examples=40, deadline=None)
@given(base=model_files(), target=model_files(), optimizer=st.sampled_from(["adam", "sgd"]))
def test_the_standard_rule_gives_a_target_the_bases_values(base: ModelFile, target: ModelFile, optimizer: str) -> None:
    sizes = {"num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size"}
    target = base.model_copy(update={key: getattr(target, key) for key in sizes} | {"group_query_attention": False})
    base = base.model_copy(update={"group_query_attention": False})
    plan = recipe_for(base, rule="standard", optimizer=optimizer).plan(target)
    at_base = recipe_for(target, optimizer=optimizer).plan(target)
    keys = ("init_std", "init_value", "multiplier", "lr", "eps", "weight_decay")
    for ours, standard in zip(plan.entries, at_base.entries, strict=True):
        assert [getattr(ours, key) for key in keys] == [getattr(standard, key) for key in keys]
    assert plan.softmax_scale == at_base.softmax_scale
    assert plan.output_multiplier == at_base.output_multiplier


# ---- one ratio per tensor ------------------------------------------------------------------------------------------


def _ratios(plan: Plan) -> dict[str, float]:
    return {entry.name: entry.width_ratio for entry in plan.entries}


def test_ratios_are_of_each_tensor_and_not_of_the_model() -> None:
    target = gpt(4, num_attention_heads=8, ffn_hidden_size=64 * 16)
    ratios = _ratios(recipe_for(gpt(1)).plan(target))
    assert ratios[QKV] == ratios[FC1] == 4  # reads the hidden size
    assert ratios["decoder.layers.0.self_attention.linear_proj.weight"] == 2  # reads all heads
    assert ratios[FC2] == 16  # reads the ffn
    assert ratios[WORDS] == ratios[GAIN] == 1  # reads something finite


def test_a_fixed_ffn_keeps_its_eps_and_its_readers_lr() -> None:
    plan = recipe_for(gpt(1)).plan(gpt(4, ffn_hidden_size=64))
    h = HYPERPARAMETERS
    assert plan[FC1].lr == h["lr"] / 4
    assert plan[FC1].eps == h["adam_eps"]
    assert plan[FC2].lr == h["lr"]
    assert plan[FC2].eps == h["adam_eps"] / 4


def test_a_fused_qkv_takes_the_ratio_of_all_its_rows() -> None:
    base = gpt(1, group_query_attention=True, num_query_groups=1)
    target = gpt(4, group_query_attention=True, num_query_groups=1)
    rows = (16 + 2) / (4 + 2)
    assert recipe_for(base).plan(target)[QKV].eps == pytest.approx(HYPERPARAMETERS["adam_eps"] / rows, rel=1e-15)


def test_roles() -> None:
    untied = {"untie_embeddings_and_output_weights": True, "qk_layernorm": True}
    plan = recipe_for(gpt(1, **untied)).plan(gpt(2, **untied))
    roles = {entry.name: entry.role for entry in plan.entries}
    gain = "decoder.layers.0.self_attention.q_layernorm.weight"
    assert roles[WORDS] == roles["embedding.position_embeddings.weight"] == roles[GAIN] == Role.INPUT
    assert roles["decoder.layers.0.mlp.linear_fc1.bias"] == Role.INPUT
    assert roles[QKV] == roles[FC1] == roles[FC2] == Role.HIDDEN
    assert roles["output_layer.weight"] == Role.OUTPUT
    # A norm over the channels of a head is finite while the head size is, and grows with it.
    assert roles[gain] == Role.SCALAR
    assert plan[gain].lr == HYPERPARAMETERS["lr"]
    assert plan[gain].eps == HYPERPARAMETERS["adam_eps"]
    larger_heads = recipe_for(gpt(1, **untied)).plan(gpt(2, num_attention_heads=4, kv_channels=16, **untied))
    assert larger_heads[gain].role == Role.INPUT
    assert larger_heads[gain].eps == HYPERPARAMETERS["adam_eps"] / 2


@pytest.mark.parametrize("tied", [True, False])
def test_the_readouts_multiplier_is_the_same_tied_or_not(tied: bool) -> None:
    untie = {"untie_embeddings_and_output_weights": not tied}
    plan = recipe_for(gpt(1, **untie)).plan(gpt(4, **untie))
    assert plan.output_multiplier == HYPERPARAMETERS["output_multiplier"] / 4
    assert ("output_layer.weight" in plan.by_name) is not tied
    # The table itself keeps what an embedding gets.
    assert plan[WORDS].multiplier == HYPERPARAMETERS["embedding_multiplier"]
    assert plan[WORDS].lr == HYPERPARAMETERS["lr"]


def test_depth_may_differ_and_counts_as_the_targets() -> None:
    plan = recipe_for(gpt(1, num_layers=2)).plan(gpt(4, num_layers=8))
    last = plan["decoder.layers.7.mlp.linear_fc2.weight"]
    assert last.init_std == pytest.approx(HYPERPARAMETERS["init_method_std"] / 2 / math.sqrt(16), rel=1e-15)
    assert last.lr == plan["decoder.layers.0.mlp.linear_fc2.weight"].lr == HYPERPARAMETERS["lr"] / 4


# ---- overrides -----------------------------------------------------------------------------------------------------


def _with(*overrides: dict[str, Any], optimizer: str = "adam") -> Plan:
    recipe = recipe_for(gpt(1), optimizer=optimizer)
    per_parameter = tuple(PerParameter(**own) for own in overrides)
    return recipe.model_copy(update={"per_parameter": per_parameter}).plan(gpt(4))


def test_an_override_multiplies_what_the_rule_says() -> None:
    plain = _with()
    plan = _with({"match": "*.linear_fc1.weight", "lr_mult": 3.0, "init_mult": 0.5, "multiplier": 2.0})
    assert (plan[FC1].lr, plan[FC1].init_std) == (3 * plain[FC1].lr, plain[FC1].init_std / 2)
    assert plan[FC1].multiplier == 2 * plain[FC1].multiplier
    assert (plan[FC1].eps, plan[FC1].weight_decay) == (plain[FC1].eps, plain[FC1].weight_decay)
    assert plan[FC1].rule == "mup.adam.hidden × per_parameter[0]"
    assert plan[FC2] == plain[FC2]


def test_the_first_match_wins() -> None:
    plan = _with({"match": "decoder.layers.0.*", "lr_mult": 2.0}, {"match": "decoder.*", "lr_mult": 7.0})
    plain = _with()
    assert plan[FC1].lr == 2 * plain[FC1].lr
    assert plan[FC2].lr == 7 * plain[FC2].lr
    assert plan[WORDS].lr == plain[WORDS].lr


def test_a_pattern_is_of_the_whole_name() -> None:
    with pytest.raises(InputError, match=r"per_parameter\[0\] 'linear_fc1' matches no parameter of the target"):
        _with({"match": "linear_fc1", "lr_mult": 2.0})


def test_patterns_mean_the_names_of_the_recipes_base_whatever_the_target_is_built_with() -> None:
    local, fused = (gpt(2, transformer_impl=impl) for impl in ("local", "transformer_engine"))
    own = PerParameter(match="*.linear_*", lr_mult=0.5)
    for base in (gpt(1, transformer_impl="local"), gpt(1, transformer_impl="transformer_engine")):
        recipe = recipe_for(base).model_copy(update={"per_parameter": (own,)})
        learning_rates = [[entry.lr for entry in recipe.plan(target).entries] for target in (local, fused)]
        assert learning_rates[0] == learning_rates[1]


def test_an_override_that_an_earlier_one_shadows_is_no_mistake_but_one_that_matches_nothing_is() -> None:
    _with({"match": "*", "lr_mult": 2.0}, {"match": "*.weight", "lr_mult": 3.0})
    with pytest.raises(InputError, match=r"per_parameter\[1\] '\*\.router\.\*' matches no parameter"):
        _with({"match": "*", "lr_mult": 2.0}, {"match": "*.router.*", "lr_mult": 3.0})


@pytest.mark.parametrize("key", ["multiplier", "init_mult"])
def test_vectors_take_no_multiplier_and_no_init(key: str) -> None:
    with pytest.raises(InputError, match=r"per_parameter\[0\] 'decoder\.final.*': decoder\.final_layernorm\.weight is"):
        _with({"match": "decoder.final_layernorm.*", key: 2.0})
    # The remedy it names.
    plan = _with({"match": "decoder.final_layernorm.*", "lr_mult": 2.0}, {"match": "embedding.*", key: 2.0})
    assert plan[GAIN].lr == 2 * _with()[GAIN].lr


# ---- what cannot be planned ----------------------------------------------------------------------------------------


def _shape(*tensors: Tensor) -> ModelShape:
    return ModelShape(tensors=tensors, hidden_size=8, head_size=8, readout=tensors[0].name)


def _matrix(name: str, fan_in: int = 8) -> Tensor:
    return Tensor(name=name, shape=(8, fan_in), fan_in=Side(fan_in, grows=True), fan_out=Side(8, grows=True))


TUNED = Tuned(
    **{field.name: HYPERPARAMETERS[field.name] for field in dataclasses.fields(Tuned)} | {"embedding_multiplier": 1.0},
)


@pytest.mark.parametrize("key", ["embedding_multiplier", "output_multiplier"])
def test_a_multiplier_of_what_the_model_has_not_is_refused(key: str) -> None:
    shape = dataclasses.replace(_shape(_matrix("layers.0.weight")), readout=None)
    tuned = dataclasses.replace(TUNED, output_multiplier=1.0)
    assert build_plan(shape, shape, tuned, rules_used=Rules()).readout is None
    with pytest.raises(PlanError, match=rf"{key} is 2, and the model has no .* Set it to 1\."):
        build_plan(shape, shape, dataclasses.replace(tuned, **{key: 2.0}), rules_used=Rules())


def test_a_parameter_that_the_base_lacks_is_named() -> None:
    base = _shape(_matrix("decoder.layers.0.weight"))
    target = _shape(_matrix("decoder.layers.0.weight"), _matrix("decoder.layers.0.mlp.router.weight"))
    with pytest.raises(PlanError, match=r"decoder\.layers\.0\.mlp\.router\.weight: the base has no such parameter"):
        build_plan(base, target, TUNED, rules_used=Rules())


def test_a_base_whose_layers_differ_is_refused() -> None:
    base = _shape(_matrix("layers.0.weight"), _matrix("layers.1.weight", fan_in=16))
    deeper = _shape(*base.tensors, _matrix("layers.2.weight"))
    with pytest.raises(PlanError, match=r"layers\.1\.weight: the base has layers of different sizes"):
        build_plan(base, deeper, TUNED, rules_used=Rules())


def test_layers_of_different_sizes_are_matched_one_by_one_at_equal_depth() -> None:
    base = _shape(_matrix("layers.0.weight"), _matrix("layers.1.weight", fan_in=16))
    target = _shape(_matrix("layers.0.weight", fan_in=32), _matrix("layers.1.weight", fan_in=32))
    plan = build_plan(base, target, TUNED, rules_used=Rules())
    assert [entry.width_ratio for entry in plan.entries] == [4.0, 2.0]


def test_a_name_that_the_plan_does_not_know_is_an_error_that_names_it() -> None:
    with pytest.raises(PlanError, match=r"decoder\.layers\.9\.mlp\.linear_fc1\.weight: the plan has no such parameter"):
        _with()["decoder.layers.9.mlp.linear_fc1.weight"]


# ---- as a value ----------------------------------------------------------------------------------------------------


def test_a_plan_does_not_change() -> None:
    plan = _with()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.lr = 1.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan[FC1].lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_json_gives_the_same_plan_back(optimizer: str) -> None:
    plan = _with({"match": "*.linear_fc1.weight", "lr_mult": 1 / 3}, optimizer=optimizer)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_json_has_the_documented_keys() -> None:
    content = _with().to_json()
    assert {"fingerprint", "model", "parameters"} <= set(content)
    assert {"softmax_scale", "embedding_multiplier", "output_multiplier"} <= set(content["model"])
    row = content["parameters"][0]
    documented = "name role shape fan_in fan_out width_ratio init_std init_value multiplier lr eps weight_decay rule"
    assert set(documented.split()) <= set(row)
    assert (row["name"], row["role"], row["shape"]) == (WORDS, "input", (48, 128))


BROKEN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "nothing": lambda plan: {},
    "only rows": lambda plan: {"parameters": plan["parameters"]},
    "an unknown key": lambda plan: plan | {"surprise": 1},
    "an unknown optimizer": lambda plan: plan | {"optimizer": "adagrad"},
    "an incomplete row": lambda plan: plan | {"parameters": [{"name": "x"}]},
    "an unknown role": lambda plan: plan | {"parameters": [plan["parameters"][0] | {"role": "router"}]},
    "another value of an optimizer": lambda plan: plan | {"optimizer_values": {"adam_beta3": 0.9}},
    "an optimizer's values without keys": lambda plan: plan | {"optimizer_values": [0.9, 0.95]},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_json_that_is_no_plan_is_refused(broken: str) -> None:
    with pytest.raises(PlanError, match=r"^Not a plan: "):
        Plan.from_json(BROKEN[broken](_with().to_json()))


def test_the_plan_carries_the_recipes_fingerprint() -> None:
    recipe: Recipe = recipe_for(gpt(1))
    assert recipe.plan(gpt(2)).fingerprint == recipe.fingerprint


def test_rows_say_which_rule_gave_them() -> None:
    assert _with()[FC2].rule == "mup.adam.hidden.residual"
    assert _with(optimizer="sgd")[WORDS].rule == "mup.sgd.input"
    assert recipe_for(gpt(1), rule="standard").plan(gpt(4))[FC1].rule == "standard.adam.hidden"


def test_sgd_has_no_eps() -> None:
    assert {entry.eps for entry in _with(optimizer="sgd").entries} == {None}
    assert _with(optimizer="sgd").optimizer == "sgd"


def test_overrides_are_part_of_the_theory_and_not_of_files() -> None:
    shape = _shape(_matrix("layers.0.weight"))
    plan = build_plan(shape, shape, TUNED, rules_used=Rules(), overrides=[Override(match="*", lr_mult=2.0)])
    assert plan["layers.0.weight"].lr == 2 * TUNED.lr
