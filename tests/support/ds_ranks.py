"""Runs a function in N gloo processes with DeepSpeed on the CPU, and brings back each one's result.

As `processes.run_ranks`, but without Megatron's CPU runtime, which makes torch believe in a GPU. The processes are
forked from a server of their own (`ds_server.py`), so a run starts in a fraction of a second. A hang ends by itself.
"""

import contextlib
import io
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.processes import HANGS_AFTER_S, RankFailure

_TESTS = Path(__file__).parents[1]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = HANGS_AFTER_S,
    collective_s: float | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` in `world_size` processes of one gloo group; return their results by rank.

    `function` must be importable by name (the top level of a test module), and arguments and results must pickle. No
    process outlives the call.

    Args:
        function: called on every rank, within the default process group.
        world_size: number of processes.
        args: for the function.
        timeout_s: seconds after which everything is killed.
        collective_s: seconds after which a collective gives up; `timeout_s` by default.
        kwargs: for the function.

    Raises:
        RankFailure: with the traceback of the rank that failed first, or after `timeout_s` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = pickle.dumps((function, args, kwargs))
        settings = {"job": job, "folder": folder, "timeout_s": timeout_s, "collective_s": collective_s or timeout_s}
        pids = _start(pickle.dumps((world_size, settings)))
        try:
            return _collect(Path(folder), pids, timeout_s)
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


def _collect(folder: Path, pids: Sequence[int], timeout_s: float) -> list[Any]:
    """Each rank's result, or RankFailure for the first that ends with a failure: others only notice that it is gone."""
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        poll, pending = select.poll(), {}
        for rank, pid in enumerate(pids):
            try:
                ended = os.pidfd_open(pid)
            except ProcessLookupError:
                results[rank] = _result(folder, rank, len(pids))
                continue
            stack.callback(os.close, ended)
            poll.register(ended, select.POLLIN)
            pending[ended] = rank
        while pending:
            ready = poll.poll(max(0.0, 1000 * (deadline - time.monotonic())))
            if not ready:
                late = ", ".join(str(rank) for rank in pending.values())
                raise RankFailure(f"rank {late} not finished after {timeout_s} s; see stderr for where it stood")
            for ended, _ in ready:
                poll.unregister(ended)
                rank = pending.pop(ended)
                results[rank] = _result(folder, rank, len(pids))
    return [results[rank] for rank in range(len(pids))]


def _result(folder: Path, rank: int, world_size: int) -> Any:
    report = folder / f"report.{rank}"
    if not report.exists():
        raise RankFailure(f"rank {rank} died")
    ok, value = torch.load(io.BytesIO(report.read_bytes()), weights_only=False)
    if not ok:
        raise RankFailure(f"rank {rank} of {world_size} failed:\n{value}")
    return value


def _start(request: bytes) -> list[int]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(len(request).to_bytes(8, "big") + request)
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server of DeepSpeed's ranks has ended; see stderr"
    return [int(pid) for pid in answer.split()]


@cache
def _server() -> "subprocess.Popen[bytes]":
    """Ends with this process, whose end closes its standard input."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed's Muon would be compiled for minutes, to be run for seconds
    }
    return subprocess.Popen(
        [sys.executable, "-m", "support.ds_server"],
        cwd=_TESTS,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
