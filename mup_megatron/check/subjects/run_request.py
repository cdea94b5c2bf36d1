"""The request to a run of a launch line to measure itself: a file of its own, beside which it writes what it found."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mup_megatron.check.measure.measurements import RunProtocol
from mup_megatron.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A request of what a run is to measure; a file of its own for each run."""

    width: int
    seed: int
    """By which the run is called."""
    protocol: RunProtocol

    def write(self, path: Path) -> None:
        """Writes it for `read`, in the process that trains."""
        write_atomically(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "RunRequest":
        """Returns the request that `write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        protocol = content["protocol"]
        recorded = tuple(protocol.pop("recorded"))
        return cls(width=content["width"], seed=content["seed"], protocol=RunProtocol(**protocol, recorded=recorded))


def result_of(request: Path) -> Path:
    """Returns the file into which the run of a request is written."""
    return request.with_name(f"{request.name}.run")
