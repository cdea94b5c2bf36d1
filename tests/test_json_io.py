"""JSON in: plain values, each key once; what is wrong is said with the file."""

import math
from pathlib import Path

import pytest

from mup_megatron.errors import InputError
from mup_megatron.json_io import read_json


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("a.json")


def test_values(file: Path) -> None:
    file.write_text('{"a": [1, 2.5e-3, "é", "\\ud83d\\ude00", true, null], "b": {"c": Infinity, "d": NaN}}')
    content = read_json(file)
    assert isinstance(content, dict)
    assert content["a"] == [1, 2.5e-3, "é", "😀", True, None]
    assert content["b"]["c"] == math.inf
    assert math.isnan(content["b"]["d"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ', "a.json: not JSON (Expecting value: line 1 column 7 (char 6)). Correct the file."),
        ("", "a.json: not JSON (Expecting value"),
        ('{"a": 1, "a": 2}', "a.json: a: this key is given twice. Remove one of the two."),
        ("[" * 100_000, "a.json: not JSON (maximum recursion depth exceeded"),
        ("[" * 100 + "]" * 100, "a.json: nested too deeply"),
        (f'{{"a": [0, {"9" * 400}]}}', "a.json: a.1: a whole number with hundreds of digits"),
        (f'{{"a": {"9" * 5000}}}', "a.json: a: a whole number with hundreds of digits"),
        ('{"a": "\\ud800"}', "a.json: a: text with half a character in it (a lone surrogate). Correct this value."),
        ('{"\\udfff": 1}', "text with half a character in it"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_json(file)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_files_that_are_none(file: Path, tmp_path: Path) -> None:
    for path, message in (
        (file, "no such file"),
        (tmp_path, "Is a directory"),
        (Path("a\0b"), "not the name of a file"),
    ):
        with pytest.raises(InputError, match=message):
            read_json(path)
    file.write_bytes(b"\xff{}")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 0\)"):
        read_json(file)


def test_a_byte_order_mark_is_passed_over_and_a_long_number_has_its_key(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text(f'{{"a": {{"b": -{"9" * 6000}}}}}')
    with pytest.raises(InputError, match=r"a\.b: a whole number with hundreds of digits"):
        read_json(path)
