"""A flag of Megatron-LM's as data, and how its word becomes a value."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.validation import brief

_BITS = 63
"""Of a whole number: no size, length or count of Megatron's has more."""


def whole_number(text: str) -> int:
    """Returns what argparse's `type=int` makes of a word."""
    try:
        value = int(text)
    except ValueError:
        raise InputError(f"'{brief(text, 60)}' is not a whole number") from None
    if value.bit_length() > _BITS:
        raise InputError(f"'{brief(text, 60)}' is too large")
    return value


def number(text: str) -> float:
    """Returns what argparse's `type=float` makes of a word, without NaN and infinity."""
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"'{brief(text, 60)}' is not a number") from None
    if not math.isfinite(value):
        raise InputError(f"'{brief(text, 60)}' is not a finite number")
    return value


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag, and the attribute of Megatron's namespace that it sets."""

    name: str
    key: str
    default: Any
    """The attribute's value without the flag."""
    parse: Callable[[str], Any] | None = None
    """What its word becomes; None where the flag takes none and turns `default` into its opposite."""
    refusal: str = ""
    """For what a model file cannot say and the plan cannot allow: why, and what to do."""
    fine: tuple[Any, ...] = ()
    """Other values that change nothing."""
    many: bool = False
    """Its value is several words, up to the next flag: here they are one, with spaces."""

    def value(self, word: str) -> Any:
        """Returns the attribute that a word gives; InputError names the flag."""
        assert self.parse is not None
        try:
            return self.parse(word)
        except InputError as error:
            raise InputError(f"{self.name}: {error}. Correct this value.") from None

    def words(self, value: Any) -> tuple[str, ...]:
        """Returns what says a value on a command line; that of a flag without a word is not the default."""
        if self.parse is None:
            return (self.name,)
        if isinstance(value, tuple):
            words = tuple(map(_word, value))
            # A list is one word also where a shell splits words at spaces.
            return (self.name, *words) if self.many else (self.name, f"[{','.join(words)}]")
        return (self.name, _word(value))

    def found(self, values: Mapping[str, Any]) -> Any:
        """Returns what parsed arguments have; Megatron's default where they lack it."""
        found = values.get(self.key, self.default)
        return " ".join(map(str, found)) if self.many and isinstance(found, list) else found

    def changed(self, values: Mapping[str, Any]) -> bool:
        """Returns whether parsed arguments have something else than Megatron's default; off in either way is off."""
        found = self.found(values)
        return bool(found != self.default and (found or self.default) and found not in self.fine)


def _word(value: Any) -> str:
    # Megatron's own parser reads the shortest decimal that is this very float.
    return value if isinstance(value, str) else repr(value)
