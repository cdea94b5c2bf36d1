"""Plain models of several stacks, heads and further layers against the live ones: losses, gradients, activations."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.processes import run_ranks
from support.shapes import LATENT, MAMBA, batch, encoder, gpt, hybrid, recipe_for
from torch import Tensor

from mup_megatron.architectures.hybrid import require_release
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.check.measure.names import watched_modules
from mup_megatron.check.reference.gpt import planned_model
from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version
from mup_megatron.training.samples import prepared

UNTIED = {"untie_embeddings_and_output_weights": True}
GATED = {"swiglu": True, "add_bias_linear": False}
FURTHER = {"mtp_num_layers": 2, "position_embedding_type": "rope", "mtp_loss_scaling_factor": 0.3}
OF_EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01, "add_bias_linear": False}
CASES: dict[str, dict[str, Any]] = {
    "BERT": {"architecture": "bert"},
    "BERT, untied, no binary head, padded": {
        "architecture": "bert",
        "bert_binary_head": False,
        "vocab_size": 49,
        **UNTIED,
    },
    "BERT, gated, RMSNorm, no biases": {"architecture": "bert", "normalization": "RMSNorm", **GATED},
    "T5": {"architecture": "t5"},
    "T5 of two depths and lengths, untied": {
        "architecture": "t5",
        "decoder_num_layers": 3,
        "decoder_seq_length": 8,
        **UNTIED,
    },
    "T5, relative positions": {"architecture": "t5", "position_embedding_type": "relative"},
    "T5, gated, rotary, own head size": {
        "architecture": "t5",
        "position_embedding_type": "rope",
        "kv_channels": 6,
        **GATED,
    },
    "multi-token prediction": {**FURTHER},
    "multi-token prediction with experts, untied": {
        **FURTHER,
        **UNTIED,
        **OF_EXPERTS,
    },
    "a pattern with multi-token prediction of other kinds": {
        **UNTIED,
        **MAMBA,
        **OF_EXPERTS,
        "hybrid_layer_pattern": "*M-/*E/*E",
        "position_embedding_type": "rope",
        "mtp_loss_scaling_factor": 0.3,
    },
    "a pattern with latent attention, multi-token prediction": {
        **MAMBA,
        "hybrid_layer_pattern": "+-M/M+-",
        **LATENT,
        "kv_channels": None,
        "rotary_scaling_factor": 40.0,
        "mscale_all_dim": 1.0,
        "normalization": "RMSNorm",
        **GATED,
    },
}
Computed = dict[str, Any]


def models(case: str) -> tuple[ModelFile, ModelFile]:
    """A base, and a target of twice its width."""
    changes = dict(CASES[case])
    if "hybrid_layer_pattern" in changes:
        pattern = changes.pop("hybrid_layer_pattern")
        return hybrid(gpt(1), pattern, **changes), hybrid(gpt(2), pattern, **changes)
    if "architecture" not in changes:
        return gpt(1, **changes), gpt(2, **changes)
    own = changes.pop("architecture")
    return encoder(own, 1, **changes), encoder(own, 2, **changes)


def samples(model: ModelFile) -> Mapping[str, Tensor]:
    tokens, labels = batch(model, 0)
    positions = torch.arange(model.seq_length).expand_as(tokens)
    return {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(labels.shape), "position_ids": positions}


def watched(modules: Any, model: ModelFile) -> dict[str, Tensor]:
    """What is looked at in the passes to come."""
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = (value[0] if isinstance(value, tuple) else value).detach().clone()

    for name, module, at in watched_modules(modules, architecture_of(model).measured(model)):
        if at == "output":
            module.register_forward_hook(lambda _module, _args, output, n=name: keep(n, output))
        else:  # before it is masked, in place
            module.register_forward_pre_hook(lambda _module, args, n=name: keep(n, args[0]))
    return found


def live_models(cases: list[str]) -> dict[str, dict[str, Any]]:
    """In a rank: of each live model its weights, and on one batch its loss, gradients and what its modules give."""
    from mup_megatron.megatron.names import named_modules, named_parameters, unwrapped
    from mup_megatron.training import ranks
    from mup_megatron.training.build import build
    from mup_megatron.training.options import TrainingOptions

    found = {}
    options = TrainingOptions(train_iters=1, global_batch_size=4, use_cpu_initialization=True)
    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=1):
        for case in cases:
            base, model = models(case)
            recipe = recipe_for(base)
            built = build(model, recipe, recipe.plan(model), options, initialize=True)
            [chunk] = built.chunks
            parameters = dict(named_parameters([chunk], tied=model.tied))
            with torch.no_grad():  # so that no bias is 0 and no gain is 1
                for parameter in parameters.values():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            outputs = watched(named_modules(unwrapped(chunk)), model)
            chunk.zero_grad_buffer()
            output, loss_of = built.objective.forward(chunk, built.objective.prepared(samples(model)))
            loss = loss_of(output)
            loss.backward()
            found[case] = {
                "weights": {name: parameter.detach().clone() for name, parameter in parameters.items()},
                "loss": loss.item(),
                "gradients": {name: parameter.main_grad.clone() for name, parameter in parameters.items()},
                "outputs": outputs,
            }
    return found


def _is_known(case: str) -> bool:
    """Whether the installed release has such a model."""
    try:
        require_release(CASES[case].get("hybrid_layer_pattern", ""), core_version()[:2])
    except InputError:
        return False
    return True


@pytest.fixture(scope="module")
def live() -> dict[str, dict[str, Any]]:
    [found] = run_ranks(live_models, 1, [case for case in CASES if _is_known(case)])
    return found


@pytest.mark.adapter
@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same(case: str, live: dict[str, dict[str, Any]]) -> None:
    if not _is_known(case):
        pytest.skip("megatron-core 0.16 has no such pattern")
    base, model = models(case)
    expected = live[case]
    plain = planned_model(recipe_for(base).plan(model), model, dtype=torch.float32)
    own = dict(plain.named_parameters())
    assert own.keys() == expected["weights"].keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(expected["weights"][name])
    outputs = watched(plain.named_modules(), model)
    loss = plain.loss(prepared(model, samples(model)))
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=2e-6)
    for name, gradient in expected["gradients"].items():
        given = own[name].grad
        given = torch.zeros_like(gradient) if given is None else given
        torch.testing.assert_close(given, gradient, rtol=5e-4, atol=3e-6, msg=lambda said, n=name: f"{n}: {said}")
    assert (
        outputs.keys() == expected["outputs"].keys() == {each.module for each in architecture_of(model).measured(model)}
    )
    for name, value in expected["outputs"].items():
        # Megatron leaves biases to what follows, and gives routers the tokens of all sequences in another order.
        if ("linear" in name and model.add_bias_linear) or name.endswith(".router"):
            continue
        ours = outputs[name].expand_as(value) if "position_embeddings" in name else outputs[name]
        theirs = value if value.shape == ours.shape else value.transpose(0, 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=lambda said, n=name: f"{n}: {said}")
