"""The values that the plan gave the optimizer's groups, kept across Megatron's loading of a checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.megatron.optimizer import Override, overrides_by_name, parts_of
from mup_megatron.theory import Plan

_VALUES = ("max_lr", "min_lr", "wd_mult", "lr_mult", "eps", "optimizer")
"""What a group holds that the plan decides."""


def _groups(optimizer: Any) -> Iterator[dict[str, Any]]:
    for part in parts_of(optimizer):
        yield from part.param_groups


@contextmanager
def values_kept(optimizer: Any) -> Iterator[None]:
    """Puts the plan's values of each group back afterwards, whatever a load wrote into the groups.

    Megatron finds a saved group by some of its values and then takes all of them from the checkpoint; which ones it
    looks at, and what --override-opt-param-scheduler does to them, differs between versions.
    """
    before = [{key: group[key] for key in _VALUES if key in group} for group in _groups(optimizer)]
    yield
    groups = list(_groups(optimizer))
    assert len(groups) == len(before)
    for group, values in zip(groups, before, strict=True):
        group.update(values)


def show_as(optimizer: Any, before: Plan, now: Plan) -> None:
    """Gives the groups the values they had under another plan, for Megatron to find them in its checkpoint.

    To be called within `values_kept`.

    Raises:
        InputError: the two plans group the parameters differently, so the saved state cannot be matched.
    """
    if before.fingerprint == now.fingerprint:
        return
    old, new = overrides_by_name(before), overrides_by_name(now)
    pairs = [(_full(name, new, now), _full(name, old, before)) for name in new]
    former = dict(pairs)
    consistent = all(former[here] == there for here, there in pairs)
    # Megatron's order of groups, in which the torch format stores their parameters.
    in_order = sorted(former) == sorted(former, key=lambda values: former[values])
    if not consistent or not in_order or len(set(former.values())) < len(former):
        raise InputError(
            "--mup-accept-recipe-change: the two recipes tell other parameters apart, so the optimizer's state cannot "
            "be matched. Begin with a new one: --no-load-optim."
        )
    for group in _groups(optimizer):
        group.update(former[_key({key: group[key] for key in _VALUES if key in group})])


def _full(name: str, overrides: Mapping[str, Override], plan: Plan) -> tuple[tuple[str, Any], ...]:
    """Returns all that the group of a parameter holds."""
    base = {"max_lr": plan.lr, "min_lr": plan.min_lr, "wd_mult": 1.0, "lr_mult": 1.0}
    entry = plan[name]
    eps = {} if entry.eps is None else {"eps": plan.adam_eps}
    # Where Megatron itself leaves a parameter to another optimizer, no override says so, and its group does.
    other = {} if entry.optimizer == plan.optimizer else {"optimizer": entry.optimizer}
    return _key({**base, **eps, **other, **overrides[name]})


def _key(values: Override) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(values.items()))
