"""What came of many small trainings, of which a test looks at a few."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

CaseT = TypeVar("CaseT", bound=Hashable)
OutcomeT = TypeVar("OutcomeT")


class Trained(Generic[CaseT, OutcomeT]):
    """Case → outcome. Cases of a group share processes, and are trained when the first of them is asked for."""

    def __init__(self, train: Callable[[Sequence[CaseT]], Mapping[CaseT, OutcomeT]], *groups: Sequence[CaseT]) -> None:
        self._train = train
        self._groups = groups
        self._outcomes: dict[CaseT, OutcomeT] = {}

    def __getitem__(self, case: CaseT) -> OutcomeT:
        if case not in self._outcomes:
            self._outcomes |= self._train(next(group for group in self._groups if case in group))
        return self._outcomes[case]
