"""Megatron-Core with the plug-in against microsoft/mup on a plain GPT, and folded plans against explicit ones.

Ten steps in double precision from the same weights on the same batches, with Megatron's own optimizer.
"""

from typing import Any

import pytest
import torch
from support import exact
from support.exact import constant, folded_weights, logits, megatron_gpt
from support.mup_oracle import mup_adamw, mup_gpt, mup_sgd
from support.plain_gpt import PlainGPT
from support.plan_runs import train
from support.processes import run_ranks
from support.shapes import HYPERPARAMETERS, batch, gpt, recipe_for
from torch import Tensor

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import ADAM, Role, rules
from mup_megatron.theory.folding import READOUT, fold, fold_attention
from mup_megatron.theory.optimizers import ONE

UNTIED = {"untie_embeddings_and_output_weights": True}
LLAMA = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "group_query_attention": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": UNTIED,
    "own head size": {"kv_channels": 10, "num_attention_heads": 6},
    "grouped queries": {"group_query_attention": True, "num_query_groups": 2},
    "query norm": {"qk_layernorm": True},
    "no biases": {"add_bias_linear": False},
    "qkv bias": {"add_bias_linear": False, "add_qkv_bias": True},
    "no positions": {"position_embedding_type": "none"},
    "rotary": {"position_embedding_type": "rope"},
    "llama": {**LLAMA, **UNTIED, "num_query_groups": 2},
    "llama with query norm, tied": {**LLAMA, "num_query_groups": 2, "qk_layernorm": True},
}


def _random_weights(model: PlainGPT, std: float = 0.3) -> dict[str, Tensor]:
    """Weights far from where they start, so that every one of them matters."""
    torch.manual_seed(0)
    return {name: p.detach() + std * torch.randn_like(p) for name, p in model.named_parameters()}


def logits_of_both(models: dict[str, ModelFile]) -> dict[str, tuple[Tensor, Tensor]]:
    """In a rank: each model's logits by Megatron-Core, stock, and by the plain GPT, from the same weights."""
    found = {}
    for case, model in models.items():
        ones = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), 1.0)
        plain = PlainGPT(model)
        weights = _random_weights(plain)
        exact.load(plain, weights)
        run = megatron_gpt(constant(recipe_for(model, **ones).plan(model)), model, weights)
        tokens, _ = batch(model, 0)
        with torch.no_grad():
            found[case] = (logits(run.chunks[0], tokens), plain(tokens))
    return found


def test_the_plain_gpt_is_megatrons() -> None:
    [found] = run_ranks(logits_of_both, 1, {case: gpt(1, **changes) for case, changes in MODELS.items()})
    for case, (megatron, plain) in found.items():
        assert megatron.dtype == torch.float64
        torch.testing.assert_close(megatron, plain, rtol=0, atol=1e-12, msg=lambda text, case=case: f"{case}: {text}")


# mup's eps is the same at every width and ours is not, so here it is too small to matter in either.
NO_EPS = 1e-30
LR = {"adam": 0.003, "sgd": 0.05}
PAIRS: dict[str, tuple[ModelFile, ModelFile]] = {
    "untied, ffn grows faster": (gpt(1, **UNTIED), gpt(4, ffn_hidden_size=512, **UNTIED)),
    "tied, deeper": (gpt(1), gpt(4, num_layers=3)),
    "tied, head size grows": (gpt(1), gpt(4, num_attention_heads=4, kv_channels=32)),
    "llama": (
        gpt(1, **LLAMA, **UNTIED, num_query_groups=2, qk_layernorm=True),
        gpt(4, **LLAMA, **UNTIED, num_query_groups=8, qk_layernorm=True),
    ),
}


def losses_of_both(base: ModelFile, target: ModelFile, optimizer: str, broken: str = "") -> tuple[Tensor, Tensor]:
    """In a rank: ten losses of Megatron-Core with the plug-in, and of the plain GPT with mup."""
    if broken == "readout":
        rules.MULTIPLIER[Role.OUTPUT] = ONE
    elif broken == "hidden LR":
        ADAM.lr[Role.HIDDEN] = ONE
    lr, weight_decay = LR[optimizer], HYPERPARAMETERS["weight_decay"]
    multipliers = ("embedding_multiplier", "output_multiplier", "attention_multiplier")
    oracle = mup_gpt(
        base, target, sigma=HYPERPARAMETERS["init_method_std"], **{key: HYPERPARAMETERS[key] for key in multipliers}
    )
    plan = recipe_for(base, optimizer=optimizer, lr=lr, min_lr=lr, adam_eps=NO_EPS).plan(target)
    ours = megatron_gpt(plan, target, {name: p.detach().clone() for name, p in oracle.named_parameters()})
    if optimizer == "adam":
        theirs = mup_adamw(oracle, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95), eps=NO_EPS)
    else:
        theirs = mup_sgd(oracle, lr=lr, weight_decay=weight_decay, momentum=0.9)
    return exact.train(ours, target), train(oracle, theirs, target)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("pair", PAIRS)
def test_ten_steps_are_those_of_mup(pair: str, optimizer: str) -> None:
    [(ours, theirs)] = run_ranks(losses_of_both, 1, *PAIRS[pair], optimizer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    assert theirs[0] - theirs[-1] > 0.01, "a model that learns nothing shows nothing"


@pytest.mark.parametrize("broken", ["readout", "hidden LR"])
def test_a_broken_rule_is_noticed(broken: str) -> None:
    [(ours, theirs)] = run_ranks(losses_of_both, 1, *PAIRS["tied, deeper"], "adam", broken)
    assert (ours - theirs).abs().max() > 1e-3


# ---- folding -------------------------------------------------------------------------------------------------------

QUERY_NORM = {"qk_layernorm": True, "position_embedding_type": "rope", "normalization": "RMSNorm"}
FOLDS: dict[str, tuple[dict[str, Any], set[str] | None, bool]] = {
    # model, names to fold (None: all), attention too
    "untied, all": (UNTIED, None, False),
    "untied, all, attention": ({**UNTIED, **QUERY_NORM}, None, True),
    "tied, all": ({}, None, False),
    "tied, readout alone, attention": ({"qk_layernorm": True}, {READOUT}, True),
}


def losses_folded_and_explicit(changes: dict[str, Any], names: set[str] | None, attention: bool, optimizer: str) -> Any:
    """In a rank: ten losses by the folded plan and by the explicit one, and what the folded one still multiplies by."""
    target = gpt(2, kv_channels=16, num_attention_heads=4, **changes)
    lr = 1e-3
    plan = recipe_for(gpt(1, **changes), optimizer=optimizer, lr=lr, min_lr=lr).plan(target)
    folded = fold(fold_attention(plan) if attention else plan, names)
    weights = _random_weights(PlainGPT(target), std=0.1)
    explicit = exact.train(megatron_gpt(plan, target, weights), target)
    ours = exact.train(megatron_gpt(folded, target, folded_weights(folded, weights)), target)
    return ours, explicit, (plan.output_multiplier, folded.output_multiplier, folded.changes_softmax_scale)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("case", FOLDS)
def test_a_folded_plan_is_the_same_run(case: str, optimizer: str) -> None:
    changes, names, attention = FOLDS[case]
    [(ours, explicit, (before, after, scale))] = run_ranks(
        losses_folded_and_explicit, 1, changes, names, attention, optimizer
    )
    torch.testing.assert_close(ours, explicit, rtol=0, atol=1e-10)
    assert explicit.unique().numel() == 10, "a model that stands still shows nothing"
    assert before != 1.0
    assert after == 1.0
    assert scale is not attention
