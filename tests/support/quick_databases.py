"""Spares tests what writing to a study's database takes, and what no study depends on."""

import sqlite3

import sqlalchemy


def quick_databases() -> None:
    """For this process, and those that it forks: no write to SQLite waits for a disk.

    That what is written has reached the disk matters when the machine fails, which no test has it do: files of a
    process that is killed are whole.
    """
    if not sqlalchemy.event.contains(sqlalchemy.Engine, "connect", _do_not_wait):
        sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _do_not_wait)


def _do_not_wait(connection: object, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")
