"""The replay of searches (benchmarks/search_replay.py): its table, made of trials side by side, and what it replays."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import search_replay
import torch
from search_replay import Outcome, Sample, Table, climbed, cost, record

from mup_megatron.search.page.analysis import spearman

TEXT = torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two widths, two lengths, two trials side by side."""
    for name, value in {"WIDTHS": (16, 32), "LENGTHS": (1, 2), "WHOLE": (32, 2), "SIDE_BY_SIDE": 2, "BATCH": 2}.items():
        monkeypatch.setattr(search_replay, name, value)
    monkeypatch.setattr(search_replay, "_text", lambda: TEXT)


@pytest.mark.parametrize("own_seeds", [False, True])
def test_a_trial_comes_to_the_same_beside_others_and_alone(small: None, own_seeds: bool) -> None:
    together = search_replay.train(TEXT, 32, 2, (0, 1, 2), own_seeds=own_seeds)
    alone = [search_replay.train(TEXT, 32, 2, (trial,), own_seeds=own_seeds)[0] for trial in (0, 1, 2)]
    assert together == pytest.approx(alone, rel=1e-4)
    assert len(set(together)) == 3


def test_a_table_that_was_interrupted_goes_on(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "whole" / "common.jsonl", 3, own_seeds=False)
    train, calls = search_replay.train, []

    def interrupted(*arguments: object, **options: bool) -> list[float]:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(search_replay, "train", interrupted)
    file = tmp_path / "common.jsonl"
    with pytest.raises(KeyboardInterrupt):
        record(file, 2, own_seeds=False)
    record(file, 3, own_seeds=False)
    assert len(calls) == 4 + 1 + 4, "what was trained is not trained again"
    table = Table.read(tmp_path / "common.jsonl.gz")
    assert table == Table.read(tmp_path / "whole" / "common.jsonl")
    assert sorted(table.losses) == [(16, 1), (16, 2), (32, 1), (32, 2)]
    assert {len(losses) for losses in table.losses.values()} == {3}
    # A larger table has the trials of a chunk that was not full, too.
    record(file, 4, own_seeds=False)
    assert {len(losses) for losses in Table.read(file).losses.values()} == {4}


def test_what_diverged_is_infinite_and_last(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    row = {"width": 64, "steps": 200, "first": 0, "losses": [3.0, None, 2.0]}
    file.write_text(json.dumps(row) + "\n")
    losses = Table.read(file).losses[64, 200]
    assert losses == [3.0, math.inf, 2.0]
    assert spearman(np.array(losses), np.array([0.2, 0.3, 0.1])) == pytest.approx(1.0)


def test_the_ladder_is_climbed_and_paid_for() -> None:
    """Twelve trials of which the shortest runs rank all but two as whole ones do."""
    places = [(16, 50), (32, 100), (64, 200)]
    whole = [2.0 + 0.1 * trial for trial in range(12)]
    short = [*reversed(whole[:2]), *whole[2:]]
    sample = Sample(dict(zip(places, (short, short, whole), strict=True)), range(12))
    found = climbed(places)(sample, random.Random(0))
    spent = 12 * cost(places[0]) + 5 * cost(places[1]) + 3 * cost(places[2])
    assert found == Outcome(pytest.approx(spent / cost(places[2])), 0)
    found = climbed(places, counts=(2, 1))(sample, random.Random(0))
    assert found.chosen == 1, "of one whole trial, the one that was best before"
