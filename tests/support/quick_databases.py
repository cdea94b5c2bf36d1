"""Spares tests what opening and writing a study's database takes, and what no study depends on."""

import sqlite3
from typing import Any

import sqlalchemy
from alembic.config import Config
from alembic.script import ScriptDirectory

_migrations: dict[str | None, ScriptDirectory] = {}
_read = ScriptDirectory.from_config


def quick_databases() -> None:
    """For this process, and those that it forks: what Optuna could migrate is read once, and no write waits for a disk.

    Optuna reads its migrations whenever it opens a database, to know the last one. That what is written has reached the
    disk matters when the machine fails, which no test has it do: files of a process that is killed are whole.
    """
    ScriptDirectory.from_config = _read_once  # type: ignore[method-assign]
    if not sqlalchemy.event.contains(sqlalchemy.Engine, "connect", _do_not_wait):
        sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _do_not_wait)


def _read_once(config: Config) -> ScriptDirectory:
    place = config.get_main_option("script_location")
    if place not in _migrations:
        _migrations[place] = _read(config)
    return _migrations[place]


def _do_not_wait(connection: Any, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")
