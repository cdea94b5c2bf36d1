"""The optimizers as torch, and whoever follows it, has them: classes, their settings, and how they are told apart.

To add one, `register` it here and its rules in `theory.optimizers`. Megatron's and DeepSpeed's are torch's in what a
parameter group calls its settings, so their adapters read those here as well.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mup_megatron.by_optimizer import ByOptimizer
from mup_megatron.errors import InputError
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
    of_scale: Mapping[str | None, Mapping[str, Any]] = field(default_factory=lambda: {None: {}})
    """How a plan's updates follow a matrix's shape by themselves → what a parameter group says for that; what is not
    there it cannot do."""
    problem: Callable[[Hyperparameters], str | None] = lambda _: None
    """Why it cannot train with a recipe's values; None where it can."""
    dtype: torch.dtype | None = None
    """In which `kind` multiplies matrices; None for that of the weights."""
    rounding: float = 1e-6
    """What another implementation of it may differ by after a few steps of about 0.01."""
    coupled: type[torch.optim.Optimizer] | None = None
    """The optimizer that differs from it only in adding weight decay to the gradient."""
    fitting: str
    """What to use, in words."""
    kernels: tuple[str, ...] = ()
    """Classes whose step is a kernel for a device of its own, and which therefore go by their names."""
    bitsandbytes: str | None = None
    """How the names of bitsandbytes' classes of it begin."""

    def made(self, groups: Iterable[Any], h: Hyperparameters) -> torch.optim.Optimizer:
        """Returns torch's own with a recipe's settings, for parameter groups that have the rest.

        Raises:
            InputError: torch's cannot train with these.
        """
        if (problem := self.problem(h)) is not None:
            raise InputError(problem)
        kind: Callable[..., torch.optim.Optimizer] = self.kind
        return kind(groups, lr=h.lr, **self.settings(h), **self.options)


TORCH_OPTIMIZERS = ByOptimizer[TorchOptimizer]("torch")
"""The optimizers that torch knows, by their names in a recipe."""
register = TORCH_OPTIMIZERS.register

register(
    "adam",
    TorchOptimizer(
        kind=torch.optim.AdamW,
        settings=lambda h: {"betas": h.betas},
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
        fitting="torch.optim.SGD with the recipe's momentum",
        kernels=("FusedSGD",),
        bitsandbytes="SGD",
    ),
)


_TORCHS_SCALES = {"shape_scaling": ("original", 1.0), "spectral": ("match_rms_adamw", 0.2)}
"""`muon_scale_mode` → torch's name of it, and the constant that torch has with it."""


def _muon_problem(h: Hyperparameters) -> str | None:
    own: dict[str, Any] = {"muon_coefficient_type": "simple"}
    if h.muon_scale_mode in _TORCHS_SCALES:
        own |= {"muon_extra_scale_factor": _TORCHS_SCALES[h.muon_scale_mode][1]}
    else:
        own |= {"muon_scale_mode": "shape_scaling"}
    wrong = next((key for key, value in own.items() if getattr(h, key) != value), None)
    if wrong is None:
        return None
    return (
        f"{wrong}: the recipe's is {getattr(h, wrong)}, and torch.optim.Muon is made for {own[wrong]} (it has "
        "muon_scale_mode shape_scaling, and spectral with muon_extra_scale_factor 0.2). Tune with that, and let the "
        "recipe say so."
    )


if hasattr(torch.optim, "Muon"):  # since 2.9
    register(
        "muon",
        TorchOptimizer(
            kind=torch.optim.Muon,
            settings=lambda h: {
                "momentum": h.muon_momentum,
                "nesterov": h.muon_nesterov,
                "ns_steps": h.muon_num_ns_steps,
            },
            of_scale={mode: {"adjust_lr_fn": name} for mode, (name, _) in _TORCHS_SCALES.items()},
            problem=_muon_problem,
            dtype=torch.bfloat16,
            rounding=1e-3,
            fitting="torch.optim.Muon for the groups whose `optimizer` is muon",
        ),
    )
