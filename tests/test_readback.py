"""Files that the package wrote and that are damaged now: one sentence with the file and the caller's remedy."""

from pathlib import Path

import pytest

from mup_megatron.errors import InputError
from mup_megatron.readback import parse_json, read_json

REMEDY = "Make it again."


def test_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "é"]}
    assert parse_json("[1]", source="here") == [1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "truncated or not JSON"),
        (b'{"a": ', "truncated or not JSON"),
        (b"\xff\xfe", "not UTF-8 text (byte 0)"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"9" * 5000, "truncated or not JSON"),
        (b'"\\ud800"', "half a surrogate pair"),
        (b'"' + b"x" * 5000, "truncated or not JSON"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_json(path, remedy=REMEDY)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert message.endswith(REMEDY)
    assert len(message) < 300 + len(str(path))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        read_json(tmp_path)
