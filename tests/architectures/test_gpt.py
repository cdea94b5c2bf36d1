"""The parameters of a GPT by name, shape and sides, from its model file alone.

Against live Megatron-Core models: `test_gpt_against_megatron.py`.
"""

from typing import Any

import pytest
from support.shapes import gpt, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import global_name
from mup_megatron.architectures.registry import architecture_of, model_file, remarks_on, shapes_of
from mup_megatron.errors import InputError
from mup_megatron.recipe import PerParameter
from mup_megatron.theory import Constant, Property, Side, Tensor

WORDS = "embedding.word_embeddings.weight"
READOUT_WEIGHT = "output_layer.weight"


def _tensors(model: ModelFile, base: ModelFile | None = None) -> dict[str, Tensor]:
    return {t.name: t for t in shapes_of(base or model, model)[1].tensors}


def _constant(tensor: Tensor) -> float | None:
    return tensor.start.value if isinstance(tensor.start, Constant) else None


def _shapes(**changes: Any) -> dict[str, tuple[int, ...]]:
    return {name: t.shape for name, t in _tensors(gpt(1, num_layers=1, **changes)).items()}


def test_every_parameter_of_a_plain_gpt_in_megatrons_order() -> None:
    layer = "decoder.layers.0."
    assert list(_shapes(untie_embeddings_and_output_weights=True).items()) == [
        ("embedding.word_embeddings.weight", (48, 32)),
        ("embedding.position_embeddings.weight", (12, 32)),
        (f"{layer}input_layernorm.weight", (32,)),
        (f"{layer}input_layernorm.bias", (32,)),
        (f"{layer}self_attention.linear_qkv.weight", (96, 32)),
        (f"{layer}self_attention.linear_qkv.bias", (96,)),
        (f"{layer}self_attention.linear_proj.weight", (32, 32)),
        (f"{layer}self_attention.linear_proj.bias", (32,)),
        (f"{layer}pre_mlp_layernorm.weight", (32,)),
        (f"{layer}pre_mlp_layernorm.bias", (32,)),
        (f"{layer}mlp.linear_fc1.weight", (64, 32)),
        (f"{layer}mlp.linear_fc1.bias", (64,)),
        (f"{layer}mlp.linear_fc2.weight", (32, 64)),
        (f"{layer}mlp.linear_fc2.bias", (32,)),
        ("decoder.final_layernorm.weight", (32,)),
        ("decoder.final_layernorm.bias", (32,)),
        ("output_layer.weight", (48, 32)),
    ]


def test_transformer_engine_fuses_the_norms_into_the_layers_that_read_them() -> None:
    # Its LayerNormColumnParallelLinear calls them layer_norm_weight and layer_norm_bias; Megatron-Core's
    # local spec maps its own names to these in checkpoints (sharded_state_dict_keys_map).
    names = list(_shapes(transformer_impl="transformer_engine"))
    for module in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        for part in ("weight", "bias"):
            assert f"decoder.layers.0.{module}.layer_norm_{part}" in names
    assert "decoder.final_layernorm.weight" in names
    assert not any("input_layernorm" in name or "pre_mlp_layernorm" in name for name in names)


def test_what_each_choice_adds_and_removes() -> None:
    plain = set(_shapes())
    layer = "decoder.layers.0."
    linears = [
        f"{layer}{n}.bias"
        for n in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ]
    norms = [f"{layer}input_layernorm.bias", f"{layer}pre_mlp_layernorm.bias", "decoder.final_layernorm.bias"]
    qk = [f"{layer}self_attention.{n}_layernorm.{part}" for n in "qk" for part in ("weight", "bias")]
    positions = "embedding.position_embeddings.weight"
    assert plain ^ set(_shapes(untie_embeddings_and_output_weights=True)) == {READOUT_WEIGHT}
    assert plain ^ set(_shapes(add_bias_linear=False)) == set(linears)
    assert plain ^ set(_shapes(add_bias_linear=False, add_qkv_bias=True)) == set(linears[1:])
    assert plain ^ set(_shapes(normalization="RMSNorm")) == set(norms)
    assert plain ^ set(_shapes(qk_layernorm=True)) == set(qk)
    for without in ("rope", "none"):
        assert plain ^ set(_shapes(position_embedding_type=without)) == {positions}


def test_shapes_follow_heads_groups_and_gates() -> None:
    layer = "decoder.layers.0."
    shapes = _shapes(num_attention_heads=6, kv_channels=10, group_query_attention=True, num_query_groups=2)
    assert shapes[f"{layer}self_attention.linear_qkv.weight"] == ((6 + 2 + 2) * 10, 32)
    assert shapes[f"{layer}self_attention.linear_proj.weight"] == (32, 60)
    gated = _shapes(swiglu=True)
    assert gated[f"{layer}mlp.linear_fc1.weight"] == (128, 32)
    assert gated[f"{layer}mlp.linear_fc1.bias"] == (128,)
    assert gated[f"{layer}mlp.linear_fc2.weight"] == (32, 64)
    assert _shapes(qk_layernorm=True)[f"{layer}self_attention.q_layernorm.weight"] == (8,)
    assert _shapes(vocab_size=49)[WORDS] == (64, 32)
    assert _shapes(max_position_embeddings=40)["embedding.position_embeddings.weight"] == (40, 32)


def test_which_sides_grow() -> None:
    tensors = _tensors(gpt(1, untie_embeddings_and_output_weights=True))

    def sides(name: str) -> tuple[bool, bool]:
        return tensors[name].fan_in.grows, tensors[name].fan_out.grows

    layer = "decoder.layers.0."
    assert sides(WORDS) == sides("embedding.position_embeddings.weight") == (False, True)
    assert sides(READOUT_WEIGHT) == (True, False)
    for module in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        assert sides(f"{layer}{module}.weight") == (True, True)
        assert sides(f"{layer}{module}.bias") == (False, True)
    assert sides(f"{layer}input_layernorm.weight") == sides("decoder.final_layernorm.bias") == (False, True)


def test_fans_are_those_of_the_whole_matrix() -> None:
    tensors = _tensors(gpt(1, swiglu=True, untie_embeddings_and_output_weights=True))
    fc1 = tensors["decoder.layers.0.mlp.linear_fc1.weight"]
    assert (fc1.fan_in, fc1.fan_out) == (Side(32, grows=True), Side(128, grows=True))
    assert (tensors[WORDS].fan_in.size, tensors[WORDS].fan_out.size) == (48, 32)
    assert (tensors[READOUT_WEIGHT].fan_in.size, tensors[READOUT_WEIGHT].fan_out.size) == (32, 48)
    for tensor in tensors.values():
        if len(tensor.shape) == 2 and Property.EMBEDDING not in tensor.properties:
            assert tensor.shape == (tensor.fan_out.size, tensor.fan_in.size)


def test_constants_start_where_megatron_starts_them() -> None:
    def start(**changes: Any) -> dict[str, float | None]:
        return {name: _constant(tensor) for name, tensor in _tensors(gpt(1, **changes)).items()}

    values = start(qk_layernorm=True)
    assert values["decoder.final_layernorm.weight"] == 1.0
    assert values["decoder.layers.1.self_attention.q_layernorm.weight"] == 1.0
    assert values["decoder.layers.1.mlp.linear_fc1.bias"] == values["decoder.final_layernorm.bias"] == 0.0
    assert values[WORDS] is None
    # Stored as the distance from 1.
    assert start(apply_layernorm_1p=True)["decoder.final_layernorm.weight"] == 0.0


def test_what_writes_into_the_residual_stream() -> None:
    residual = {name for name, t in _tensors(gpt(1)).items() if Property.RESIDUAL in t.properties}
    expected = ("self_attention.linear_proj", "mlp.linear_fc2")
    assert residual == {f"decoder.layers.{i}.{name}.weight" for i in (0, 1) for name in expected}


def test_a_head_size_grows_only_where_base_and_target_differ_in_it() -> None:
    gain = "decoder.layers.0.self_attention.q_layernorm.weight"
    base = gpt(1, qk_layernorm=True)
    assert not _tensors(gpt(4, qk_layernorm=True), base)[gain].fan_out.grows
    assert _tensors(gpt(4, qk_layernorm=True, kv_channels=32), base)[gain].fan_out.grows


def test_the_base_is_named_as_the_target() -> None:
    base = gpt(1, transformer_impl="local")
    target = gpt(2, transformer_impl="transformer_engine")
    base_shape, target_shape = shapes_of(base, target)
    assert [t.name for t in base_shape.tensors] == [t.name for t in target_shape.tensors]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("swiglu", True),
        ("normalization", "RMSNorm"),
        ("apply_layernorm_1p", True),
        ("qk_layernorm", True),
        ("position_embedding_type", "rope"),
        ("add_bias_linear", False),
        ("untie_embeddings_and_output_weights", True),
    ],
)
def test_base_and_target_of_different_architecture_are_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^{key} is .* in the recipe's base but {value} in the target\."):
        shapes_of(gpt(1), gpt(2, **{key: value}))
    shapes_of(gpt(1, **{key: value}), gpt(2, **{key: value}))


def test_a_bias_on_queries_keys_and_values_counts_only_where_not_every_layer_has_one() -> None:
    shapes_of(gpt(1, add_qkv_bias=True), gpt(2))
    without: dict[str, Any] = {"add_bias_linear": False}
    with pytest.raises(InputError, match=r"^add_qkv_bias is True in the recipe's base but False in the target"):
        shapes_of(gpt(1, **without, add_qkv_bias=True), gpt(2, **without))


def test_gpt3_175b_has_its_number_of_parameters() -> None:
    large = {"num_layers": 96, "hidden_size": 12288, "num_attention_heads": 96, "vocab_size": 50257}
    model = ModelFile(**large, seq_length=2048)
    tensors = _tensors(model)
    matrices = sum(t.shape[0] * t.shape[1] for t in tensors.values() if len(t.shape) == 2)
    assert matrices == 96 * 12 * 12288**2 + (50304 + 2048) * 12288


# ---- names on a pipeline stage -------------------------------------------------------------------------------------


def test_local_names_become_global() -> None:
    local = "decoder.layers.1.mlp.linear_fc1.weight"
    assert global_name(local, {"decoder": (4, 5)}, tied=False) == "decoder.layers.5.mlp.linear_fc1.weight"
    assert (
        global_name("decoder.final_layernorm.weight", {"decoder": (4, 5)}, tied=True)
        == "decoder.final_layernorm.weight"
    )
    assert global_name(WORDS, {"decoder": (0, 1)}, tied=True) == WORDS
    # The last stage's copy of a tied table has the readout's name there.
    assert global_name(READOUT_WEIGHT, {"decoder": (6, 7)}, tied=True) == WORDS
    assert global_name(READOUT_WEIGHT, {"decoder": (6, 7)}, tied=False) == READOUT_WEIGHT


def test_a_chunk_renames_to_the_whole_model() -> None:
    whole = [name for name in _tensors(gpt(1, num_layers=4)) if ".layers." in name]
    per_layer = len(whole) // 4
    local = whole[: 2 * per_layer]
    stages = [{"decoder": (0, 1)}, {"decoder": (2, 3)}]
    renamed = [global_name(n, held, tied=True) for held in stages for n in local]
    assert renamed == whole


@pytest.mark.parametrize(
    ("local", "name"),
    [
        ("decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight", "local_experts.5.linear_fc1.weight"),
        ("decoder.layers.0.mlp.experts.linear_fc2.weight3", "linear_fc2.weight7"),
        ("decoder.layers.0.mlp.experts.linear_fc1.bias0", "linear_fc1.bias4"),
        ("decoder.layers.0.mlp.experts.weight1", "weight1"),
    ],
)
def test_the_experts_of_a_rank_have_global_numbers(local: str, name: str) -> None:
    layers = {"decoder": [2, 3]}
    expected = f"decoder.layers.2.mlp.experts.{name}"
    assert global_name(local, layers, tied=False, experts=[4, 5, 6, 7]) == expected
    assert global_name("decoder.layers.1.mlp.linear_fc1.weight", layers, tied=False, experts=[4, 5]) == (
        "decoder.layers.3.mlp.linear_fc1.weight"
    )


MIXED = {"num_experts": 8, "add_bias_linear": False}


@pytest.mark.parametrize(
    ("frequency", "kept", "expected"),
    [
        (1, [0, 2], 1),
        (2, [1, 2, 3], (0, 1, 0)),
        ([0, 0, 1, 1, 1, 1], [0, 5], (0, 1)),
    ],
)
def test_layers_of_both_kinds_are_kept_as_they_are(frequency: Any, kept: list[int], expected: Any) -> None:
    model = model_file({**gpt(1).model_dump(), **MIXED, "num_layers": 6, "moe_layer_freq": frequency}, source="x")
    fewer = architecture_of(model).with_layers(model, kept)
    assert (fewer.num_layers, fewer.moe_layer_freq) == (len(kept), expected)


@pytest.mark.parametrize(
    ("frequency", "layers", "expected"),
    [
        ("[0]*3+[1]*58", 4, (0, 1, 1, 1)),
        ("[0]*3+[1]*58", 30, (0,) * 2 + (1,) * 28),
        ("[1]*58+[0]*3", 4, (1, 1, 1, 0)),
        ("[1]*60+[0]", 2, (1, 0)),
    ],
)
def test_fewer_layers_are_of_every_kind(frequency: str, layers: int, expected: tuple[int, ...]) -> None:
    model = model_file({**gpt(1).model_dump(), **MIXED, "num_layers": 61, "moe_layer_freq": frequency}, source="x")
    assert architecture_of(model).with_depth(model, layers).moe_layer_freq == expected


def test_legacy_experts_are_two_transposed_tensors_of_all() -> None:
    more = {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True, "moe_ffn_hidden_size": 24, "swiglu": True}
    tensors = _tensors(gpt(1, **MIXED, **more))
    for name, shape, sides in (("weight1", (32, 8 * 48), (32, 48)), ("weight2", (8 * 24, 32), (24, 32))):
        tensor = tensors[f"decoder.layers.1.mlp.experts.{name}"]
        assert (tensor.shape, (tensor.fan_in.size, tensor.fan_out.size)) == (shape, sides)
        assert {Property.EXPERT, Property.FOLDED} <= tensor.properties
        assert tensor.share == 2 / 8


FIXED = {**MIXED, "moe_ffn_hidden_size": 16, "moe_shared_expert_gate": True, "moe_router_topk": 2}


def test_what_experts_and_what_chooses_them_get() -> None:
    """Four times as wide, experts of one size, 8 → 32 of them: outputs are folded, fc2 of an expert is not scaled."""
    base = gpt(1, **FIXED, moe_shared_expert_intermediate_size=24)
    target = gpt(4, **{**FIXED, "num_experts": 32}, moe_shared_expert_intermediate_size=96)
    plan, h = recipe_for(base).plan(target), recipe_for(base).hyperparameters
    mlp, sigma = "decoder.layers.1.mlp", h.init_method_std
    expected = {
        # init std, learning rate, eps and weight decay relative to the base's
        "router.weight": (1 / 4, 1 / 4, 1, 4),
        "shared_experts.gate_weight": (1 / 4, 1 / 4, 1, 4),
        "experts.local_experts.31.linear_fc1.weight": (1 / 2, 1 / 4, 1 / 4, 4),
        "experts.local_experts.31.linear_fc2.weight": (1 / 2, 1, 1 / 16, 1),
        "shared_experts.linear_fc1.weight": (1 / 2, 1 / 4, 1 / 4, 4),
        "shared_experts.linear_fc2.weight": (1 / 4, 1 / 4, 1 / 4, 4),
    }
    for name, (std, rate, eps, decay) in expected.items():
        entry = plan[f"{mlp}.{name}"]
        assert entry.init_std == pytest.approx(sigma * std), name  # with 1/√(2L) = 1/2 of what writes into the stream
        assert (entry.lr, entry.eps) == pytest.approx((h.lr * rate, h.adam_eps * eps)), name
        assert entry.weight_decay == pytest.approx(h.weight_decay * decay), name
        assert entry.multiplier == 1.0, name
    assert ".expert (its share of the tokens × 0.25)" in plan[f"{mlp}.experts.local_experts.31.linear_fc1.weight"].rule
    first, second = remarks_on(base, target)
    assert "num_experts 8 → 32, an expert's ffn over hidden_size 0.5 → 0.125" in first
    assert second.startswith("An expert of the target sees 0.25 times the share of tokens")
    assert not remarks_on(base, base)


def test_other_numbers_of_queries_for_each_key_are_told() -> None:
    groups = {"group_query_attention": True, "num_query_groups": 2}
    (remark,) = remarks_on(gpt(1, **groups), gpt(2, **groups))
    assert remark.startswith("Query heads for each key/value group: 2 at the base, 4 here.")
    assert "linear_qkv has one learning rate" in remark
    assert not remarks_on(gpt(1, **groups), gpt(2, **{**groups, "num_query_groups": 4}))


def test_a_router_may_be_hidden() -> None:
    base, target = gpt(1, **MIXED), gpt(4, **MIXED)
    own = recipe_for(base)
    hidden = own.model_copy(update={"parametrization": own.parametrization.model_copy(update={"router": "hidden"})})
    plans = (own.plan(target), hidden.plan(target))
    router = [plan["decoder.layers.0.mlp.router.weight"] for plan in plans]
    assert [str(entry.role) for entry in router] == ["output", "hidden"]
    assert router[1].init_std == pytest.approx(2 * (router[0].init_std or 0))


def test_a_factor_of_what_has_no_input_of_its_own_is_folded() -> None:
    te = {**FIXED, "moe_shared_expert_intermediate_size": 24, "moe_grouped_gemm": True}
    model = gpt(1, **te, transformer_impl="transformer_engine")
    for match in ("*.experts.linear_fc1.weight3", "*.gate_weight"):
        own = recipe_for(model).model_copy(update={"per_parameter": (PerParameter(match=match, multiplier=2.0),)})
        plain, tuned = recipe_for(model).plan(model), own.plan(model)
        for before, after in zip(plain.entries, tuned.entries, strict=True):
            factor = 1.0 if before.rule == after.rule else 2.0
            assert after.multiplier == before.multiplier, before.name
            assert (after.init_std, after.lr) == (before.init_std and factor * before.init_std, factor * before.lr)
        assert tuned.sites == plain.sites
