"""Time enough to stop in order, on whatever machine tests run."""

import pytest
from support.blocking import give_time_to_stop


@pytest.fixture(autouse=True)
def _time_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    give_time_to_stop(monkeypatch)
