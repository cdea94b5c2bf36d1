"""Messages about a run that is not what its plan says: single problems, and one message made of many."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mup_megatron.theory import family_of

SHOWN = 5
"""How many problems a message describes; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One value that is not what the plan says."""

    name: str
    """Of the parameter or module; "schedule" for what belongs to none."""
    quantity: str
    expected: str
    found: str
    cause: str
    """One sentence or two with the remedy."""

    def __str__(self) -> str:
        return self.described()

    def described(self, others: int = 0) -> str:
        """Returns the problem in one line, which says of how many further layers it holds."""
        layers = f" (and {others} more layer{'s' if others > 1 else ''})" if others else ""
        return f"{self.name}{layers}: {self.quantity} should be {self.expected} and is {self.found}. {self.cause}"


def number(value: float | None) -> str:
    """Returns a value as messages show it."""
    return "not set" if value is None else f"{value:.6g}"


def message(problems: Iterable[Problem], *, of: str = "This run is not what its recipe says") -> str:
    """Returns all problems in a few lines, after a line on what they are `of`.

    What is the same in many layers, or on many ranks, is said once. One problem of each quantity and cause comes before
    the second of any, so that a mistake with many victims does not hide another.
    """
    alike: dict[tuple[str, str, str, str], list[Problem]] = {}
    for p in problems:
        alike.setdefault((family_of(p.name), p.quantity, p.expected, p.cause), []).append(p)
    seen: Counter[tuple[str, str]] = Counter()
    turns = []
    for (_, quantity, _, cause), group in alike.items():
        turns.append((seen[quantity, cause], group))
        seen[quantity, cause] += 1
    ordered = [group for _, group in sorted(turns, key=lambda turn: turn[0])]
    lines = [f"  {group[0].described(len({p.name for p in group}) - 1)}" for group in ordered[:SHOWN]]
    rest = Counter(group[0].quantity for group in ordered[SHOWN:] for _ in {p.name for p in group})
    if rest:
        lines.append("  Besides: " + ", ".join(f"{count} × {quantity}" for quantity, count in rest.items()) + ".")
    return "\n".join([f"{of}, so it was stopped:", *lines])
