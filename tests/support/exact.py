"""Megatron-Core in double precision with a plan applied, and Megatron's own optimizer, to compare step by step.

Inside a rank. The loss is computed from the logits, because Megatron's cross-entropy goes through single precision.
The learning rate is constant and gradients are not clipped, as microsoft/mup and folding want it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from support import stock
from support.plain_gpt import cross_entropy
from support.planned import built
from support.shapes import batch
from support.stock import Layout, Run, Training
from torch import Tensor

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import Plan

Weights = Mapping[str, Tensor]


def megatron_gpt(plan: Plan, target: ModelFile, weights: Weights, *, dtype: torch.dtype = torch.float64) -> Run:
    """A GPTModel with these weights and the plan's multipliers, in Megatron's DDP, with Megatron's optimizer."""
    from mup_megatron.megatron.model import apply_plan
    from mup_megatron.megatron.optimizer import config_overrides

    sizes, config, [model] = built(target, Layout())
    model.to(dtype)
    load(model, weights)
    apply_plan([model], plan, initialize=False)
    training = Training(
        optimizer=plan.optimizer,
        lr=plan.lr,
        min_lr=plan.min_lr,
        weight_decay=plan.weight_decay,
        adam_eps=plan.adam_eps,
        clip_grad=0.0,
        warmup_steps=0,
    )
    assert plan.min_lr == plan.lr, "constant"
    return stock.finish(
        sizes, Layout(), training, config, [model], lambda chunks, optimizer: config_overrides(chunks, plan, optimizer)
    )


def load(model: torch.nn.Module, weights: Weights) -> None:
    """Copies weights by name; there must be one for each parameter."""
    from mup_megatron.megatron.versions import parameter_name

    # As a checkpoint calls convolutions and a layer of multi-token prediction, and as the plain model does.
    names = {name: name.replace("mtp_model_layer", "transformer_layer") for name, _ in model.named_parameters()}
    named = {parameter_name(names[name]): p for name, p in model.named_parameters()}
    assert set(named) == set(weights), set(named) ^ set(weights)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])


def logits(model: Any, tokens: Tensor) -> Tensor:
    """[batch, sequence, padded vocabulary], of a GPTModel, wrapped or not."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    own = getattr(model, "module", model)
    if not own.config.mtp_num_layers:
        result: Tensor = model(tokens, positions, None)
        return result
    # 0.16 has multi-token prediction with labels alone; the model's own logits are the last ones.
    seen: list[Tensor] = []
    hook = own.output_layer.register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    model(tokens, positions, None, labels=tokens)
    hook.remove()
    return seen[-1].transpose(0, 1)


def backward(run: Run, target: ModelFile, step: int) -> Tensor:
    """The loss on a step's batch, with its gradients where Megatron's optimizer finds them (`main_grad`)."""
    from megatron.core.distributed import finalize_model_grads

    [model] = run.chunks
    model.zero_grad_buffer()
    run.optimizer.zero_grad()
    tokens, labels = batch(target, step)
    loss = cross_entropy(logits(model, tokens), labels)
    loss.backward()
    finalize_model_grads([model])
    return loss.detach()


def train(run: Run, target: ModelFile, *, first: int = 0, steps: int = 10) -> Tensor:
    """The losses of some steps on the batches of `support.shapes`, [steps]."""
    losses = []
    for step in range(first, first + steps):
        losses.append(backward(run, target, step))
        updated, _, _ = run.optimizer.step()
        assert updated
        run.scheduler.step(increment=1)
    return torch.stack(losses)


def folded_weights(plan: Plan, weights: Weights) -> dict[str, Tensor]:
    """What a folded plan stores for weights that are given in the explicit plan's terms."""
    return {name: plan[name].folded * weight + plan[name].fold_offset for name, weight in weights.items()}


def constant(plan: Plan) -> Plan:
    """The plan with its floor at its peak."""
    return dataclasses.replace(plan, min_lr=plan.lr)
