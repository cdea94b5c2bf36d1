"""Telling the dead owners of trials from the living."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from mup_megatron.search.owner import Owner, OwnerWatch


@pytest.fixture
def watch() -> OwnerWatch:
    return OwnerWatch(grace_s=3600)


def sleeper() -> subprocess.Popen[bytes]:
    """A process that waits for its input to end."""
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)


def owner_of(pid: int) -> Owner:
    process = psutil.Process(pid)
    return Owner(Owner.this_process().machine, pid, process.create_time() - psutil.boot_time())


def test_an_owner_is_alive_until_it_is_retired(watch: OwnerWatch) -> None:
    first, second = Owner.this_process(), Owner.this_process()
    first.retire()
    assert watch.is_dead(0, first.record(0))
    assert not watch.is_dead(0, second.record(0))


def test_another_process_is_alive_until_it_is_killed_also_as_a_zombie(watch: OwnerWatch) -> None:
    with sleeper() as process:
        record = owner_of(process.pid).record(0)
        assert not watch.is_dead(0, record)
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the process table
        assert watch.is_dead(0, record)
    assert watch.is_dead(0, record)


def test_a_process_that_has_got_the_number_of_a_dead_one_is_another(watch: OwnerWatch) -> None:
    with sleeper() as process:
        record = owner_of(process.pid)
        earlier = replace(record, started=record.started - 60)
        assert watch.is_dead(0, earlier.record(0))
        process.kill()


@pytest.mark.parametrize("record", [{"machine": "elsewhere", "token": "t", "beat": 1}, None])
def test_from_elsewhere_an_owner_is_dead_when_its_heartbeat_stands_still(record: dict[str, object] | None) -> None:
    patient, impatient = OwnerWatch(grace_s=3600), OwnerWatch(grace_s=-1)
    for watch in (patient, impatient):
        assert not watch.is_dead(0, record)  # seen for the first time
    assert not patient.is_dead(0, record)
    assert impatient.is_dead(0, record)


def test_a_heartbeat_keeps_alive() -> None:
    watch = OwnerWatch(grace_s=-1)
    for beat in range(3):
        assert not watch.is_dead(0, {"machine": "elsewhere", "token": "t", "beat": beat})
    assert watch.is_dead(0, {"machine": "elsewhere", "token": "t", "beat": 2})
    # Somebody else has taken the trial over.
    assert not watch.is_dead(0, {"machine": "elsewhere", "token": "u", "beat": 2})
