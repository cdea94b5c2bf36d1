"""Dropout, off for the time of a check of torch modules: what differs between two runs would be its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from mup_megatron.modules.forward import FUSED_ATTENTION

_DROPPING = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_FUSED = FUSED_ATTENTION.__name__
_ITS_PROBABILITY = 4
"""Which of the fused attention's arguments it is, where it has no name."""


@contextmanager
def without_dropout() -> Iterator[None]:
    """For the time of it, torch's dropouts let everything pass, those of its modules and of fused attention too.

    A name that somebody has imported from `torch.nn.functional` before is theirs, and goes on dropping.
    """
    before = {name: getattr(functional, name) for name in (*_DROPPING, _FUSED)}
    for name in _DROPPING:
        setattr(functional, name, _all_of_it)
    setattr(functional, _FUSED, _fused_without(before[_FUSED]))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)


def drops(model: nn.Module) -> bool:
    """Returns whether a model has modules that drop something."""
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules())


def _all_of_it(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return input


def _fused_without(attend: Any) -> Any:
    @wraps(attend)
    def attended(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) > _ITS_PROBABILITY:
            args = (*args[:_ITS_PROBABILITY], 0.0, *args[_ITS_PROBABILITY + 1 :])
        kwargs = {key: 0.0 if key == "dropout_p" else value for key, value in kwargs.items()}
        result: Tensor = attend(*args, **kwargs)
        return result

    return attended
