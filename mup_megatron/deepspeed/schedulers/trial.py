"""A trial of a scheduler: a copy of it with an optimizer of its own takes the steps that it would take."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch

_STEPS = 10_000
_FAR = (20_011, 100_003, 1_000_003, 10_000_019)
"""Steps jumped to, where a scheduler can: primes, which no period of it divides."""

_POSITIONS = ("epoch", "last_batch_iteration", "batch_iteration")
"""How torch and DeepSpeed call an argument of step() that says which step it is."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def first_step(scheduler: Any) -> None:
    """Takes the first step of a copy; raises whatever the scheduler raises."""
    twin = _twin(scheduler)
    twin.step(**_arguments(twin, 1))


def steps(scheduler: Any) -> Iterator[tuple[int, list[float]]]:
    """Yields (step from now, learning rates) of a copy; ends early where the schedule does."""
    twin = _twin(scheduler)
    yield 0, _learning_rates(twin)
    for step in (*range(1, _STEPS + 1), *_FAR):
        arguments = _arguments(twin, step)
        if step > _STEPS and not any(value == step for value in arguments.values()):
            return  # it can't jump
        try:
            twin.step(**arguments)
        except Exception:
            if step == 1:
                raise
            return  # behind its end
        yield step, _learning_rates(twin)


def _arguments(scheduler: Any, step: int) -> dict[str, Any]:
    """Returns what step() is to be called with: what it asks for, and where it is to jump to."""
    parameters = inspect.signature(scheduler.step).parameters
    asked = [name for name, each in parameters.items() if each.default is each.empty and each.kind not in _VARIADIC]
    if step > _STEPS:
        asked += [name for name in _POSITIONS if name in parameters and name not in asked]
    # A metric that stays is a plateau; anything else counts.
    return {name: 1.0 if "metric" in name or "loss" in name else step for name in asked}


def _learning_rates(scheduler: Any) -> list[float]:
    return [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def _twin(scheduler: Any) -> Any:
    """Returns a copy of a scheduler on an optimizer of its own, with the same groups but for what is trained."""
    optimizer = scheduler.optimizer
    alone = torch.optim.SGD([{"params": [torch.zeros(1)]} for _ in optimizer.param_groups])
    alone.defaults = dict(getattr(optimizer, "defaults", {}))
    memo: dict[int, Any] = {id(optimizer): alone}
    for own, group in zip(alone.param_groups, optimizer.param_groups, strict=True):
        own.update({key: copy.deepcopy(value) for key, value in group.items() if key != "params"})
        memo[id(group)] = own
    return copy.deepcopy(scheduler, memo)
