"""Opening the storage of a study, of whichever kind, without harm to what is there. Not the study: see `study.py`.

sqlite:///FILE               a file on this machine
journal:///FILE              Optuna's journal, which several machines may share on a network's file system
grpc://HOST:PORT             a server of `mup-megatron sweep serve`, or another of Optuna's gRPC proxies
postgresql://…, mysql://…    a database server, as SQLAlchemy spells it
"""

import contextlib
import importlib.util
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial

from mup_megatron.errors import InputError
from mup_megatron.search.database_file import (
    LOCK_TIMEOUT_S,
    JournalLock,
    locked_folder,
    require_journal,
    require_sqlite,
)
from mup_megatron.search.patience import Patience
from mup_megatron.validation import brief

FAILURES = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error)
"""What Optuna raises when the database fails: the disk is full, the server is gone."""

GRPC_PORT = 13000
"""Optuna's own."""

ANSWERS_S = 20.0
"""How long a gRPC server may take to answer at first."""

SETTLE_S = 0.25
"""Longer than between reading that something is not there, and writing it."""

CREATIONS = 5
"""How often to try to create what a database lacks; there are a few steps at which another may be in the way."""

_PASSING = frozenset({"UNAVAILABLE", "UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
"""Codes of gRPC for a server that is away, or whose database is."""

_Backends: TypeAlias = tuple[BaseStorage, BaseStorage]
"""What studies are loaded from, and the same without the cache in front of it, where there is one."""


@dataclass(frozen=True)
class Storage:
    """An open Optuna storage."""

    backend: BaseStorage
    """What studies are loaded from: where there is one, Optuna's cache in front of the database."""
    database: BaseStorage
    """The same without the cache; a gRPC server's alone is always seen through one."""
    label: str
    """Its URL without the password, for messages."""
    file: Path | None
    """Of a SQLite storage, the file."""
    patience: Patience
    """What is done when it is away."""

    def stored_trials(self, study: str) -> list[FrozenTrial]:
        """Returns all trials of a study, in the order of creation, as the database has them.

        The cache in front of it has one trial for each number, also where a damaged database has two.
        """
        return self.database.get_all_trials(self.database.get_study_id_from_name(study), deepcopy=False)

    @property
    def excludes(self) -> bool:
        """True if `lock` keeps others out."""
        return self.file is not None

    def settle(self) -> None:
        """Waits, if `lock` does nothing, for those who write the same at the same moment. The last one counts."""
        if not self.excludes:
            time.sleep(SETTLE_S)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Excludes every other process that uses this lock on the same SQLite file; the system frees it at death.

        SQLite has no row locks, so Optuna's read-then-write steps are not atomic on it. Elsewhere they are, and this
        does nothing.
        """
        if self.file is None:
            yield
        else:
            with locked_folder(self.file.parent):
                yield


def default_storage(name: str, folder: Path = Path("results")) -> str:
    """Returns the URL of the SQLite file in `folder` that a study has unless told otherwise.

    Raises:
        InputError: the name cannot be a file's name.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise InputError(f"--study {name!r}: not a file name. Use letters, digits and . _ + -, or give --storage.")
    return f"sqlite:///{folder / name}.db"


def shown(url: str) -> str:
    """Returns a storage's URL without its passwords, for messages and files; what is no URL without what may be one."""
    try:
        text = sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        text = re.sub(r"^.*@", "***@", url, flags=re.DOTALL)
    return re.sub(r"(pass\w*=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)


def in_address(host: str) -> str:
    """Returns a host as it is written before a colon and a port."""
    return f"[{host}]" if ":" in host else host


def is_there(url: str) -> bool:
    """Says if a storage exists: of SQLite and of a journal the file, of a server always."""
    parsed = parts_of(url)
    file = _journal_file(parsed) if parsed.drivername == "journal" else sqlite_file(parsed)
    return file is None or file.exists()


@contextlib.contextmanager
def open_storage(url: str, *, create: bool, patience: Patience | None = None) -> Iterator[Storage]:
    """Opens an Optuna storage, and closes its connections at the end: a process forked later must not have them.

    A failure of the database while the storage is open (disk full, server gone) becomes an InputError.

    Args:
        url: as at the head of this module.
        create: whether a file, and its folder, may be created.
        patience: with a storage that is away for a while; by default none. A SQLite file is never waited for.

    Raises:
        InputError: the URL is none, the file is missing, damaged or not Optuna's, the server refuses. Nothing that was
            there has been changed then.
    """
    parsed, patience = parts_of(url), patience or Patience()
    label = shown(url)
    kinds: dict[str, Callable[[], contextlib.AbstractContextManager[_Backends]]] = {
        "journal": lambda: _journal(_journal_file(parsed), create, patience),
        "grpc": lambda: _grpc(parsed, label, patience),
    }
    opened = kinds.get(parsed.drivername, lambda: _database(url, parsed, label, create, patience))
    with _storage_errors(label), opened() as (backend, database):
        yield Storage(backend, database, label, sqlite_file(parsed), patience)


@contextlib.contextmanager
def _database(url: str, parsed: sqlalchemy.URL, label: str, create: bool, patience: Patience) -> Iterator[_Backends]:
    file, options = sqlite_file(parsed), {"pool_pre_ping": True}
    if file is not None:
        require_sqlite(file, create=create)
    if parsed.get_backend_name() == "sqlite":
        options = {"connect_args": {"timeout": LOCK_TIMEOUT_S}}  # type: ignore[dict-item]
    # Creating tables is several steps, so two processes at once would trip over each other.
    with locked_folder(file.parent) if file is not None else contextlib.nullcontext():
        try:
            storage = _with_tables(url, options)
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            raise InputError(f"--storage {label}: no driver ({error}). Install it, or choose another.") from None
        except (KeyError, IndexError, ValueError):  # of a template that it is not
            raise InputError(f"--storage {label}: Optuna fills in what is in braces. Write %7B for {{.") from None
        except RuntimeError as error:  # Optuna's check of the schema's version
            raise InputError(f"--storage {label}: {brief(error)}") from None
        except AssertionError:
            raise InputError(f"--storage {label}: damaged. Restore it, or choose another place.") from None
    if parsed.get_backend_name() != "sqlite":
        patience.have_with(storage, _away_from_database)
    try:
        yield optuna.storages.get_storage(storage), storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _with_tables(url: str, options: dict[str, Any]) -> RDBStorage:
    """Opens a database, of which others may be creating the tables: who comes second finds them at the next try."""
    for _ in range(CREATIONS - 1):
        try:
            return RDBStorage(url, options)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            time.sleep(SETTLE_S)
    return RDBStorage(url, options)


def _away_from_database(error: Exception) -> str | None:
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    lost = isinstance(cause, sqlalchemy.exc.DBAPIError) and cause.connection_invalidated
    if lost or isinstance(cause, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
        return brief(getattr(cause, "orig", None) or cause)
    return None


@contextlib.contextmanager
def _journal(file: Path, create: bool, patience: Patience) -> Iterator[_Backends]:
    require_journal(file, create=create)
    try:
        lines = optuna.storages.journal.JournalFileBackend(str(file), lock_obj=JournalLock(file))
        storage = optuna.storages.JournalStorage(lines)
    except OSError as error:
        raise InputError(f"{file}: cannot be opened ({error.strerror}). Choose another place with --storage.") from None
    except Exception as error:  # whatever json and Optuna's reading of entries raise
        raise InputError(f"{file}: damaged ({brief(error)}). Restore it, or choose another with --storage.") from None
    patience.have_with(storage, lambda error: brief(error) if isinstance(error, OSError) else None)
    yield storage, storage


@contextlib.contextmanager
def _grpc(parsed: sqlalchemy.URL, label: str, patience: Patience) -> Iterator[_Backends]:
    if not parsed.host or parsed.database or parsed.username:
        raise InputError(f"--storage {label}: write grpc://HOST:PORT, as `mup-megatron sweep serve` shows it.")
    if importlib.util.find_spec("grpc") is None:
        raise InputError(f"--storage {label}: needs grpcio. Install it: pip install 'mup-megatron[grpc]'")
    import grpc

    def away(error: Exception) -> str | None:
        if not isinstance(error, grpc.RpcError):
            return None
        code, details = error.code().name, error.details()
        return f"{code}: {brief(details)}" if code in _PASSING else None

    storage = optuna.storages.GrpcStorageProxy(host=in_address(parsed.host), port=parsed.port or GRPC_PORT)
    try:
        try:
            storage.wait_server_ready(timeout=ANSWERS_S)
        except ConnectionError:
            raise InputError(
                f"--storage {label}: no server answers. Start one there with `mup-megatron sweep serve`."
            ) from None
        patience.have_with(storage, away)
        yield storage, storage
    except grpc.RpcError as error:
        raise InputError(f"--storage {label}: no server of Optuna's storages ({brief(error.details())}).") from error
    finally:
        storage.close()


@contextlib.contextmanager
def _storage_errors(label: str) -> Iterator[None]:
    """Turns a failure of the database (disk full, server gone) into an InputError that names it."""
    try:
        yield
    except FAILURES as error:
        cause: BaseException = error
        while isinstance(cause.__cause__, FAILURES):
            cause = cause.__cause__
        reason = brief(getattr(cause, "orig", None) or cause) or type(cause).__name__
        raise InputError(
            f"{label}: the storage failed ({reason}). What was stored is kept; free space or see to the server, and "
            "give the same command again."
        ) from error


def parts_of(url: str) -> sqlalchemy.URL:
    """Returns the parts of a storage's URL; raises InputError if it is none."""
    try:
        return sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise InputError(
            f"--storage {shown(url)!r}: not a URL. Write one such as sqlite:///results/study.db, journal:///FILE, "
            "grpc://HOST:PORT or postgresql://…"
        ) from None


def sqlite_file(url: sqlalchemy.URL) -> Path | None:
    """Returns the file of a SQLite URL; None for other databases and for those without an ordinary file."""
    if (
        url.drivername in ("journal", "grpc")
        or url.get_backend_name() != "sqlite"
        or url.database in (None, "", ":memory:")
    ):
        return None
    assert url.database is not None
    return None if url.database.startswith("file:") else Path(url.database)


def _journal_file(url: sqlalchemy.URL) -> Path:
    """Returns the file of a journal's URL."""
    if url.host or not url.database:
        raise InputError(
            f"--storage {shown(str(url))}: write journal:///FILE, with a fourth / before a path from the root."
        )
    return Path(url.database)
