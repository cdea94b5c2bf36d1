"""The list of mistakes, and how one enters it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exam.setups import Setup
from exam.subjects import SUBJECTS

Place = Literal["model code", "initial weights", "optimizer", "schedule", "training loop", "recipe"]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One mistake."""

    name: str
    what: str
    """In a sentence."""
    where: Place
    breaks: Literal["plan", "transfer"]
    subject: str
    """The right set-up in which it is made: a key of SUBJECTS."""
    make: Callable[[Any], Setup]
    culprits: Sequence[str]
    """Patterns of names that are right to be named first; none where nobody can say."""

    @property
    def right(self) -> Setup:
        """Without it."""
        return SUBJECTS[self.subject]()

    @property
    def wrong(self) -> Setup:
        """With it."""
        return self.make(self.right)


MISTAKES: dict[str, Mistake] = {}


def mistake(
    subject: str, where: Place, *culprits: str, breaks: Literal["plan", "transfer"] = "plan"
) -> Callable[[Callable[[Any], Setup]], Callable[[Any], Setup]]:
    """Enters a function into the list."""

    def enter(function: Callable[[Any], Setup]) -> Callable[[Any], Setup]:
        name = function.__name__.replace("_", "-")
        assert function.__doc__ is not None, name
        assert name not in MISTAKES, name
        what = " ".join(function.__doc__.split())
        MISTAKES[name] = Mistake(
            name=name, what=what, where=where, breaks=breaks, subject=subject, make=function, culprits=culprits
        )
        return function

    return enter
