"""Keys of a model file that say nothing, because another key does not ask for what they are about."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from operator import not_
from typing import Any

__all__ = ["Unread", "absent", "only_with", "unread", "without"]


@dataclass(frozen=True, slots=True)
class Unread:
    """Keys that a model file may have off their defaults only where another key's value has them read."""

    keys: Collection[str]
    why: str
    """Why they say nothing, and what to do."""
    switch: str = ""
    """The other key; none where no model has what they are about."""
    read: Callable[[Any], object] = bool
    """Returns something true for a value of the other key with which they are read."""
    on_lines: bool = True
    """Whether Megatron takes no notice of them on a command line, so that they are left out of what it says."""

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Returns whether Megatron reads none of the keys beside these values."""
        return not (self.switch and self.read(values[self.switch]))


def only_with(switch: str, *keys: str, on_lines: bool = True) -> Unread:
    """Returns keys that are read where the other is there."""
    why = f"without {switch} Megatron does not read it. Add that key, or remove this."
    return Unread(keys, why, switch, on_lines=on_lines)


def without(switch: str, *keys: str) -> Unread:
    """Returns keys that are read where the other is not there."""
    return Unread(keys, f"with {switch} Megatron does not read it. Remove this key.", switch, not_)


def absent(why: str, *keys: str) -> Unread:
    """Returns keys of layers that no model of a kind has."""
    return Unread(keys, f"{why} Remove the key.", on_lines=False)


def unread(said: Collection[Unread], values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yields, by key, what is wrong with values that are off their defaults and say nothing."""
    for each in said:
        if each.applies(values):
            yield from (f"{key}: {each.why}" for key in sorted(each.keys) if values[key] != defaults[key])


def as_read(said: Collection[Unread], values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a command line's values as Megatron reads them: what says nothing is at its default.

    A switch that is off in another way, as a number of experts that is 0, is off.
    """
    read = dict(values)
    for each in said:
        if each.on_lines and each.applies(read):
            off = () if read[each.switch] else (each.switch,)
            read |= {key: defaults[key] for key in (*off, *each.keys) if key in read}
    return read
