"""The experts of a module, and what chooses among them: found by what they are, in any model.

Experts are a list of modules, or one tensor with a matrix for each. Around them are a router, with an output for each
expert, and perhaps a gate of a shared expert, with one output. How many experts there are is no width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mup_megatron.modules.attention import is_attention
from mup_megatron.modules.names import named_modules

_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one layer."""

    name: str
    """Of the module that holds them."""
    count: int
    around: str
    """The module in which their router is."""


@dataclass(frozen=True, slots=True)
class Membership:
    """The experts that a module has to do with: those that it is one of, or those that it is around."""

    of: Experts | None = None
    around: Experts | None = None


class Memberships:
    """The experts of a model, looked up by module."""

    def __init__(self, model: torch.nn.Module) -> None:
        modules = dict(named_modules(model))
        self._held = {experts.name: experts for experts in _found(modules)}
        self._around = {experts.around: experts for experts in self._held.values()}
        self._attentions = {name for name, module in modules.items() if is_attention(module)}

    def of(self, module: str) -> Membership:
        """Returns the experts that a module has to do with.

        An attention beside them has nothing to do with them.
        """
        for outer in _outwards(module):
            if outer in self._held:
                return Membership(of=self._held[outer])
            if outer in self._around:
                return Membership(around=self._around[outer])
            if outer in self._attentions:
                break
        return Membership()

    def counted(self, parameter: str, shape: tuple[int, ...], grows: tuple[bool, ...]) -> int | None:
        """Returns the dimension of a parameter that counts experts: of several in one tensor, or of their router."""
        module = parameter.rpartition(".")[0]
        found = self.of(module)
        if found.of is not None:
            return 0 if module == found.of.name and len(shape) > 1 and shape[0] == found.of.count else None
        if found.around is None:
            return None
        sides = enumerate(zip(shape, grows, strict=True))
        return next((d for d, (size, grow) in sides if size == found.around.count and not grow), None)


def _outwards(name: str) -> Iterator[str]:
    """Yields a module's name and those of the modules that it is in, from the inside."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _found(modules: Mapping[str, torch.nn.Module]) -> Iterator[Experts]:
    for name, module in modules.items():
        count = _count(name, module)
        if count:
            parts = name.split(".")
            outermost = next((n for n, part in enumerate(parts) if "expert" in part.lower()), len(parts) - 1)
            yield Experts(name, count, ".".join(parts[:outermost]))


def _count(name: str, module: torch.nn.Module) -> int:
    """Returns how many experts a module holds; 0 where it holds none."""
    own = name.rpartition(".")[2].lower()
    if isinstance(module, _LISTS):
        return len(module) if own.endswith("experts") else 0
    if "expert" not in own + type(module).__name__.lower():
        return 0
    return next((len(p) for p in module.parameters(recurse=False) if p.dim() == 3), 0)
