"""The verdict: pass or fail, where, and why. Plain data; how it is told is in `report/`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from mup_megatron.architectures.measured import Measured
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import Key, Measurements
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.comparison import Compared, Comparison, Finding
from mup_megatron.theory import PlanEntry

WITHOUT_DROPOUT = "Dropout is off in the check, so that differences are not its own."
"""A remark, wherever it was on."""


class CheckOutcome(StrEnum):
    """The outcome of a check."""

    PASS = "pass"
    FAIL = "fail"
    NO_VERDICT = "no verdict"
    """Nothing can be concluded, and it says why. Not a pass."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One of the checks."""

    name: str
    outcome: CheckOutcome
    lines: tuple[str, ...]
    """What it found, in words."""
    findings: tuple[Finding, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()
    """Its table, for a file."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The conclusion of a check, and what it is drawn from."""

    outcome: CheckOutcome
    level: Level
    fingerprint: str
    """The recipe's."""
    culprit: str | None
    """The parameter or activation at fault."""
    causes: tuple[Cause, ...]
    """Most likely first."""
    sections: tuple[Section, ...]
    remarks: tuple[str, ...]
    widths: tuple[int, ...]
    seeds: int
    seconds: float
    subject: Measurements = field(repr=False)
    reference: Measurements = field(repr=False)
    control: Measurements = field(repr=False)
    """The same shape in standard parametrization."""
    comparison: Comparison = field(repr=False)
    """Subject against reference."""
    control_comparison: Comparison = field(repr=False)
    """Control against reference."""
    measured: tuple[Measured, ...] = field(default=(), repr=False)
    """The modules of an architecture that were looked at, in the order of a forward pass; none of a torch module."""
    entries: Mapping[str, PlanEntry] = field(default_factory=dict, repr=False)
    """What each parameter is, by name; of one width."""

    @property
    def passed(self) -> bool:
        """True where the run may begin."""
        return self.outcome is CheckOutcome.PASS

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the single runs."""
        return {
            "outcome": self.outcome.value,
            "level": self.level.value,
            "fingerprint": self.fingerprint,
            "culprit": self.culprit,
            "causes": [asdict(cause) for cause in self.causes],
            "sections": [
                {
                    "name": section.name,
                    "outcome": section.outcome.value,
                    "lines": list(section.lines),
                    "findings": [
                        {**_as_json(f.key, f.compared), "off": f.kind.value, "sentence": f.sentence}
                        for f in section.findings
                    ],
                    "rows": [dict(row) for row in section.rows],
                }
                for section in self.sections
            ],
            "remarks": list(self.remarks),
            "widths": list(self.widths),
            "seeds": self.seeds,
            "seconds": self.seconds,
            "comparison": [_as_json(key, compared) for key, compared in self.comparison.items()],
        }


def _as_json(key: Key, compared: Compared) -> dict[str, Any]:
    return {
        "quantity": key.quantity.value,
        "name": key.name,
        "step": key.step,
        "slope": asdict(compared.subject),
        "expected_slope": asdict(compared.reference),
        "factor": compared.factor,
        "deviations": {str(width): value for width, value in compared.deviations.items()},
    }
