"""The optimizers as Megatron has them, by the names that its `--optimizer` and a recipe share. Needs no Megatron.

To add one, `register` it here, in `modules/optimizers.py`, which says what its parameter groups hold, and its rules in
`theory.optimizers`. Its hyperparameters are flags of `arguments/table.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mup_megatron.by_optimizer import ByOptimizer
from mup_megatron.errors import InputError
from mup_megatron.theory import optimizers
from mup_megatron.validation import brief

__all__ = ["MEGATRON_OPTIMIZERS", "MegatronOptimizer", "register"]

NativeFactor = Callable[[bool, float], float]
"""What Megatron-Core's own μP multiplies a value of a parameter by: (whether it is a hidden weight, m) → factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronOptimizer:
    """An optimizer in Megatron's terms."""

    distributed: bool
    """Whether Megatron has its distributed optimizer for it."""
    decoupled_weight_decay: bool
    """Whether `decoupled_weight_decay` has to be on, for weight decay to be the plan's."""
    native_lr: NativeFactor
    native_eps: NativeFactor | None
    """None without eps."""


MEGATRON_OPTIMIZERS = ByOptimizer[MegatronOptimizer]("Megatron")
"""The optimizers that Megatron knows, by their names in a recipe."""
register = MEGATRON_OPTIMIZERS.register

register(
    "adam",
    MegatronOptimizer(
        distributed=True,
        decoupled_weight_decay=True,
        native_lr=lambda hidden, m: 1.0 / m if hidden else 1.0,
        native_eps=lambda hidden, m: 1.0 / m if hidden else 1.0,
    ),
)
register(
    "sgd",
    MegatronOptimizer(
        distributed=False,
        decoupled_weight_decay=False,
        native_lr=lambda hidden, m: 1.0 if hidden else m,
        native_eps=None,
    ),
)


def require_known(flag: str, source: str) -> None:
    """Raises InputError unless `--optimizer` says one that a recipe can have."""
    if flag not in MEGATRON_OPTIMIZERS:
        raise InputError(f"{source}: {_unknown(flag)}. Choose one of them.")


def unknown_remark(flag: str) -> str | None:
    """Returns what follows for a run where `--optimizer` says one that no recipe can have; None where one can."""
    return None if flag in MEGATRON_OPTIMIZERS else f"{_unknown(flag)}, so a run with one is stopped."


def _unknown(flag: str) -> str:
    return f"--optimizer {brief(flag, 60)}: a recipe knows {MEGATRON_OPTIMIZERS.names}"


def distributed_problem(name: str) -> str | None:
    """Returns why a recipe's optimizer cannot be a distributed one of Megatron's; None where it can."""
    if MEGATRON_OPTIMIZERS[name].distributed:
        return None
    those = " and ".join(optimizers()[each].title for each, known in MEGATRON_OPTIMIZERS.items() if known.distributed)
    return f"--use-distributed-optimizer: Megatron has it for {those}, and the recipe's optimizer is {name}. Drop it."
