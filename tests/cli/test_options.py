"""What commands share."""

from pathlib import Path

import pytest
from support.shapes import gpt

from mup_megatron.cli.options import warn_of_small_vocabulary

MODEL = gpt(1, vocab_size=50257)


def test_data_of_another_tokenizer_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_small_vocabulary(MODEL, Path("d"), 1024)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Warning: d has a vocabulary of 1024, the model one of 50257.")


def test_a_vocabulary_that_was_rounded_up_is_no_reason_to_warn(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_small_vocabulary(MODEL, Path("d"), 50000)
    assert capsys.readouterr().err == ""


def test_one_rank_warns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    warn_of_small_vocabulary(MODEL, Path("d"), 1024)
    assert capsys.readouterr().err == ""
