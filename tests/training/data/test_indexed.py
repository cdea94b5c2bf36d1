import json
import resource
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import files_at, make_data, text
from support.processes import run_ranks

from mup_megatron.errors import InputError
from mup_megatron.training.data.documents import documents, scan
from mup_megatron.training.data.indexed import (
    SUFFIXES,
    DataMeta,
    at,
    check_prefix,
    copy_data,
    cut,
    read_index,
    read_meta,
    require_known_tokens,
    require_vocab,
    small_vocabulary_warning,
    write_data,
)
from mup_megatron.training.data.tokenizer import load_tokenizer, make_tokenizer, parse_tokenizer


@pytest.fixture
def copied(data: tuple[Path, DataMeta], tmp_path: Path) -> Path:
    copy_data(data[0], tmp_path / "v1.0")
    return tmp_path / "v1.0"


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
def test_megatron_reads_back_the_texts_with_an_end_after_each(tmp_path: Path, spec: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix, meta = make_data(tmp_path, files=5, tokenizer=spec)
    tokenizer = load_tokenizer(at(prefix, ".tokenizer.json"))
    found = IndexedDataset(str(prefix))
    ends = found.document_indices
    assert len(ends) - 1 == meta.documents == 5
    for number in range(5):
        ids = np.concatenate([found[k] for k in range(ends[number], ends[number + 1])])
        assert ids[-1] == meta.eod == tokenizer.eod
        assert meta.eod not in ids[:-1]
        assert tokenizer.decode(ids[:-1].tolist()) == text(number)
    assert found.sequence_lengths.sum() == meta.tokens


def test_tokens_take_two_bytes_where_the_vocabulary_allows_and_four_where_not(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (tmp_path / "a.txt").write_text("a b")
    for size, dtype in ((65_000, np.uint16), (70_000, np.int32)):
        vocabulary = {**{f"w{k}": k for k in range(size - 3)}, "a": size - 3, "b": size - 2, "</s>": size - 1}
        content = {
            "version": "1.0",
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
        }
        path = tmp_path / f"{size}.json"
        path.write_text(json.dumps(content))
        sources = scan([tmp_path / "a.txt"])
        prefix = tmp_path / f"d{size}"
        write_data(prefix, documents(sources), load_tokenizer(path), sources=sources, spec=str(path))
        found = IndexedDataset(str(prefix))
        assert found.index.dtype == dtype
        assert np.concatenate([found[k] for k in range(len(found))]).tolist() == [size - 3, size - 2, size - 1]
        assert check_prefix(prefix).vocab_size == size


def test_metadata_say_what_the_data_are_and_where_they_come_from(data: tuple[Path, DataMeta]) -> None:
    prefix, meta = data
    assert check_prefix(prefix) == read_meta(prefix) == meta
    assert (meta.vocab_size, meta.eod, meta.documents, meta.tokenizer) == (257, 256, 12, "byte")
    assert meta.tokens == sum(len(text(number)) + 1 for number in range(12))
    assert [entry.documents for entry in meta.inputs] == [1] * 12
    assert meta.versions.keys() == {"mup-megatron", "megatron-core", "tokenizers"}


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    first = files_at(make_data(tmp_path, tokenizer="bpe:300", name="first")[0])
    second = files_at(make_data(tmp_path, tokenizer="bpe:300", name="second")[0])
    assert first == second
    assert len(first) == 4


def test_long_documents_are_cut_so_that_a_single_file_can_be_validated_on() -> None:
    sequences, ends = cut([100_000, 3, 1_000])
    assert sum(sequences) == 101_003
    assert max(sequences) == 506  # a 200th, rounded up
    assert [sum(sequences[begin:end]) for begin, end in pairwise(ends)] == [100_000, 3, 1_000]
    assert cut([7] * 300) == ([7] * 300, list(range(301)))  # many short documents stay as they are


def test_existing_data_are_replaced_only_when_asked(copied: Path, data: tuple[Path, DataMeta]) -> None:
    before = files_at(copied)
    with pytest.raises(InputError, match=r"v1\.0\.bin: there are data already.*--force"):
        copy_data(data[0], copied)
    source = scan([at(copied, ".json")])
    made = make_tokenizer(parse_tokenizer("byte"), list)
    with pytest.raises(InputError, match="--force"):
        write_data(copied, documents(source), made, sources=source, spec="byte")
    assert files_at(copied) == before
    write_data(copied, documents(source), made, sources=source, spec="byte", force=True)
    assert check_prefix(copied).documents == 1


def test_a_folder_is_no_prefix(tmp_path: Path, data: tuple[Path, DataMeta]) -> None:
    with pytest.raises(InputError, match="this is a folder"):
        copy_data(data[0], tmp_path)


def _shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def _patch(path: Path, offset: int, content: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + content + whole[offset + len(content) :])


@pytest.mark.parametrize(
    ("suffix", "damage", "said"),
    [
        (".bin", lambda path: path.unlink(), "no such file"),
        (".bin", lambda path: _shorten(path, 2), "truncated"),
        (".bin", lambda path: path.write_bytes(b""), "truncated"),
        (".idx", lambda path: path.unlink(), "no such file"),
        (".idx", lambda path: path.write_bytes(b""), "not an index"),
        (".idx", lambda path: _shorten(path, 1), "truncated"),
        (".idx", lambda path: _patch(path, 0, b"X"), "not an index"),
        (".idx", lambda path: _patch(path, 9, b"\x02"), "corrupt: version 2"),
        (".idx", lambda path: _patch(path, 17, b"\x63"), "corrupt: version 1, type 99"),
        (".idx", lambda path: _patch(path, 17, b"\x07"), "tokens are floating-point numbers"),
        (".idx", lambda path: _patch(path, 17, b"\x06"), "tokens are floating-point numbers"),
        (".idx", lambda path: _patch(path, 34, b"\xff" * 4), "corrupt: its lengths"),
        (".idx", lambda path: _patch(path, 18, b"\xff" * 8), "truncated"),
        (".idx", lambda path: _patch(path, 34, b"\x01"), "corrupt: its lengths"),
        (".json", lambda path: path.unlink(), "no such file"),
        (".json", lambda path: _shorten(path, 5), "truncated or not JSON"),
        (".json", lambda path: path.write_bytes(b"\xff"), "not UTF-8"),
        (".json", lambda path: path.write_text("[" * 100_000), "nested too deep"),
        (".json", lambda path: path.write_text("null"), "does not describe data"),
        (".json", lambda path: path.write_text('{"vocab_size": 257}'), "eod: missing"),
        (".json", lambda path: path.write_text('{"vocab_size": 257, "eod": 256, "speed": 1}'), "speed: unknown key"),
        (".json", lambda path: path.write_text('{"vocab_size": 257, "eod": 257}'), "eod is 257"),
        (".json", lambda path: path.write_text('{"vocab_size": 257, "eod": 256, "tokens": 5}'), "not of one making"),
    ],
)
def test_damaged_data_are_refused_with_the_file_at_fault(
    copied: Path, suffix: str, damage: Callable[[Path], None], said: str
) -> None:
    check_prefix(copied)
    damage(at(copied, suffix))
    with pytest.raises(InputError, match=said) as caught:
        check_prefix(copied)
    assert str(caught.value).startswith(str(at(copied, suffix)))


def _with_tokens(prefix: Path, dtype: Any, code: int, first: int) -> None:
    """The same tokens as another type, the first of them replaced, in files that agree with each other."""
    index = read_index(prefix)
    tokens = np.fromfile(at(prefix, ".bin"), dtype=index.dtype).astype(dtype)
    tokens[0] = first
    tokens.tofile(at(prefix, ".bin"))
    width = np.dtype(dtype).itemsize
    starts = (np.cumsum(index.sequence_lengths, dtype=np.int64) - index.sequence_lengths) * width
    _patch(at(prefix, ".idx"), 17, bytes([code]))
    _patch(at(prefix, ".idx"), 34 + 4 * len(starts), starts.tobytes())


@pytest.mark.parametrize(
    ("dtype", "code", "token"), [(np.uint16, 8, 257), (np.uint16, 8, 65535), (np.int32, 4, -1), (np.int64, 5, 2**40)]
)
def test_tokens_beyond_the_vocabulary_are_found_before_a_run(copied: Path, dtype: Any, code: int, token: int) -> None:
    _with_tokens(copied, dtype, code, 0)
    require_known_tokens(copied, check_prefix(copied))
    _with_tokens(copied, dtype, code, token)
    with pytest.raises(InputError, match=rf"\.bin: token 0 is id {token}, and the vocabulary in .* has 257\. Correct"):
        require_known_tokens(copied, check_prefix(copied))


def test_a_prefix_with_a_suffix_is_understood_enough_to_say_so(copied: Path) -> None:
    with pytest.raises(InputError, match="Leave the suffix away"):
        check_prefix(at(copied, ".bin"))


def test_data_of_megatrons_own_tool_need_only_two_keys(copied: Path) -> None:
    at(copied, ".tokenizer.json").unlink()
    at(copied, ".json").write_text('{"vocab_size": 257, "eod": 256}')
    assert check_prefix(copied) == DataMeta(vocab_size=257, eod=256)


def test_a_model_must_have_room_for_every_token(data: tuple[Path, DataMeta]) -> None:
    require_vocab(data[1], 257, data=data[0], model="target.yaml")
    with pytest.raises(InputError, match=r"target\.yaml: vocab_size is 256, .* Set vocab_size: 257"):
        require_vocab(data[1], 256, data=data[0], model="target.yaml")


def _replace_with_little_room(prefix: Path, room: int) -> str:
    sources = scan([prefix.parent / "0.txt"] * 20)
    made = make_tokenizer(parse_tokenizer("bpe:400"), lambda: documents(sources))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        write_data(prefix, documents(sources), made, sources=sources, spec="bpe:400", force=True)
    except InputError as error:
        return str(error)
    return "done"


def test_a_full_disk_leaves_the_old_data_as_they_were(tmp_path: Path) -> None:
    prefix, _ = make_data(tmp_path)
    before = files_at(prefix)
    names = {path.name for path in tmp_path.iterdir()}
    # Enough for nothing; for the tokens but not for the tokenizer.
    for room in (100, 12_000):
        (said,) = run_ranks(_replace_with_little_room, 1, prefix, room)
        assert "cannot be written (File too large)" in said
        assert files_at(prefix) == before
        assert {path.name for path in tmp_path.iterdir()} == names
    assert run_ranks(_replace_with_little_room, 1, prefix, 10_000_000) == ["done"]
    assert check_prefix(prefix).tokenizer == "bpe:400"


def test_a_copy_is_the_same_data(copied: Path, data: tuple[Path, DataMeta]) -> None:
    assert files_at(copied) == files_at(data[0])
    shutil.rmtree(copied.parent)
    assert len(files_at(data[0])) == len(SUFFIXES)


def test_data_of_another_tokenizer_are_noticed() -> None:
    said = small_vocabulary_warning(1024, 50257, data="d")
    assert said is not None
    assert said.startswith("Warning: d has a vocabulary of 1024, the model one of 50257.")
    assert small_vocabulary_warning(50000, 50257, data="d") is None, "rounded up"
