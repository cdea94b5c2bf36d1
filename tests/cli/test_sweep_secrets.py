"""Passwords of storages: not in what `sweep` says, nor in any file that it leaves."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from support.commands import Command, contents

from mup_megatron.search import ReportFn, TrialOutcome
from mup_megatron.tuning import ProxyTraining

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

STORAGE = "journal:///studies.log?password=s3c4et"
"""A journal does not ask for it."""


def rate(self: ProxyTraining, parameters: Mapping[str, float], report: ReportFn, interruption: object) -> TrialOutcome:
    return TrialOutcome(3.0 + parameters["lr"])


def test_a_password_is_neither_said_nor_kept(
    run: Command, here: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProxyTraining, "resume", rate)
    words = ("--study", "small", "--storage", STORAGE)
    done = run("sweep", "base.yaml", "--data", "text", "--trials", "4", *words)
    assert done.code == 0, done.err
    assert "journal:///studies.log?password=***" in done.err
    assert run("sweep", "report", "small", "--storage", STORAGE).code == 0
    assert run("transfer", *words, "-o", "small.recipe.yaml").code == 0
    assert "s3c4et" not in done.out + done.err
    assert [name for name, content in contents(here).items() if b"s3c4et" in content] == []
