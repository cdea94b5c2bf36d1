import json
import resource
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from small_data import files_at, make_data, text
from support.processes import run_ranks

from mup_megatron.errors import InputError
from mup_megatron.training.data.documents import documents, scan
from mup_megatron.training.data.prefix import SUFFIXES, DataMeta, at, copy_data
from mup_megatron.training.data.reading import (
    check_prefix,
    read_meta,
)
from mup_megatron.training.data.tokenizer import load_tokenizer, make_tokenizer, parse_tokenizer
from mup_megatron.training.data.writing import cut, write_data


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
