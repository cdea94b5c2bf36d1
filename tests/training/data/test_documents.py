import hashlib
import json
from pathlib import Path

import pytest

from mup_megatron.errors import InputError
from mup_megatron.training.data.documents import documents, scan


def test_a_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    content = "α\r\n\n  β\n".encode()
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.py").write_text("b")
    sources = scan([tmp_path / "b.py", tmp_path / "a.txt"])
    assert [text.encode() for text in documents(sources)] == [b"b", content]
    assert sources[1].sha256 == hashlib.sha256(content).hexdigest()
    assert (sources[1].bytes, sources[1].documents, sources[1].skipped) == (len(content), 1, 0)


def test_a_jsonl_file_has_a_document_per_line_and_leaves_out_those_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo"}\n\n{"text": "", "id": 1}\n{"text": "three"}')
    (source,) = scan([path])
    assert list(documents([source])) == ["one\ntwo", "three"]
    assert (source.documents, source.skipped) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "no text"),
        ("a.jsonl", b'{"text": ""}\n', "no text"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "line 2 is not JSON .*nested too deep"),
        ("a.jsonl", b'{"text": "a"}\n' + b'{"text":' * 100_000, "line 2 is not JSON .*nested too deep"),
        ("a.jsonl", b"9" * 5000, "line 1 is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', 'line 1 has no text under the key "text"'),
        ("a.jsonl", b'["a"]\n', 'line 1 has no text under the key "text"'),
        ("a.jsonl", json.dumps({"text": "\ud800"}).encode(), "line 1 holds half a surrogate pair"),
    ],
)
def test_what_is_not_text_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        scan([path])
    assert str(path) in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt: no such file"):
        scan([tmp_path / "nowhere.txt"])
    with pytest.raises(InputError, match="this is a folder"):
        scan([tmp_path])
