"""A server of a storage for searches on many machines: Optuna's gRPC proxy, in front of a database that it alone uses.

Whoever reaches its port can read and change every study: it asks for no name and no password.
"""

import contextlib
import socket
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning

from mup_megatron.errors import InputError
from mup_megatron.search.storage import Storage, in_address, open_storage, parts_of, shown, sqlite_file

THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})


class _OneAtATime(ThreadPoolExecutor):
    """Answers one request after the other, and none while another process changes the same SQLite file."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(max_workers=1)
        self._storage = storage

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def answer() -> Any:
            with self._storage.lock():
                return fn(*args, **kwargs)

        return super().submit(answer)


def serve(url: str, host: str, port: int, *, say: Callable[[str], None]) -> None:
    """Serves a storage until the process is told to end.

    Args:
        url: the storage, made if it is a file that does not exist.
        host: the address to listen at.
        port: likewise.
        say: told what to give to searches as their storage, before the first request is answered.

    Raises:
        InputError: the storage cannot be served, or the port be listened at.
    """
    kind = parts_of(url).drivername
    if kind in ("journal", "grpc"):
        raise InputError(f"--storage {shown(url)}: only databases can be served. Give it to the searches as it is.")
    if kind.startswith("sqlite") and sqlite_file(parts_of(url)) is None:
        raise InputError(f"--storage {shown(url)}: in memory, and lost with the server. Write sqlite:///FILE.")
    _require_free(host, port)
    with open_storage(url, create=True) as storage, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        _know_trials(storage)
        # Optuna numbers trials by reading and then writing, which two threads must not do at once on SQLite.
        threads = _OneAtATime(storage) if storage.excludes else None
        say(f"{storage.label} is served at grpc://{in_address(host)}:{port}")
        with threads or contextlib.nullcontext():
            try:
                optuna.storages.run_grpc_proxy_server(
                    storage.backend, host=in_address(host), port=port, thread_pool=threads
                )
            except (ImportError, AttributeError) as error:
                raise InputError(
                    f"a server needs grpcio ({error}). Install it: pip install 'mup-megatron[grpc]'"
                ) from None


def _know_trials(storage: Storage) -> None:
    """Has Optuna's cache read every trial: of one that it does not know, it sets no hyperparameter.

    A search that was drawing some when the server before this one ended goes on with them.
    """
    for study in optuna.get_all_study_names(storage.backend):
        storage.backend.get_all_trials(storage.backend.get_study_id_from_name(study), deepcopy=False)


def _require_free(host: str, port: int) -> None:
    """Raises InputError if the port cannot be listened at. gRPC itself would share it with another server."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port}: cannot be listened at on {host} ({error}). Choose another.") from None
