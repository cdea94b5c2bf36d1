"""SQLite files and journals of Optuna on disk: found sound, or refused by name. Changes nothing that is there."""

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from optuna.storages.journal import JournalFileOpenLock

from mup_megatron.errors import InputError
from mup_megatron.validation import brief

_TABLES = {
    *("studies", "study_directions", "study_system_attributes", "study_user_attributes", "trial_intermediate_values"),
    *("trial_params", "trial_system_attributes", "trial_user_attributes", "trial_values", "trials", "version_info"),
}
"""Optuna makes those that are missing, empty: so it must not see a database that has lost some."""

LOCK_TIMEOUT_S = 60
"""How long a write waits for other processes' writes to the same SQLite file."""


def require_sqlite(file: Path, *, create: bool) -> None:
    """Makes sure that `file` is a sound SQLite file of Optuna, or that there is none and its folder exists."""
    _require_place(file, create)
    if file.exists():
        _check_sqlite(file, create)


def require_journal(file: Path, *, create: bool) -> None:
    """Makes sure that `file` is a journal of Optuna, or that there is none and its folder exists."""
    _require_place(file, create)
    if not file.exists():
        return
    with file.open("rb") as stream:
        first = stream.readline()
    try:
        begins = json.loads(first) if first.endswith(b"\n") else {}
    except ValueError:
        begins = None
    if (
        not isinstance(begins, dict)
        or (begins and "op_code" not in begins)
        or (not begins and file.stat().st_size > 4096)
    ):
        raise InputError(f"{file}: not a journal of Optuna's. Choose another place with --storage.")


def _require_place(file: Path, create: bool) -> None:
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
def locked_folder(folder: Path) -> Iterator[None]:
    """Excludes every other process that does the same; the system frees it at death."""
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


class JournalLock(JournalFileOpenLock):
    """Excludes other writers of a journal; the system frees it at death, unlike a lock that is a file.

    What a writer that died has left unfinished at the end is cut off: the next entry would be lost in it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Waits for the lock."""
        self._handle = os.open(self._file, os.O_RDWR)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        _cut_unfinished(self._handle)
        return True

    def release(self) -> None:
        """Gives the lock back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _cut_unfinished(handle: int, block: int = 4096) -> None:
    """Cuts off what follows the last end of a line."""
    size = end = os.fstat(handle).st_size
    while end > 0:
        begin = max(0, end - block)
        found = os.pread(handle, end - begin, begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end < size:
        os.ftruncate(handle, end)
