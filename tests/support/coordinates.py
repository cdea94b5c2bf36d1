"""How much each activation moves in training, and how large each gradient is at first, as models get wider.

The same numbers from a live Megatron-Core model with a plan and from the plain GPT with microsoft/mup: both name their
modules alike. Not the package's own check: it knows nothing of this.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from support.exact import backward, load, logits, megatron_gpt
from support.exact import train as train_megatron
from support.mup_oracle import mup_adamw, mup_gpt
from support.plain_gpt import PlainGPT, draw_weights
from support.plan_runs import train as train_plain
from support.shapes import batch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

STEPS = (1, 2, 4, 8)
PROBE = 1000
"""The batch on which activations are compared; no step trains on it."""

# Every layer's output, the residual stream after each block, the readout; attention logits are its softmax's input.
_OUTPUTS = re.compile(
    r"(_embeddings|linear_qkv|linear_proj|linear_fc1|linear_fc2|(input|pre_mlp|final)_layernorm|decoder\.layers\.\d+|output_layer)$"
)
_LOGITS = re.compile(r"scale_mask_softmax$")

Sizes = dict[str, float]
"""name → root mean square."""


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The activations of forward passes inside, by module name."""
    found: dict[str, Tensor] = {}
    hooks = []

    def keep_output(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, tuple):  # Megatron's linear layers leave adding the bias to what follows.
                output, bias = output
                output = output if bias is None else output + bias
            found[name] = output.detach().clone()

        return hook

    def keep_input(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            found[name] = args[0].detach().clone()  # Megatron masks them in place.

        return hook

    for name, module in model.named_modules():
        if _OUTPUTS.search(name):
            hooks.append(module.register_forward_hook(keep_output(name)))
        elif _LOGITS.search(name):
            hooks.append(module.register_forward_pre_hook(keep_input(name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def rms(x: Tensor) -> float:
    """Root mean square of all entries."""
    return x.double().square().mean().sqrt().item()


def _updates(
    model: nn.Module, forward: Callable[[Tensor], Tensor], train: Callable[[int, int], object], target: ModelFile
) -> dict[int, Sizes]:
    """After each of STEPS, how far each activation is from where it started. `train(first, steps)` trains."""

    def activations() -> dict[str, Tensor]:
        with recorded(model) as found, torch.no_grad():
            forward(batch(target, PROBE)[0])
        return found

    start = activations()
    assert len(start) > 6 * target.num_layers, list(start)
    sizes = {}
    for before, after in zip((0, *STEPS), STEPS, strict=False):
        train(before, after - before)
        sizes[after] = {name: rms(now - start[name]) for name, now in activations().items()}
    return sizes


def initial_weights(plan: Plan, target: ModelFile, seed: int) -> dict[str, Tensor]:
    """A draw with the plan's stds; the same unit draw for every plan of a target."""
    model = PlainGPT(target)
    draw_weights(model, {entry.name: entry.init_std for entry in plan.entries}, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def megatron_updates(plan: Plan, target: ModelFile, seed: int) -> dict[int, Sizes]:
    """Of Megatron-Core with a plan, in single precision. Inside a rank."""
    from mup_megatron.megatron.names import unwrapped

    run = megatron_gpt(plan, target, initial_weights(plan, target, seed), dtype=torch.float32)
    model = unwrapped(run.chunks[0])
    return _updates(
        model,
        lambda tokens: logits(model, tokens),
        lambda first, steps: train_megatron(run, target, first=first, steps=steps),
        target,
    )


def megatron_gradients(plan: Plan, target: ModelFile, seed: int) -> Sizes:
    """Root mean squares of the first gradients of Megatron-Core with a plan, by parameter. Inside a rank."""
    from mup_megatron.megatron.names import unwrapped

    run = megatron_gpt(plan, target, initial_weights(plan, target, seed), dtype=torch.float32)
    backward(run, target, 0)
    return {name: rms(p.main_grad) for name, p in unwrapped(run.chunks[0]).named_parameters()}


def mup_updates(tuned: Recipe, target: ModelFile, seed: int) -> dict[int, Sizes]:
    """Of the plain GPT with microsoft/mup, in single precision, from the weights of `megatron_updates`."""
    h = tuned.hyperparameters
    model = mup_gpt(
        tuned.base,
        target,
        embedding_multiplier=h.embedding_multiplier,
        output_multiplier=h.output_multiplier,
        attention_multiplier=h.attention_multiplier,
        dtype=torch.float32,
    )
    load(model, initial_weights(tuned.plan(target), target, seed))
    optimizer = mup_adamw(
        model, lr=h.lr, weight_decay=h.weight_decay, betas=(h.adam_beta1, h.adam_beta2), eps=h.adam_eps
    )
    return _updates(
        model,
        model,
        lambda first, steps: train_plain(model, optimizer, target, first=first, steps=steps),
        target,
    )


def slopes(of_widths: Mapping[int, Sequence[Sizes]]) -> dict[str, float]:
    """The slope of log(size) over log(width), of each name; sizes are geometric means over seeds."""
    widths = list(of_widths)
    names = of_widths[widths[0]][0]
    x = torch.tensor(widths, dtype=torch.float64).log()
    found = {}
    for name in names:
        y = torch.tensor([[sizes[name] for sizes in of_widths[w]] for w in widths], dtype=torch.float64).log().mean(1)
        found[name] = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    return found
