"""A table of what one framework makes of each optimizer: every adapter has one. Their rules are in `theory/`."""

from collections.abc import Iterable
from typing import TypeVar

from mup_megatron.errors import InputError

Known = TypeVar("Known")


class ByOptimizer(dict[str, Known]):
    """A framework's table of optimizers, by their names in a recipe.

    Asking for an optimizer that was not registered raises InputError, which names those that were.
    """

    def __init__(self, framework: str) -> None:
        """Begins an empty table of a framework, as messages call it."""
        super().__init__()
        self._framework = framework

    def register(self, name: str, known: Known) -> None:
        """Adds an optimizer that has its rules in `theory.optimizers`."""
        assert name not in self, name
        self[name] = known

    def __missing__(self, name: str) -> Known:
        """Raises InputError."""
        raise InputError(
            f"parametrization.optimizer: the recipe's is {name}, and for {self._framework} there is {self.names}. Take "
            "a recipe for one of these."
        )

    def only(self, stepping: Iterable[str]) -> Known:
        """Returns what was registered for the one optimizer that steps all tensors, where a run can have but one.

        Args:
            stepping: the names of those that step a plan's tensors, or a recipe's.

        Raises:
            InputError: there are several, or the one was not registered.
        """
        first, *others = dict.fromkeys(stepping)
        if others:
            raise InputError(
                f"parametrization.optimizer: the recipe's steps some tensors by {first} and some by "
                f"{' and '.join(others)}, and for {self._framework} a run has one optimizer. Take a recipe whose "
                "optimizer steps all."
            )
        return self[first]

    @property
    def names(self) -> str:
        """The optimizers within a sentence: "adam, sgd and muon"."""
        *first, last = self
        return f"{', '.join(first)} and {last}" if first else last
