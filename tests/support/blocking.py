"""A trial that says that it runs and then waits for ever, and the wait for processes to die. For tests of `search/`."""

import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from mup_megatron.search import ReportFn, TrialOutcome, stopping, sweep

LIMIT_S = 120
"""Longer than anything here takes on a busy machine; only a fault reaches it."""


def give_time_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets searches take longer to stop than batch systems would, because no test depends on how fast a machine is."""
    monkeypatch.setattr(stopping, "AT_MOST_S", LIMIT_S)
    monkeypatch.setattr(sweep, "INTERRUPT_S", LIMIT_S / 2)


@dataclass(frozen=True)
class Block:
    """An objective that never ends. It pickles, so a spawned trial can have it too."""

    pipe: Path
    reader: int

    @classmethod
    def new(cls, folder: Path) -> "Block":
        pipe = folder / "running"
        os.mkfifo(pipe)
        return cls(pipe, os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))

    def __call__(self, parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        writer = os.open(self.pipe, os.O_WRONLY)
        os.write(writer, b"!")
        while True:
            signal.pause()

    def wait_until_running(self) -> None:
        """Until one more trial has begun."""
        ready, _, _ = select.select([self.reader], [], [], LIMIT_S)
        assert ready, "no trial has begun"
        assert os.read(self.reader, 1) == b"!"


def own_children() -> list[psutil.Process]:
    """What this process has begun, and what came of it, but for servers of `support.processes` and `support.ds_ranks`.

    Those serve all the tests of a process, and live on.
    """
    found = []
    for child in psutil.Process().children():
        if not _serves_all_tests(child):
            found += [child, *child.children(recursive=True)]
    return found


def _serves_all_tests(child: psutil.Process) -> bool:
    try:
        command = " ".join(child.cmdline())
        return "from multiprocessing." in command or "ds_server" in command
    except psutil.NoSuchProcess:  # a zombie, which a test has left
        return False


def wait_until_dead(processes: Sequence[psutil.Process]) -> None:
    """Until each is gone, or a zombie for its parent to remove. Those that live on are killed, and fail the test."""
    deadline = time.monotonic() + LIMIT_S
    while living := [process for process in processes if _lives(process)]:
        if time.monotonic() > deadline:
            for process in living:
                process.kill()
            raise AssertionError(f"still alive: {living}")
        time.sleep(0.01)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
