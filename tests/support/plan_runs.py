"""A plan carried out in plain PyTorch: its multipliers in the plain GPT, torch's optimizer with its groups."""

import torch
from support.shapes import batch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import cross_entropy
from mup_megatron.architectures.plain.decoder import PlainDecoder
from mup_megatron.check.reference.gpt import planned_model
from mup_megatron.theory import Plan


def plain_from_plan(plan: Plan, target: ModelFile, *, dtype: torch.dtype = torch.float64) -> PlainDecoder:
    """The plain GPT with each of the plan's multipliers at its weight, and constants as the plan starts them."""
    found = planned_model(plan, target, dtype=dtype)
    assert isinstance(found, PlainDecoder)
    return found


def optimizer_from_plan(plan: Plan, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum, with one group for each parameter."""
    named = list(model.named_parameters())
    assert [name for name, _ in named] == [entry.name for entry in plan.entries]
    groups = [{"params": [p], "lr": plan[name].lr, "weight_decay": plan[name].weight_decay} for name, p in named]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    for group, (name, _) in zip(groups, named, strict=True):
        group["eps"] = plan[name].eps
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def train(
    model: PlainDecoder, optimizer: torch.optim.Optimizer, target: ModelFile, *, first: int = 0, steps: int = 10
) -> Tensor:
    """The losses of some steps, [steps]."""
    losses = []
    for step in range(first, first + steps):
        tokens, labels = batch(target, step)
        loss = cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
