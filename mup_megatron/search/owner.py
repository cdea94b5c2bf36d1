"""The process that runs a trial, and if it is still alive. Knows nothing of databases.

On the owner's own machine its process is looked up, so a death shows at once. From elsewhere only the heartbeat can be
watched: a counter that the owner raises. Each observer measures with its own clock how long the counter has stood
still, so clocks need not agree.
"""

import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

SAME_START_S = 1.0
"""Two processes with one number that began closer together than this are the same process."""

_living_here: set[str] = set()
"""Tokens of the owners of this process that have not been retired."""


def this_machine() -> str:
    """Returns what tells apart two places where one process number can mean different processes."""
    parts = [socket.gethostname()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists():
        parts.append(boot.read_text().strip())
    if namespace.is_symlink():  # two containers may have the same name
        parts.append(os.readlink(namespace))
    return "/".join(parts)


def _started(process: psutil.Process) -> float:
    """Seconds from the machine's start to the process's: a number that does not move when the clock is set."""
    status = Path(f"/proc/{process.pid}/stat")
    if not status.exists():
        return float(process.create_time() - psutil.boot_time())
    # psutil adds the time of the machine's start, and some releases remember that from before the clock was set.
    after_name = status.read_text().rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Owner:
    """One sweep in one process: what a trial records about who runs it."""

    machine: str
    pid: int
    started: float
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells apart several sweeps of one process."""

    @classmethod
    def this_process(cls) -> "Owner":
        """Returns a new owner in this process, alive until it is retired."""
        owner = cls(this_machine(), os.getpid(), _started(psutil.Process()))
        _living_here.add(owner.token)
        return owner

    def retire(self) -> None:
        """Says that this owner runs no trials any more, although its process goes on."""
        _living_here.discard(self.token)

    def record(self, beat: int) -> dict[str, Any]:
        """Returns what a trial stores: this owner and its heartbeat."""
        return {**asdict(self), "beat": beat}


class OwnerWatch:
    """Finds owners that are dead."""

    def __init__(self, grace_s: float) -> None:
        """After `grace_s` seconds without a heartbeat an owner that cannot be looked up counts as dead."""
        self._grace_s = grace_s
        self._machine = this_machine()
        self._last_change: dict[int, tuple[object, float]] = {}

    def is_dead(self, trial: int, record: Mapping[str, Any] | None) -> bool:
        """Says if the owner of the running trial number `trial` is dead, given what the trial has stored of it."""
        if record is not None and record["machine"] == self._machine:
            return not _is_alive_here(record)
        return self.stands_still(trial, record)

    def stands_still(self, trial: int, record: Mapping[str, Any] | None) -> bool:
        """Says if what a trial has stored of its owner has been the same for too long."""
        now = time.monotonic()
        mark = (record["token"], record["beat"]) if record is not None else None
        seen, since = self._last_change.get(trial, (None, now))
        if trial not in self._last_change or seen != mark:
            self._last_change[trial] = (mark, now)
            return False
        return now - since > self._grace_s

    def begin_again(self) -> None:
        """Counts no time before now: while the storage is away, nobody can show anything."""
        self._last_change.clear()


def _is_alive_here(record: Mapping[str, Any]) -> bool:
    if record["pid"] == os.getpid():
        return record["token"] in _living_here
    try:
        process = psutil.Process(record["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(_started(process) - float(record["started"])) < SAME_START_S
    except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
        return False
