"""Mistakes in the loop: with gradients, clipping and steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exam.mistakes.entries import mistake
from exam.mistakes.scripts import adamw, discard
from exam.setups import Modules, Setup
from mup_megatron.check.subjects.scripts import Task
from mup_megatron.modules import apply_plan, param_groups


def _on_gradients(change: Callable[[str, Tensor], Tensor]) -> Callable[[nn.Module, Any, Task], None]:
    """Changes gradients as they are computed: before the loop clips them."""

    def changed(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        for name, parameter in model.named_parameters():
            parameter.register_hook(partial(change, name))

    return changed


@mistake("lm-clipped", "training loop")
def clipped_each_by_itself(setup: Modules) -> Setup:
    """Each parameter's gradient is clipped by its own norm, before all of them are."""
    limit = setup.hyperparameters["clip_grad"] / 4
    return setup.then(_on_gradients(lambda _n, g: g * min(1.0, limit / (float(g.norm()) + 1e-12))))


@mistake("lm", "training loop")
def clipped_by_value(setup: Modules) -> Setup:
    """Every element of a gradient is cut off at 0.001."""
    return setup.then(_on_gradients(lambda _n, g: g.clamp(-0.001, 0.001)))


@mistake("lm-eps", "training loop")
def divided_after_clipping(setup: Modules) -> Setup:
    """Gradients are divided by the number of accumulated batches, 4, after clipping, and were means already."""

    def divide(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.div_(4)

    return setup.then(lambda _m, optimizer, _t: discard(optimizer.register_step_pre_hook(divide)))


@mistake("lm", "training loop")
def gradients_never_zeroed(setup: Modules) -> Setup:
    """Gradients are never set to 0, so that each step has the sum of all before."""
    sums: dict[int, Tensor] = {}

    def change(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        sums.clear()

        def summed(name: int, gradient: Tensor) -> Tensor:
            sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient
            return sums[name]

        for index, parameter in enumerate(model.parameters()):
            parameter.register_hook(partial(summed, index))

    return setup.then(change)


@mistake("lm", "training loop")
def step_skipped_every_other_time(setup: Modules) -> Setup:
    """The optimizer steps every other time, for accumulation that was left on, and gradients are zeroed each time."""

    class Skipping(torch.optim.AdamW):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            return super().step(closure) if self.calls % 2 == 0 else None

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        return adamw(param_groups(model.named_parameters(), task.plan), task, Skipping)

    return setup.with_script(prepare)


@mistake("lm", "training loop", "blocks.0.norm2*", "blocks.0.mlp*")
def branch_without_gradient(setup: Modules) -> Setup:
    """The first block's MLP is run without gradient, as if it were recomputed, and what it adds is a constant."""

    def change(model: Any, _optimizer: Any, _task: Task) -> None:
        model.blocks[0].mlp.register_forward_hook(lambda _m, _a, out: out.detach())

    return setup.then(change)
