"""Runs a function in N gloo processes, as torchrun would, and brings back each one's result.

The processes are forked from a server that has imported torch and Megatron once, so a run starts in a fraction of a
second; the server itself holds no threads and no state of the test process. Not a launcher for users.
"""

import contextlib
import datetime
import faulthandler
import importlib
import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

_PRELOAD = "support.preload"

HANGS_AFTER_S = 900
"""What still runs then is taken to hang. Far beyond what anything takes here, because other machines are slower."""


class RankFailure(AssertionError):
    """A rank raised, died or did not finish. The message holds that rank's traceback."""


class _Report(NamedTuple):
    ok: bool
    value: Any


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = HANGS_AFTER_S, **kwargs: Any
) -> list[Any]:
    """Call `function(*args, **kwargs)` in `world_size` processes of one gloo group; return their results by rank.

    Each process has the environment torchrun gives (RANK, WORLD_SIZE, LOCAL_RANK), one thread, the default process
    group and the CPU runtime enabled. `function` must be importable by name (the top level of a test module), and
    arguments and results must pickle; tensors are copied.

    Raises RankFailure with the rank's traceback as soon as one rank fails, or after `timeout_s` seconds in all. No
    process outlives the call.
    """
    context = fork_server()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            job = pickle.dumps((function, args, kwargs))
            # Not a daemon: saving a torch_dist checkpoint starts a process of its own.
            process = context.Process(target=_rank_main, args=(rank, world_size, store, timeout_s, job, sender))
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            results = _collect(ranks, timeout_s)
            for process, _ in ranks:
                process.join(10)  # time to end by itself what it started
            return results
        finally:
            for process, receiver in ranks:
                _end(process)
                receiver.close()


def _end(process: ForkServerProcess) -> None:
    """Kill the rank and what it started. They are one session, whose number outlives its first process."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _collect(ranks: list[tuple[ForkServerProcess, Connection]], timeout_s: float) -> list[Any]:
    """Each rank's result, or RankFailure for the first that reports a failure: others only notice that it is gone."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    pending = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(str(rank) for rank in pending.values())
            raise RankFailure(f"rank {late} not finished after {timeout_s} s; see stderr for where it stood")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = pending.pop(receiver)
            try:
                report = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
            except EOFError:
                ranks[rank][0].join(10)
                raise RankFailure(f"rank {rank} died with exit code {ranks[rank][0].exitcode}") from None
            if not report.ok:
                raise RankFailure(f"rank {rank} of {len(ranks)} failed:\n{report.value}")
            results[rank] = report.value
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(rank: int, world_size: int, store: str, timeout_s: float, job: bytes, sender: Connection) -> None:
    os.setsid()
    size = str(world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    torch.set_num_threads(1)
    # A hanging rank says where it hangs before the parent ends it.
    faulthandler.dump_traceback_later(0.9 * timeout_s, exit=False)
    try:
        importlib.import_module(_PRELOAD)  # the server passes over a preload that fails; here it is an error
        function, args, kwargs = pickle.loads(job)
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_s)
        )
        report = _pack(_Report(True, function(*args, **kwargs)))
        # Nobody hangs up while another is still in the last collective.
        torch.distributed.barrier()
    except BaseException:
        report = _pack(_Report(False, traceback.format_exc()))
    sender.send_bytes(report)
    sender.close()
    faulthandler.cancel_dump_traceback_later()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _pack(report: _Report) -> bytes:
    """The report for `torch.load`. Megatron makes plain pickles of tensors refer to itself: their reader imports it."""
    buffer = io.BytesIO()
    torch.save(report, buffer)
    return buffer.getvalue()


def fork_server() -> multiprocessing.context.ForkServerContext:
    """The context whose server, started with the first process, has imported `support.preload` and runs no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    with _server_environment():
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _server_environment() -> Iterator[None]:
    """What the server and all ranks inherit: where to import from, one thread, and loopback as gloo's interface."""
    loopback = next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
    wanted = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback,
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
