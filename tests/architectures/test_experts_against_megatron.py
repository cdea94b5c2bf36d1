"""Layers of experts against Megatron-Core's own, built on the CPU: names, shapes, what they compute, and gradients."""

import math
from typing import Any

import pytest
import torch
from support.planned import built
from support.processes import run_ranks
from support.shapes import batch, gpt
from support.stock import Layout

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import cross_entropy
from mup_megatron.architectures.plain.decoder import PlainDecoder
from mup_megatron.architectures.plain.experts import Router
from mup_megatron.architectures.registry import shapes_of

_E8: dict[str, Any] = {"num_experts": 8, "moe_ffn_hidden_size": 24}
_PLAIN: dict[str, Any] = {**_E8, "add_bias_linear": False}
_SHARED: dict[str, Any] = {**_PLAIN, "moe_shared_expert_intermediate_size": 40}
_SIGMOID: dict[str, Any] = {**_PLAIN, "moe_router_score_function": "sigmoid"}
CASES: dict[str, dict[str, Any]] = {
    "plain": _PLAIN,
    "an MLP's size": {"num_experts": 8},
    "biases": _E8,
    "gated, RMSNorm": {
        **_PLAIN,
        "swiglu": True,
        "normalization": "RMSNorm",
        "untie_embeddings_and_output_weights": True,
    },
    "shared": _SHARED,
    "shared, gate": {**_SHARED, "moe_shared_expert_gate": True, "swiglu": True, "qk_layernorm": True},
    "every second layer": {**_SHARED, "moe_layer_freq": 2},
    "first dense": {**_SHARED, "moe_layer_freq": [0, 1]},
    "one expert": {
        **_PLAIN,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "softmax over all": {**_PLAIN, "moe_router_pre_softmax": True, "moe_aux_loss_coeff": 0.5},
    "auxiliary loss": {**_PLAIN, "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1},
    "of each sequence": {
        **_SIGMOID,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.5,
        "moe_router_topk_scaling_factor": 1.5,
    },
    "two of them": {
        **_PLAIN,
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.25, 0.5],
    },
    "sinkhorn": {**_PLAIN, "moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
    "bias on scores": {**_SIGMOID, "moe_router_enable_expert_bias": True, "moe_router_topk": 3},
    "groups": {**_SIGMOID, "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 4},
    "grouped": {**_SHARED, "moe_grouped_gemm": True},
}

Computed = tuple[dict[str, tuple[int, ...]], dict[str, torch.Tensor], float, dict[str, torch.Tensor]]
"""Shapes, the state, the loss, and gradients."""


def live_models(models: dict[str, ModelFile]) -> dict[str, Computed]:
    """In a rank: each built model, with one backward pass."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    found = {}
    for case, model in models.items():
        _, _, [chunk] = built(model, Layout())
        with torch.no_grad():
            for name, buffer in chunk.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.copy_(0.1 * torch.arange(8))
            for name, parameter in chunk.named_parameters():
                if ".router." in name:
                    parameter.mul_(10)  # from 0.02, at which all experts are alike
        state = {name: value.detach().clone() for name, value in chunk.state_dict().items() if value is not None}
        tokens, labels = batch(model, 0)
        shapes = {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}
        if model.add_bias_linear:  # at which Megatron's local experts stop: they add to a view in place
            found[case] = (shapes, state, math.nan, {})
            continue
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
        logits = chunk(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        loss = cross_entropy(logits, labels)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in chunk.named_parameters() if p.grad is not None}
        found[case] = (shapes, state, loss.item(), gradients)
    return found


def models(case: str, **changes: Any) -> ModelFile:
    return gpt(1, **CASES[case], **changes)


@pytest.fixture(scope="module")
def live() -> dict[str, Computed]:
    [found] = run_ranks(live_models, 1, {case: models(case) for case in CASES})
    return found


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_the_live_model(case: str, live: dict[str, Computed]) -> None:
    model = models(case)
    assert {t.name: t.shape for t in shapes_of(model, model)[1].tensors} == live[case][0]


@pytest.mark.parametrize("case", [case for case, changes in CASES.items() if "add_bias_linear" in changes])
def test_plain_torch_computes_the_same(case: str, live: dict[str, Computed]) -> None:
    _, state, loss, gradients = live[case]
    model = models(case)
    plain = PlainDecoder(model, dtype=torch.float32)
    own = {name: value for name, value in state.items() if "_extra_state" not in name}
    missing, unexpected = plain.load_state_dict(own, strict=False)
    assert set(missing) | set(unexpected) <= {"output_layer.weight"}
    tokens, labels = batch(model, 0)
    found = cross_entropy(plain(tokens), labels)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    for name, parameter in plain.named_parameters():
        expected = gradients.get(name)
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(given, expected, rtol=2e-4, atol=2e-6, msg=name)


def test_the_bias_on_scores_moves_against_the_tokens() -> None:
    router = Router(models("bias on scores"))
    torch.nn.init.normal_(router.weight)
    router(torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0)))
    seen = router.get_buffer("seen").clone()
    assert seen.sum() == 2 * 12 * 3
    router.rebalance()
    expected = 1e-3 * (seen.mean() - seen).sign()
    assert router.get_buffer("expert_bias").equal(expected)
    assert not router.get_buffer("seen").any()


def test_transformer_engine_names() -> None:
    model = models("grouped", transformer_impl="transformer_engine", swiglu=True)
    names = {t.name: t.shape for t in shapes_of(model, model)[1].tensors if ".layers.1.mlp." in t.name}
    mlp = "decoder.layers.1.mlp"
    assert names == {
        f"{mlp}.router.weight": (8, 32),
        **{f"{mlp}.experts.linear_fc1.weight{index}": (48, 32) for index in range(8)},
        **{f"{mlp}.experts.linear_fc2.weight{index}": (32, 24) for index in range(8)},
        f"{mlp}.shared_experts.linear_fc1.weight": (80, 32),
        f"{mlp}.shared_experts.linear_fc2.weight": (32, 40),
    }
