"""Cached references: what was written comes back, and what is not what was written is measured anew."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mup_megatron.check.measure.measurements import Key, MeasuredRun, Measurements, Quantity
from mup_megatron.check.reference.cache import cached

FOUND = Measurements(
    (MeasuredRun(32, 1, {Key(Quantity.LOSS, "loss", 1): 5.5, Key(Quantity.LOSS, "loss", 2): float("inf")}, (5.5,)),)
)


def never() -> Measurements:
    raise AssertionError("it was cached")


def test_what_was_measured_comes_back(tmp_path: Path) -> None:
    assert cached(tmp_path, {"width": 32}, lambda: FOUND) == FOUND
    assert cached(tmp_path, {"width": 32}, never) == FOUND


def _changed(change: Callable[[Any], Any]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text("null"),
        _changed(lambda content: content["runs"]),
        _changed(lambda content: {**content, "runs": []}),
        _changed(lambda content: {**content, "runs": [{**content["runs"][0], "losses": None}]}),
        _changed(lambda content: {**content, "runs": [{**content["runs"][0], "values": []}]}),
    ],
)
def test_a_damaged_file_is_measured_anew(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    cached(tmp_path, {"width": 32}, lambda: FOUND)
    (path,) = tmp_path.iterdir()
    damage(path)
    other = Measurements((MeasuredRun(64, 2, {}, ()),))
    assert cached(tmp_path, {"width": 32}, lambda: other) == other
    assert cached(tmp_path, {"width": 32}, never) == other
