"""A hybrid model's pattern of layers in its parts; what its letters mean is in `hybrid.py`."""

from dataclasses import dataclass

BOUNDARY, FURTHER = "|", "/"
"""Between two pipeline stages; before the letters within a layer of multi-token prediction."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern in its parts: `M*|M*/MM/MM` has two pipeline stages, and two layers of multi-token prediction."""

    stages: tuple[str, ...]
    """The letters between boundaries, where there are any; else all of the stack's are one."""
    further: tuple[str, ...]
    """The letters within each layer of multi-token prediction."""

    @classmethod
    def of(cls, text: str) -> "Pattern":
        """Takes a text apart, whatever its letters are."""
        stack, *further = text.split(FURTHER)
        return cls(tuple(stack.split(BOUNDARY)), tuple(further))

    def __str__(self) -> str:
        return FURTHER.join((BOUNDARY.join(self.stages), *self.further))

    @property
    def letters(self) -> str:
        """The letter of each layer of the stack."""
        return "".join(self.stages)

    @property
    def all_letters(self) -> str:
        """Those, and the ones within layers of multi-token prediction."""
        return "".join((*self.stages, *self.further))
