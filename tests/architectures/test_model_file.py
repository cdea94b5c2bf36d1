"""Model files: Megatron-LM's argument names, meanings and defaults; what is wrong is said with key and remedy."""

import math
from pathlib import Path
from typing import Any

import pytest

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import load_model_file, model_file
from mup_megatron.errors import InputError

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "seq_length": 32,
}


def _small(**changes: Any) -> ModelFile:
    return model_file({**SMALL, **changes}, source="small.yaml")


def test_derived_sizes_are_megatrons() -> None:
    model = _small()
    assert (model.ffn_size, model.head_size, model.query_groups, model.positions) == (256, 16, 4, 32)
    assert model.tied
    # SwiGLU: two thirds of 4·hidden, in steps of 64.
    assert _small(hidden_size=4096, swiglu=True).ffn_size == 10880
    assert _small(swiglu=True, ffn_hidden_size=100).ffn_size == 100
    assert _small(kv_channels=24).head_size == 24
    assert _small(group_query_attention=True, num_query_groups=2).query_groups == 2
    # Megatron reads num_query_groups only with group_query_attention.
    assert _small(num_query_groups=2).query_groups == 4
    assert _small(max_position_embeddings=128).positions == 128
    assert not _small(untie_embeddings_and_output_weights=True).tied


@pytest.mark.parametrize(
    ("vocab", "multiple", "tensor_parallel", "padded"),
    [(50257, 128, 1, 50304), (50257, 128, 8, 51200), (128, 128, 1, 128), (129, 128, 1, 256), (48, 1, 1, 48)],
)
def test_the_vocabulary_is_padded_as_megatron_pads_it(
    vocab: int, multiple: int, tensor_parallel: int, padded: int
) -> None:
    model = _small(vocab_size=vocab, make_vocab_size_divisible_by=multiple)
    assert model.padded_vocab_size(tensor_parallel) == padded


def test_dropout_is_off_unless_asked_for() -> None:
    assert (_small().attention_dropout, _small().hidden_dropout) == (0.0, 0.0)
    assert _small(hidden_dropout=0.1).hidden_dropout == 0.1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"hiden_size": 64}, r"hiden_size: unknown key\. Did you mean 'hidden_size'\?"),
    "Megatron's dashes": ({"num-layers": 2}, r"num-layers: unknown key\. Did you mean 'num_layers'\?"),
    "unlike any key": ({"zzz": 1}, r"zzz: unknown key\. Known keys: num_layers, "),
    "word for a number": ({"num_layers": "two"}, r"num_layers: should be a valid integer, found 'two'"),
    "number in quotes": ({"num_layers": "2"}, r"num_layers: should be a valid integer, found '2'"),
    "fraction of a layer": ({"num_layers": 2.5}, r"num_layers: .*integer.*, found 2\.5"),
    "truth for a number": ({"num_layers": True}, r"num_layers: should be a valid integer, found True"),
    "number for truth": ({"swiglu": 1}, r"swiglu: should be a valid boolean, found 1"),
    "nothing": ({"hidden_size": None}, r"hidden_size: should be a valid integer, found None"),
    "zero": ({"hidden_size": 0}, r"hidden_size: should be greater than 0, found 0"),
    "negative": ({"ffn_hidden_size": -1}, r"ffn_hidden_size: should be greater than 0, found -1"),
    "NaN": ({"init_method_std": math.nan}, r"init_method_std: must be a finite number, found nan"),
    "infinite": ({"norm_epsilon": math.inf}, r"norm_epsilon: must be a finite number, found inf"),
    "no such norm": ({"normalization": "BatchNorm"}, r"normalization: should be 'LayerNorm' or 'RMSNorm', found"),
    "dropout of 1": ({"hidden_dropout": 1.0}, r"hidden_dropout: should be less than 1, found 1"),
    "heads that don't divide": (
        {"num_attention_heads": 5},
        r"hidden_size 64 is not divisible by num_attention_heads 5\. Change one of them, or give kv_channels\.",
    ),
    "groups that don't divide": (
        {"group_query_attention": True, "num_query_groups": 3},
        r"num_attention_heads 4 is not divisible by num_query_groups 3\. Choose a divisor",
    ),
    "too few positions": (
        {"max_position_embeddings": 16},
        r"max_position_embeddings 16 is smaller than seq_length 32\. Raise it, or shorten",
    ),
    "rotary with an odd head": (
        {"position_embedding_type": "rope", "kv_channels": 15},
        r"kv_channels 15 is odd, which rotary embeddings cannot use\. Make it even\.",
    ),
    "a size of experts alone": (
        {"moe_ffn_hidden_size": 8},
        r"moe_ffn_hidden_size: without num_experts Megatron does not read it\. Add that key, or remove this\.",
    ),
    "more than all experts": (
        {"num_experts": 2, "moe_router_topk": 4},
        r"moe_router_topk 4 is more than num_experts 2\.",
    ),
    "another number of layers": (
        {"num_experts": 8, "moe_layer_freq": [0, 1, 1]},
        r"moe_layer_freq has 3 layers, and num_layers is 2\. Give one for each layer\.",
    ),
    "no layer with experts": ({"num_experts": 8, "moe_layer_freq": "[0]*2"}, r"moe_layer_freq: no layer has experts\."),
    "a pattern of other things": (
        {"num_experts": 8, "moe_layer_freq": "[0]*x"},
        r"moe_layer_freq: '\[0\]\*x' is neither",
    ),
    "shared experts with biases": (
        {"num_experts": 8, "moe_shared_expert_intermediate_size": 8},
        r"moe_shared_expert_intermediate_size: shared experts have no biases\. Set add_bias_linear to false\.",
    ),
    "a gate of nothing": (
        {"num_experts": 8, "moe_shared_expert_gate": True},
        r"moe_shared_expert_gate: without moe_shared_expert_intermediate_size Megatron does not read it",
    ),
    "a softmax of one": (
        {"num_experts": 8, "moe_router_topk": 1},
        r"moe_router_topk 1: the softmax over the one that is",
    ),
    "a bias on a softmax": (
        {"num_experts": 8, "moe_router_enable_expert_bias": True},
        r"moe_router_enable_expert_bias: it needs another moe_router_score_function than softmax, as sigmoid\.",
    ),
    "groups without their number": (
        {"num_experts": 8, "moe_router_group_topk": 2},
        r"moe_router_group_topk: moe_router_num_groups is missing\. Give it\.",
    ),
    "groups that don't divide the experts": (
        {"num_experts": 8, "moe_router_num_groups": 3, "moe_router_group_topk": 2},
        r"moe_router_num_groups 3 with moe_router_group_topk 2: it has to divide num_experts 8",
    ),
    "two ways to balance and one coefficient": (
        {"num_experts": 8, "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": 0.1},
        r"moe_aux_loss_coeff: give one for each of moe_router_load_balancing_type\.",
    ),
    "sinkhorn with a loss": (
        {"num_experts": 8, "moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.1},
        r"moe_router_load_balancing_type sinkhorn has no auxiliary loss\. Set moe_aux_loss_coeff to 0\.",
    ),
    "more experts than its groups have": (
        {"num_experts": 8, "moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 1},
        r"moe_router_topk 4 is more than the experts of moe_router_group_topk 1 of 4 groups\.",
    ),
    "legacy experts with biases": (
        {"num_experts": 8, "moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True},
        r"moe_use_legacy_grouped_gemm: such experts have no biases\. Set add_bias_linear to false\.",
    ),
    "an update of no bias": (
        {"num_experts": 8, "moe_router_bias_update_rate": 0.01},
        r"moe_router_bias_update_rate: without moe_router_enable_expert_bias Megatron does not read it",
    ),
    "a grouping of nothing": (
        {"num_experts": 8, "moe_use_legacy_grouped_gemm": True},
        r"moe_use_legacy_grouped_gemm: without moe_grouped_gemm Megatron does not read it",
    ),
    "experts without end": ({"num_experts": 10**9}, r"num_experts 1000000000 in 2 layers: more than 100000 experts"),
    "experts' keys without experts": (
        {"moe_router_topk": 4},
        r"moe_router_topk: without num_experts Megatron does not read it\. Add that key, or remove this\.",
    ),
    "a layer that is neither": (
        {"num_experts": 8, "moe_layer_freq": [1, 2]},
        r"moe_layer_freq\.1: should be less than",
    ),
    "truth for a layer": ({"num_experts": 8, "moe_layer_freq": [0, True]}, r"moe_layer_freq\.1: should be a valid int"),
    "no layers": ({"num_experts": 8, "moe_layer_freq": 0}, r"moe_layer_freq: should be greater than 0, found 0"),
    "no way to balance": (
        {"num_experts": 8, "moe_router_load_balancing_type": [], "moe_aux_loss_coeff": 0.0},
        r"moe_router_load_balancing_type: .* at least 1 item",
    ),
    "an unknown way to balance": (
        {"num_experts": 8, "moe_router_load_balancing_type": "x"},
        r"moe_router_load_balancing_type: should be 'aux_loss'",
    ),
    "a text for a coefficient": (
        {"num_experts": 8, "moe_aux_loss_coeff": "0.1"},
        r"moe_aux_loss_coeff: should be a valid number, found '0\.1'",
    ),
    "truth for a coefficient": (
        {"num_experts": 8, "moe_z_loss_coeff": False},
        r"moe_z_loss_coeff: should be a valid number, found False",
    ),
    "a softmax scale of 0": (
        {"multi_latent_attention": True, "rotary_scaling_factor": 2.0, "mscale_all_dim": -10 / math.log(2)},
        r"mscale_all_dim: should be greater than or equal to 0",
    ),
    "truth for a size": (
        {"custom_tensors": [{"name": "decoder.a", "fan_out": True, "start": 1.0}]},
        r"custom_tensors\.0\.fan_out: should be a valid integer, found True",
    ),
    "an endless start": (
        {"custom_tensors": [{"name": "decoder.a", "fan_out": 1, "start": math.inf}]},
        r"custom_tensors\.0\.start: must be a finite number",
    ),
    "a size beyond every tensor": (
        {"custom_tensors": [{"name": "decoder.a", "fan_out": "9" * 190, "start": 1.0}]},
        r"custom_tensors: '9+…': no tensor has so large a side\.",
    ),
    "a decoder without end": (
        {"architecture": "t5", "decoder_num_layers": 10**9},
        r"decoder_num_layers: should be less than or equal to 10000",
    ),
    "too few buckets": (
        {"architecture": "t5", "position_embedding_type": "relative", "relative_attention_num_buckets": 2},
        r"relative_attention_num_buckets 2: at least 4",
    ),
    "buckets beyond the distance": (
        {"architecture": "t5", "position_embedding_type": "relative", "relative_attention_max_distance": 16},
        r"relative_attention_num_buckets 32: .* below relative_attention_max_distance 16\.",
    ),
    "latent experts": ({"num_experts": 8, "moe_latent_size": 8}, r"moe_latent_size: models with latent experts"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_with_file_key_and_remedy(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(InputError, match=rf"^small\.yaml: {message}") as caught:
        _small(**changes)
    assert "pydantic" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).endswith((".", "?"))


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        _small(num_layers=0, hiden_size=64)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("key", SMALL)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError, match=rf"^m\.yaml: {key}: missing\. Add this key\.$"):
        model_file({k: v for k, v in SMALL.items() if k != key}, source="m.yaml")


@pytest.mark.parametrize("content", [[1, 2], "hidden_size", 3])
def test_what_is_not_a_list_of_keys_is_refused(content: object) -> None:
    with pytest.raises(InputError, match=r"^m\.yaml: expected keys and values, found"):
        model_file(content, source="m.yaml")


def test_the_corrected_twins_are_accepted() -> None:
    _small(num_attention_heads=5, kv_channels=16)
    _small(group_query_attention=True, num_query_groups=2)
    _small(max_position_embeddings=64)
    _small(position_embedding_type="rope", kv_channels=14)


@pytest.mark.parametrize(
    ("changes", "size", "key"),
    [
        ({}, 8, "num_attention_heads 4"),
        ({"group_query_attention": True, "num_query_groups": 2}, 4, "num_query_groups 2"),
        ({"ffn_hidden_size": 250}, 4, "ffn_hidden_size 250"),
    ],
)
def test_tensor_parallelism_that_does_not_divide_is_named(changes: dict[str, Any], size: int, key: str) -> None:
    with pytest.raises(InputError, match=rf"--tensor-model-parallel-size {size} does not divide {key}\. Choose"):
        _small(**changes).require_tensor_parallel(size)
    _small(**changes).require_tensor_parallel(2)


def test_a_file_is_read_and_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("\n".join(f"{key}: {value}" for key, value in SMALL.items()))
    bad.write_text(good.read_text() + "\nnum_layer: 3\n")
    assert load_model_file(good) == ModelFile(**SMALL)
    with pytest.raises(InputError, match=r"bad\.yaml: num_layer: unknown key\. Did you mean 'num_layers'\?"):
        load_model_file(bad)
    with pytest.raises(InputError, match=r"absent\.yaml: no such file"):
        load_model_file(tmp_path / "absent.yaml")


def test_a_model_file_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        _small().hidden_size = 3  # type: ignore[misc]
