"""A run of the fork is one of its process; here each test has its own."""

import pytest

from mup_megatron.megatron_deepspeed import run


@pytest.fixture(autouse=True)
def no_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_run", None)
