"""At its base a plan changes nothing, bit by bit; with a tuned multiplier it does.

The run it is compared with knows nothing of this package: AdamW with one group of weights and one of biases and gains,
which has no decay.
"""

import copy

import pytest
import torch
from support.hf_families import FAMILIES, config, recipe_at
from support.hf_models import ATTENTION, built, loss_of, trained

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, param_groups, plan_for

WIDTH, STEPS = 64, 3
ADAMW = {"betas": (0.9, 0.95)}


def _plain(family: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = built(family, config(family, WIDTH))
    weights = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01, eps=1e-7, **ADAMW)


def _planned(family: str, **hyperparameters: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = built(family, config(family, WIDTH))
    own = {"lr": 0.01, "adam_eps": 1e-7, "weight_decay": 0.1} | hyperparameters
    plan = plan_for(model, recipe_at(config(family, WIDTH), hyperparameters=own))
    apply_plan(model, plan)
    return model, torch.optim.AdamW(param_groups(model.named_parameters(), plan), **ADAMW)


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {f"{names[p]} {key}": value for p, own in optimizer.state.items() for key, value in own.items()}
    return {**copy.deepcopy(model.state_dict()), **moments}


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_base_nothing_changes(family: str) -> None:
    (plain, plain_optimizer), (ours, our_optimizer) = _plain(family), _planned(family)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())
    for (name, one), (other_name, other) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name
    losses = trained(plain, plain_optimizer, family, STEPS)
    assert torch.equal(losses, trained(ours, our_optimizer, family, STEPS))
    assert losses.unique().numel() == STEPS
    theirs, mine = _state(plain, plain_optimizer), _state(ours, our_optimizer)
    assert theirs.keys() == mine.keys()
    assert len(theirs) > 2 * len(list(plain.parameters()))
    assert [name for name, value in theirs.items() if not torch.equal(value, mine[name])] == []


OFTEN = {"gpt2", "llama", "bert", "t5", "vit", "resnet"}
"""One of each kind; `test_hf_apply.py` measures how much each multiplier acts in every family."""


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in OFTEN else pytest.mark.slow) for each in FAMILIES]
)
@pytest.mark.parametrize("key", ["embedding_multiplier", "output_multiplier", "attention_multiplier"])
def test_a_tuned_multiplier_acts(family: str, key: str) -> None:
    if key == "attention_multiplier" and family not in ATTENTION:
        with pytest.raises(InputError, match="no attention that says its scale"):
            _planned(family, **{key: 2.0})
        return
    if key == "embedding_multiplier" and family in ("vit", "resnet", "bert"):
        return  # no table of embeddings; or a norm of their sum, which hides how large they are
    before, after = loss_of(_plain(family)[0].eval(), family), loss_of(_planned(family, **{key: 2.0})[0].eval(), family)
    assert abs(before - after) > 1e-6


@pytest.mark.parametrize("key", ["lr", "adam_eps", "weight_decay", "init_method_std"])
def test_every_other_hyperparameter_acts_at_the_base(key: str) -> None:
    changed = {"lr": 0.02, "adam_eps": 1e-3, "weight_decay": 1.0, "init_method_std": 0.04}[key]
    before, after = (trained(*pair, "gpt2", STEPS) for pair in (_planned("gpt2"), _planned("gpt2", **{key: changed})))
    assert (before - after).abs().max() > 1e-5
