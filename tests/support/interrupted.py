"""Searches that are killed at random commands to their database and started again. For tests of `search/`."""

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import sqlalchemy
from support.blocking import LIMIT_S


def _until_statement(search: Callable[[], object], statement: int) -> None:
    """Runs a search, and kills its process when it is about to send its `statement`-th command to the database."""
    count = 0

    def count_down(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", count_down)
    sqlalchemy.event.listen(sqlalchemy.Engine, "commit", count_down)
    search()


def interrupted_until_done(search: Callable[[], object], seed: int, statements: int) -> int:
    """Starts the same search again and again; returns how often it was killed.

    Args:
        search: what is run, in a forked process each time.
        seed: of the commands at which it is killed.
        statements: that come before one; the first dozens make the tables, a whole search takes some hundred.
    """
    rng, kills = random.Random(seed), 0
    while True:
        statement = rng.randrange(1, statements)
        process = multiprocessing.get_context("fork").Process(target=_until_statement, args=(search, statement))
        process.start()
        process.join(LIMIT_S)
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
        kills += 1
