"""The best trials of another study, as a study holds them that runs them again. Not the selecting: see `study.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One trial of the other study."""

    trial: int
    """Its number there."""
    loss: float
    """What it came to there."""
    parameters: Mapping[str, float]


@dataclass(frozen=True)
class Selection:
    """Complete trials of another study, the lowest loss first. A slot of the study that has it runs one of them."""

    study: str
    """The other study's name."""
    candidates: tuple[Candidate, ...]

    def at(self, slot: int) -> Candidate | None:
        """Returns what a slot runs. None for a slot too many, which no call runs: two made their last trial at once."""
        return self.candidates[slot] if slot < len(self.candidates) else None

    def to_json(self) -> dict[str, Any]:
        """Returns plain values. Short: a database server may limit a study's attribute to 64 KiB, some 200 trials."""
        names = list(self.candidates[0].parameters) if self.candidates else []
        return {
            "study": self.study,
            "parameters": names,
            "trials": [
                [candidate.trial, candidate.loss, *(candidate.parameters[name] for name in names)]
                for candidate in self.candidates
            ],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Selection":
        """Inverts `to_json`."""
        names = content["parameters"]
        return cls(
            content["study"],
            tuple(
                Candidate(trial, loss, dict(zip(names, values, strict=True)))
                for trial, loss, *values in content["trials"]
            ),
        )
