"""The optimizers as Megatron has them, by the names that its `--optimizer` and a recipe share. Needs no Megatron.

To add one, `register` it here, in `modules/optimizers.py`, which says what its parameter groups hold, and its rules in
`theory.optimizers`. Its hyperparameters are flags of `arguments/table.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mup_megatron.by_optimizer import ByOptimizer
from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import known_release, optimizer_package_problem
from mup_megatron.theory import optimizers
from mup_megatron.validation import brief

__all__ = ["MEGATRON_OPTIMIZERS", "MegatronOptimizer", "register"]

NativeFactor = Callable[[bool, float], float]
"""What Megatron-Core's own μP multiplies a value of a parameter by: (whether it is a hidden weight, m) → factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronOptimizer:
    """An optimizer in Megatron's terms."""

    distributed: bool
    """Whether a plan reaches the distributed optimizer that Megatron has for it."""
    decoupled_weight_decay: bool
    """Whether `decoupled_weight_decay` has to be on, for weight decay to be the plan's."""
    native_lr: NativeFactor | None
    """None where no recipe does what Megatron's own μP does with it."""
    native_eps: NativeFactor | None
    """None without eps."""
    leaves_to: tuple[str, ...] = ()
    """Those that Megatron chains it with, itself deciding which parameters are theirs."""
    settings: Callable[[Any], dict[str, Any]] | None = None
    """What a recipe's hyperparameters say of it that its groups hold; None where that is what torch's hold."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of Megatron's that have to have these values for its steps to be those that the rules are for."""
    split_problem: Callable[[Mapping[str, Any], int], str | None] = lambda _values, _ranks: None
    """Why it cannot be used, given values by their keys, with a tensor parallelism; None where it can."""
    since: tuple[int, int] | None = None
    """The first release that it was tested with, of those that have it; None for all."""


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


_OF_OTHER_PACKAGE: Mapping[str, Any] = {"fp16": False}
"""Megatron itself takes no other precision for optimizers that it has from elsewhere than bf16 and fp32."""


def _muon_split_problem(values: Mapping[str, Any], ranks: int) -> str | None:
    if values["muon_tp_mode"] != "blockwise" or ranks == 1:
        return None
    return (
        f"muon_tp_mode blockwise: with a tensor parallelism of {ranks} it takes each shard for a matrix, which is "
        "another optimizer at every number of ranks. Use --muon-tp-mode duplicated (muon_tp_mode in the recipe)."
    )


register(
    "muon",
    MegatronOptimizer(
        distributed=False,
        # Its own always is, and Adam's part follows the switch.
        decoupled_weight_decay=True,
        native_lr=None,
        native_eps=None,
        leaves_to=("adam",),
        settings=lambda h: {"momentum": h.muon_momentum},
        fixed={**_OF_OTHER_PACKAGE, "muon_split_qkv": True, "muon_scalar_optimizer": "adam"},
        split_problem=_muon_split_problem,
        since=(0, 19),
    ),
)
register(
    "lion",
    MegatronOptimizer(
        distributed=False,
        decoupled_weight_decay=True,
        native_lr=None,
        native_eps=None,
        leaves_to=("adam",),
        settings=lambda h: {"betas": h.betas},
        fixed=_OF_OTHER_PACKAGE,
        since=(0, 19),
    ),
)

_UNSUPPORTED = {
    "dist_muon": "it is muon with a layer-wise optimizer, which a plan is not tested with",
    "adaptive_muon": "Megatron's stops at its first step",
    "soap": "its step is Adam's in a basis that rotates, for which no rule has been measured",
    "scion": "its rule is that of muon with muon_scale_mode unit_rms_norm",
}
"""Others that Megatron has → what is known of them."""


def require_possible(
    name: str, stepping: Iterable[str] = (), *, values: Mapping[str, Any] | None = None, ranks: int = 1
) -> MegatronOptimizer:
    """Returns a recipe's optimizer as Megatron has it, where it and those beside it can train a model here.

    Args:
        name: the recipe's.
        stepping: the names of those that step the plan's tensors.
        values: its hyperparameters by key, where they are known.
        ranks: the tensor parallelism.

    Raises:
        InputError: Megatron does not have it, or not beside the others, in this release, or with these values.
    """
    known = MEGATRON_OPTIMIZERS[name]
    if not {*stepping} <= {name, *known.leaves_to}:
        MEGATRON_OPTIMIZERS.only((name, *stepping))
    if (problem := None if values is None else known.split_problem(values, ranks)) is not None:
        raise InputError(problem)
    return known


def absence(name: str) -> str | None:
    """Returns why a recipe's optimizer is not to be had with the Megatron-Core that is here; None where it is."""
    since, here = MEGATRON_OPTIMIZERS[name].since, known_release()
    if since is None or here is None:
        return None
    if here < since:
        now, first = (".".join(map(str, numbers)) for numbers in (here, since))
        return (
            f"parametrization.optimizer: the recipe's is {name}, for which Megatron-Core has to be {first} or later, "
            f"and it is {now}. Install that, or take a recipe for another optimizer."
        )
    return optimizer_package_problem(name)


def require_known(flag: str, source: str) -> None:
    """Raises InputError unless `--optimizer` says one that a recipe can have."""
    if flag not in MEGATRON_OPTIMIZERS:
        raise InputError(f"{source}: {_unknown(flag)}. Choose one of them.")


def unknown_remark(flag: str) -> str | None:
    """Returns what follows for a run where `--optimizer` says one that no recipe can have; None where one can."""
    return None if flag in MEGATRON_OPTIMIZERS else f"{_unknown(flag)}, so a run with one is stopped."


def _unknown(flag: str) -> str:
    more = f" ({_UNSUPPORTED[flag]})" if flag in _UNSUPPORTED else ""
    return f"--optimizer {brief(flag, 60)}: a recipe knows {MEGATRON_OPTIMIZERS.names}{more}"


def distributed_problem(name: str) -> str | None:
    """Returns why a recipe's optimizer cannot be a distributed one of Megatron's; None where it can."""
    if MEGATRON_OPTIMIZERS[name].distributed:
        return None
    those = " and ".join(optimizers()[each].title for each, known in MEGATRON_OPTIMIZERS.items() if known.distributed)
    which = "a plan is tested with it" if MEGATRON_OPTIMIZERS[name].leaves_to else "Megatron has it"
    return f"--use-distributed-optimizer: {which} for {those}, and the recipe's optimizer is {name}. Drop it."
