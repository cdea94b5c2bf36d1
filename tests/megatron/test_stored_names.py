"""Names of what Megatron stores, as plans have them."""

import pytest

from mup_megatron.megatron.stored_names import Location, places, separate


@pytest.mark.parametrize(
    ("key", "shape", "found"),
    [
        ("output_layer.weight", (8, 4), {"output_layer.weight": ()}),
        ("decoder.final_layernorm.weight", (4,), {"decoder.final_layernorm.weight": ()}),
        ("decoder.layers.3.mlp.linear_fc2.weight", (4, 8), {"decoder.layers.3.mlp.linear_fc2.weight": ()}),
        (
            "decoder.layers.mlp.linear_fc2.bias",
            (2, 4),
            {"decoder.layers.0.mlp.linear_fc2.bias": (0,), "decoder.layers.1.mlp.linear_fc2.bias": (1,)},
        ),
        (
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            (1, 4),
            {
                "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (0,),
                "decoder.layers.0.input_layernorm.weight": (0,),
            },
        ),
        (
            "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
            (2, 4, 4),
            {
                "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight": (0,),
                "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight": (1,),
                "decoder.layers.1.mlp.experts.linear_fc1.weight0": (0,),
                "decoder.layers.1.mlp.experts.linear_fc1.weight1": (1,),
            },
        ),
        (
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
            (2, 1, 4, 4),
            {
                "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight": (0, 0),
                "decoder.layers.0.mlp.experts.linear_fc2.weight0": (0, 0),
                "decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight": (1, 0),
                "decoder.layers.1.mlp.experts.linear_fc2.weight0": (1, 0),
            },
        ),
    ],
)
def test_a_stored_tensor_is_of_each_layer_and_expert_by_every_name_that_a_plan_has(
    key: str, shape: tuple[int, ...], found: dict[str, tuple[int, ...]]
) -> None:
    assert places({key: shape}) == {name: Location(key, at) for name, at in found.items()}


@pytest.mark.parametrize("shape", [(2,), (10**12, 0), (10**4, 10**4, 4)], ids=["too few", "forged", "too many"])
def test_a_tensor_whose_first_dimensions_are_no_layers_and_experts_is_passed_over(shape: tuple[int, ...]) -> None:
    assert places({"decoder.layers.mlp.experts.experts.linear_fc2.weight": shape}) == {}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_bias", "decoder.layers.0.input_layernorm.bias"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.1.self_attention.linear_kv_up_proj.layer_norm_weight",
            "decoder.layers.1.self_attention.kv_layernorm.weight",
        ),
        (
            "decoder.layers.1.mlp.experts.linear_fc2.weight13",
            "decoder.layers.1.mlp.experts.local_experts.13.linear_fc2.weight",
        ),
        ("decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.1.mlp.linear_fc2.weight"),
        (
            "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight",
            "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight",
        ),
    ],
)
def test_norms_and_experts_have_a_name_as_modules_of_their_own(name: str, own: str) -> None:
    assert separate(name) == own
