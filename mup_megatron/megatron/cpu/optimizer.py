"""Adam as Megatron's fused optimizers present it, computed by torch on the CPU. Not a faster or different Adam."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from mup_megatron.errors import InputError


class GroupStepAdam(torch.optim.Optimizer):
    """Adam or AdamW with the constructor and the state layout of the FusedAdam of Transformer Engine and Apex.

    `step` is one int in the parameter group; a parameter's state is `exp_avg` and `exp_avg_sq` and nothing else.
    torch's own AdamW keeps one `step` tensor per parameter instead, and Megatron's distributed optimizer can't resume
    from that. The arithmetic is torch's single-tensor Adam itself, so every update is bitwise that of
    `torch.optim.AdamW` (or `torch.optim.Adam` with `adam_w_mode=False`).

    Args:
        params: tensors or parameter groups. A group may set its own `lr`, `betas`, `eps`, `weight_decay`.
        adam_w_mode: True for decoupled weight decay (AdamW), False for decay added to the gradient.
        capturable: whether a step can be captured in a CUDA graph. There is none on a CPU, so True raises InputError.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise InputError("optimizer_cuda_graph needs a GPU: unset it to run on the CPU.")
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Every group counts the step, an empty one too.

        A distributed optimizer leaves a group empty on the ranks that own none of it; were its count to lag, the ranks
        of one run would save different steps.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if "exp_avg" not in self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        update = adamw if self.adam_w_mode else adam
        update(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            # torch counts up the tensor it is given, so each parameter needs its own.
            [torch.tensor(float(group["step"])) for _ in params],
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        group["step"] += 1
