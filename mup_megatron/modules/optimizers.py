"""The optimizers as torch, and whoever follows it, has them: classes, their settings, and how they are told apart.

To add one, `register` it here and its rules in `theory.optimizers`. Megatron's and DeepSpeed's are torch's in what a
parameter group calls its settings, so their adapters read those here as well.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mup_megatron.by_optimizer import ByOptimizer
from mup_megatron.recipe import Hyperparameters

__all__ = ["TORCH_OPTIMIZERS", "TorchOptimizer", "register"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchOptimizer:
    """An optimizer in torch's terms."""

    kind: type[torch.optim.Optimizer]
    """Torch's own, whose steps are right."""
    settings: Callable[[Hyperparameters], dict[str, Any]]
    """What a recipe says of it that holds for all parameters, by the names in a parameter group."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What `kind` has to be told besides for its steps to be those that the rules are for."""
    coupled: type[torch.optim.Optimizer] | None = None
    """The optimizer that differs from it only in adding weight decay to the gradient."""
    fitting: str
    """What to use, in words."""
    kernels: tuple[str, ...] = ()
    """Classes whose step is a kernel for a device of its own, and which therefore go by their names."""
    bitsandbytes: str | None = None
    """How the names of bitsandbytes' classes of it begin."""

    def made(self, groups: Iterable[Any], h: Hyperparameters) -> torch.optim.Optimizer:
        """Returns torch's own with a recipe's settings, for parameter groups that have the rest."""
        kind: Callable[..., torch.optim.Optimizer] = self.kind
        return kind(groups, lr=h.lr, **self.settings(h), **self.options)


TORCH_OPTIMIZERS = ByOptimizer[TorchOptimizer]("torch")
"""The optimizers that torch knows, by their names in a recipe."""
register = TORCH_OPTIMIZERS.register

register(
    "adam",
    TorchOptimizer(
        kind=torch.optim.AdamW,
        settings=lambda h: {"betas": (h.adam_beta1, h.adam_beta2)},
        coupled=torch.optim.Adam,
        fitting="torch.optim.AdamW, FusedAdam or DeepSpeedCPUAdam with adam_w_mode, or bitsandbytes' AdamW",
        kernels=("FusedAdam", "DeepSpeedCPUAdam", "ZenFlowCPUAdam", "ZenFlowSelectiveAdamW"),
        bitsandbytes="Adam",
    ),
)
register(
    "sgd",
    TorchOptimizer(
        kind=torch.optim.SGD,
        settings=lambda h: {"momentum": h.sgd_momentum},
        fitting="torch.optim.SGD, with or without momentum",
        kernels=("FusedSGD",),
        bitsandbytes="SGD",
    ),
)
