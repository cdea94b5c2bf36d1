"""Opening the database of a study without harm to what is there. Not the study: see `study.py`."""

import contextlib
import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial

from mup_megatron.errors import InputError
from mup_megatron.validation import brief

FAILURES = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error)
"""What Optuna raises when the database fails: the disk is full, the server is gone."""

_TABLES = {
    *("studies", "study_directions", "study_system_attributes", "study_user_attributes", "trial_intermediate_values"),
    *("trial_params", "trial_system_attributes", "trial_user_attributes", "trial_values", "trials", "version_info"),
}
"""Optuna makes those that are missing, empty: so it must not see a database that has lost some."""

LOCK_TIMEOUT_S = 60
"""How long a write waits for other processes' writes to the same SQLite file."""


@dataclass(frozen=True)
class Storage:
    """An open Optuna storage."""

    backend: optuna.storages.BaseStorage
    """What studies are loaded from: Optuna's cache in front of the database."""
    database: optuna.storages.RDBStorage
    label: str
    """Its URL without the password, for messages."""
    file: Path | None
    """Of a SQLite storage, the file."""

    def stored_trials(self, study: str) -> list[FrozenTrial]:
        """Returns all trials of a study, in the order of creation, as the database has them.

        The cache in front of it has one trial for each number, also where a damaged database has two.
        """
        return self.database.get_all_trials(self.database.get_study_id_from_name(study), deepcopy=False)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Excludes every other process that uses this lock on the same SQLite file; the system frees it at death.

        SQLite has no row locks, so Optuna's read-then-write steps are not atomic on it. On a database server they are,
        and this does nothing.
        """
        if self.file is None:
            yield
        else:
            with _locked(self.file.parent):
                yield


def default_storage(name: str, folder: Path = Path("results")) -> str:
    """Returns the URL of the SQLite file in `folder` that a study has unless told otherwise.

    Raises:
        InputError: the name cannot be a file's name.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise InputError(f"--study {name!r}: not a file name. Use letters, digits and . _ + -, or give --storage.")
    return f"sqlite:///{folder / name}.db"


def is_there(url: str) -> bool:
    """Says if a storage exists: of SQLite the file, of a database server always."""
    try:
        file = _sqlite_file(sqlalchemy.make_url(url))
    except sqlalchemy.exc.ArgumentError:
        raise _no_url(url) from None
    return file is None or file.exists()


@contextlib.contextmanager
def open_storage(url: str, *, create: bool) -> Iterator[Storage]:
    """Opens an Optuna storage, and closes its connections at the end: a process forked later must not have them.

    A failure of the database while the storage is open (disk full, server gone) becomes an InputError.

    Args:
        url: as Optuna takes it, for example `sqlite:///results/study.db`.
        create: whether a SQLite file, and its folder, may be created.

    Raises:
        InputError: the URL is none, the file is missing, damaged or not Optuna's, the server refuses. Nothing that was
            there has been changed then.
    """
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise _no_url(url) from None
    label = parsed.render_as_string(hide_password=True)
    file = _sqlite_file(parsed)
    if file is not None:
        _prepare(file, create)
    options = {"connect_args": {"timeout": LOCK_TIMEOUT_S}} if parsed.get_backend_name() == "sqlite" else None
    # Creating tables is several steps, so two processes at once would trip over each other.
    with _locked(file.parent) if file is not None else contextlib.nullcontext(), _storage_errors(label):
        try:
            backend = optuna.storages.RDBStorage(url, options)
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            raise InputError(f"--storage {label}: no driver ({error}). Install it, or choose another.") from None
        except (KeyError, IndexError, ValueError) as error:  # Optuna fills in {…} templates
            raise InputError(f"--storage {label}: not a storage URL ({error!r}). Remove its braces.") from None
        except RuntimeError as error:  # Optuna's check of the schema's version
            raise InputError(f"--storage {label}: {brief(error)}") from None
        except AssertionError:
            raise InputError(f"--storage {label}: damaged. Restore it, or choose another place.") from None
    try:
        with _storage_errors(label):
            yield Storage(optuna.storages.get_storage(backend), backend, label, file)
    finally:
        backend.remove_session()
        backend.engine.dispose()


@contextlib.contextmanager
def _storage_errors(label: str) -> Iterator[None]:
    """Turns a failure of the database (disk full, server gone) into an InputError that names it."""
    try:
        yield
    except FAILURES as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = brief(getattr(cause, "orig", None) or cause) or type(cause).__name__
        raise InputError(
            f"{label}: the storage failed ({reason}). What was stored is kept; free space or see to the server, and "
            "give the same command again."
        ) from error


def _no_url(url: str) -> InputError:
    return InputError(f"--storage {url!r}: not a URL. Write one such as sqlite:///results/study.db.")


def _sqlite_file(url: sqlalchemy.URL) -> Path | None:
    """Returns the file of a SQLite URL; None for other databases and for those without an ordinary file."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    assert url.database is not None
    return None if url.database.startswith("file:") else Path(url.database)


def _prepare(file: Path, create: bool) -> None:
    """Makes sure that `file` is a sound SQLite file of Optuna, or that there is none and its folder exists."""
    if not file.exists():
        if not create:
            raise InputError(f"{file}: no such file. Check --study and --storage.")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{file}: its folder cannot be made ({error.strerror}). Choose another place with --storage."
            ) from None
    elif not file.is_file():
        raise InputError(f"{file}: not a file. Choose another place with --storage.")
    place = file if file.exists() else file.parent
    if create and not os.access(place, os.W_OK):
        raise InputError(f"{place}: not writable. Change its permissions, or choose another place with --storage.")
    if file.exists():
        _check_sqlite(file, create)


def _check_sqlite(file: Path, create: bool) -> None:
    try:
        # Not read-only: what a killed process left half written is rolled back on opening, by SQLite itself.
        with contextlib.closing(
            sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_TIMEOUT_S)
        ) as db:
            sound = [row[0] for row in db.execute("PRAGMA quick_check")]
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            held = "studies" not in tables or db.execute("SELECT 1 FROM studies").fetchone() is not None
    except (sqlite3.Error, ValueError, OverflowError) as error:  # text that is not UTF-8 among the latter
        raise InputError(
            f"{file}: not a sound SQLite file ({brief(error)}). Restore it, or choose another place with --storage."
        ) from None
    if sound != ["ok"]:
        raise InputError(f"{file}: damaged ({brief(sound[0])}). Restore it, or choose another place with --storage.")
    if not tables and not create:
        raise InputError(f"{file}: empty, so there is no study in it. Check --study and --storage.")
    # Optuna's tables may be incomplete when a process was killed while it made them; these come first.
    if tables and not tables & {"studies", "version_info"}:
        raise InputError(f"{file}: another program's database. Choose another place with --storage.")
    if tables and (held or not create) and (lost := sorted(_TABLES - tables)):
        raise InputError(f"{file}: damaged (it has no table {lost[0]}). Restore it, or choose another with --storage.")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # On the folder and not the file: SQLite's own locks vanish when a second handle on its file is closed.
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise InputError(
                f"{folder}: a file system without locks ({error.strerror}), which SQLite needs. Choose a local folder, "
                "or a database server, with --storage."
            ) from None
        yield
    finally:
        os.close(handle)
