"""Finds the base's counterpart of a tensor of the target: the same name, or the same place in another layer."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.tensors import Tensor

_INDEX = re.compile(r"\.\d+(?=\.|$)|(?<=\.linear_fc\d\.weight)\d+$|(?<=\.linear_fc\d\.bias)\d+$")
"""Of a layer or an expert: a part of a name by itself, or the end of one where a linear layer has many matrices."""

T = TypeVar("T")


def family_of(name: str) -> str:
    """Returns a name without the index of its layer and expert: what is the same for all of them."""
    return _INDEX.sub(lambda index: ".*" if index[0].startswith(".") else "*", name)


def by_family(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns names that differ in layer indices alone, in order, by what they share."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family_of(name), []).append(name)
    return families


class Counterparts(Generic[T]):
    """The base's values by name, looked up by the target's names: depth may differ where layers are alike."""

    def __init__(self, at_base: Mapping[str, T], *, alike: Callable[[T, T], bool]) -> None:
        self._at_base, self._alike = at_base, alike
        self._families = by_family(at_base)
        self._firsts: dict[str, T] = {}
        """Of families whose members are known to be alike."""

    def of(self, name: str) -> T:
        """Returns the base's value for a name of the target.

        Raises:
            PlanError: the base has no such name, or several layers of different kinds that could be meant.
        """
        if name in self._at_base:
            return self._at_base[name]
        family = family_of(name)
        if family in self._firsts:
            return self._firsts[family]
        alike = self._families.get(family)
        if not alike:
            raise PlanError(
                f"{name}: the base has no such parameter, so its width ratio is unknown. "
                "Give the base the target's architecture."
            )
        first = self._at_base[alike[0]]
        for other in alike:
            if not self._alike(first, self._at_base[other]):
                raise PlanError(
                    f"{other}: the base has layers of different sizes (compare {alike[0]}), so no width ratio "
                    "is defined. Give the base layers of one size, or the target's depth."
                )
        self._firsts[family] = first
        return first


def counterparts(tensors: Iterable[Tensor]) -> Counterparts[Tensor]:
    """Returns the base's tensors as the counterparts of a target's."""
    return Counterparts(
        {tensor.name: tensor for tensor in tensors},
        alike=lambda one, other: (one.fan_in, one.fan_out) == (other.fan_in, other.fan_out),
    )
