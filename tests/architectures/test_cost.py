"""What training costs, against sums worked out from the architecture and not from the list of parameters."""

from pathlib import Path
from typing import Any

import pytest
from support.commands import TARGET

from mup_megatron.architectures.cost import active_parameter_count, parameter_count, training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import load_model_file, model_file

MODELS = Path(__file__).parents[2] / "configs" / "models"
GPT3 = {"125m": 125e6, "350m": 350e6, "760m": 760e6, "1.3b": 1.3e9, "2.7b": 2.7e9, "6.7b": 6.7e9, "13b": 13e9,
        "175b": 175e9}  # fmt: skip


def small(**changes: Any) -> ModelFile:
    return model_file({**TARGET, **changes}, source="small.yaml")


@pytest.mark.parametrize("size", GPT3)
def test_the_gpt3_family_has_its_closed_form_and_its_name(size: str) -> None:
    model = load_model_file(MODELS / f"gpt3_{size}.yaml")
    layers, heads, hidden = model.num_layers, model.num_attention_heads * model.head_size, model.hidden_size
    # Weights 4·h·heads + 8·h²; biases 3·heads + h + 4h + h; two norms of 2h. Embeddings: 50304 tokens, 2048 places.
    per_layer = 4 * hidden * heads + 8 * hidden**2 + 3 * heads + 6 * hidden + 4 * hidden
    assert parameter_count(model) == layers * per_layer + (50304 + 2048) * hidden + 2 * hidden
    assert parameter_count(model) == pytest.approx(GPT3[size], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        # hidden 128, 4 heads of 32, ffn 512, vocabulary 300 → 384, 16 positions. Per layer: qkv 128·384 + 384, proj
        # 128² + 128, fc1 128·512 + 512, fc2 512·128 + 128, norms 512: 198,272. Beside it 384·128 + 16·128 + 256.
        ({}, 198272 + 51456),
        ({"num_layers": 3}, 3 * 198272 + 51456),
        ({"untie_embeddings_and_output_weights": True}, 198272 + 51456 + 384 * 128),
        ({"position_embedding_type": "rope"}, 198272 + 51456 - 16 * 128),
        ({"position_embedding_type": "none"}, 198272 + 51456 - 16 * 128),
        ({"max_position_embeddings": 64}, 198272 + 51456 + 48 * 128),
        ({"normalization": "RMSNorm"}, 198272 + 51456 - 3 * 128),
        ({"add_bias_linear": False}, 198272 + 51456 - (384 + 128 + 512 + 128)),
        ({"add_bias_linear": False, "add_qkv_bias": True}, 198272 + 51456 - (128 + 512 + 128)),
        # One group: keys and values have 2·32 rows in place of 2·128.
        ({"group_query_attention": True}, 198272 + 51456 - 192 * 129),
        # ⌊8/3·128/64⌋·64 = 320: fc1 128·640 + 640, fc2 320·128 + 128.
        ({"swiglu": True}, 198272 + 51456 - 131712 + 82560 + 41088),
        ({"ffn_hidden_size": 100}, 198272 + 51456 - 131712 + 12900 + 12928),
        # Heads of 48: qkv 128·576 + 576, proj 192·128 + 128.
        ({"kv_channels": 48}, 198272 + 51456 - 66048 + 74304 + 24704),
        ({"qk_layernorm": True}, 198272 + 51456 + 4 * 32),
        ({"vocab_size": 385}, 198272 + 51456 + 128 * 128),
    ],
)
def test_every_part_of_a_model_is_counted(changes: dict[str, Any], count: int) -> None:
    assert parameter_count(small(**changes)) == count


def test_flops_are_six_per_weight_and_twelve_per_score() -> None:
    flops = training_flops(small(num_layers=3))
    assert flops.items["attention_projections"] == 6 * 3 * (128 * 384 + 128 * 128)
    # Forward: q·k and the mix of values cost 2 each, for 16 places of 128 channels. Backward twice that.
    assert flops.items["attention_scores"] == 3 * (2 + 2) * 3 * 16 * 128
    assert flops.items["mlp"] == 6 * 3 * (128 * 512 + 512 * 128)
    assert flops.items["readout"] == 6 * 128 * 384
    assert flops.total == sum(flops.items.values())
    assert set(flops.items) == {"attention_projections", "attention_scores", "mlp", "readout"}


def test_flops_of_grouped_queries_gated_mlp_and_other_head_sizes() -> None:
    flops = training_flops(
        small(group_query_attention=True, num_query_groups=2, kv_channels=48, swiglu=True, ffn_hidden_size=320)
    )
    assert flops.items["attention_projections"] == 6 * (128 * (192 + 2 * 96) + 192 * 128)
    # Keys and values are shared by groups; scores are there for every head.
    assert flops.items["attention_scores"] == 12 * 16 * 192
    assert flops.items["mlp"] == 6 * (128 * 640 + 320 * 128)


@pytest.mark.parametrize("size", GPT3)
def test_flops_are_6n_and_attention(size: str) -> None:
    """PaLM, App. B: 6·N + 12·L·H·Q·T for each token; embeddings cost nothing, the readout does."""
    model = load_model_file(MODELS / f"gpt3_{size}.yaml")
    weights = parameter_count(model) - 2048 * model.hidden_size
    attention = 12 * model.num_layers * model.num_attention_heads * model.head_size * 2048
    # Biases and norms, less than one weight in a thousand here, are in N and cost no matrix product.
    assert training_flops(model).total == pytest.approx(6 * weights + attention, rel=1e-3)


def test_tying_changes_parameters_and_no_flops() -> None:
    tied, untied = small(), small(untie_embeddings_and_output_weights=True)
    assert training_flops(tied) == training_flops(untied)
    assert parameter_count(tied) < parameter_count(untied)


def test_experts_count_whole_as_parameters_and_chosen_ones_as_flops() -> None:
    experts = {
        "num_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 96,
        "add_bias_linear": False,
        "swiglu": True,
    }
    shared = {"moe_shared_expert_intermediate_size": 64, "moe_shared_expert_gate": True}
    model = small(**experts, **shared, num_layers=3, moe_layer_freq=[0, 1, 1])
    flops = training_flops(model)
    one = 3 * 128 * 96
    assert flops.items["experts"] == 6 * 2 * (2 * one + 3 * 128 * 64)
    assert flops.items["router"] == 6 * 2 * 128 * (8 + 1)
    assert flops.items["mlp"] == 6 * 3 * 128 * 320
    assert parameter_count(model) - active_parameter_count(model) == 2 * 6 * one
    dense = small(**shared_of(experts), num_layers=3)
    assert parameter_count(model) == parameter_count(dense) + 2 * (8 * one + 3 * 128 * 64 + 128 * 9 - 3 * 128 * 320)


def shared_of(experts: dict[str, Any]) -> dict[str, Any]:
    """Of a model with experts, what one without has as well."""
    return {key: experts[key] for key in ("add_bias_linear", "swiglu")}


def test_nemotron_h_has_its_number_of_parameters_and_megatrons_operations() -> None:
    model = load_model_file(MODELS / "nemotron_h_8b.yaml")
    assert parameter_count(model) == pytest.approx(8.1e9, rel=0.001)
    hidden, inner, states, heads = 4096, 128 * 64, 8 * 128, 128
    # Forward, of a layer and a token, as Megatron reports them: projections, and 7 for a channel's state.
    expected = 2 * hidden * (2 * inner + 2 * states + heads) + 7 * inner * 128 + 2 * inner * hidden
    items = training_flops(model).items
    assert items["mamba_projections"] + items["mamba_scan"] == pytest.approx(24 * 3 * expected)
    assert items["mamba_convolution"] == 24 * 6 * 4 * (inner + 2 * states)
