"""Time enough to stop in order, on whatever machine tests run, and databases that take little."""

import pytest
from support.blocking import give_time_to_stop
from support.quick_databases import quick_databases

quick_databases()


@pytest.fixture(autouse=True)
def _time_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    give_time_to_stop(monkeypatch)
