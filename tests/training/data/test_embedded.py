import os
import signal
from pathlib import Path

import pytest
import torch
from small_data import files_at
from support.processes import RankFailure, run_ranks

from mup_megatron.training.data import embedded
from mup_megatron.training.data.embedded import embedded_data, embedded_sources
from mup_megatron.training.data.prefix import at
from mup_megatron.training.data.reading import check_prefix
from mup_megatron.training.data.tokenizer import load_tokenizer


def _a_tenth(patch: pytest.MonkeyPatch) -> None:
    """Has a tenth of the library be the corpus: the rules of the cache need no more."""
    patch.setattr(embedded, "embedded_sources", lambda **to: embedded_sources(**to)[::10])


def _killed_while_writing(cache: Path) -> None:
    def kill(stage: str, done: int, total: int, /) -> None:
        if stage == "tokenizing" and done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    _a_tenth(pytest.MonkeyPatch())
    embedded_data(cache, progress=kill)


def _at_the_same_time(cache: Path) -> tuple[Path, bool]:
    met = False

    def meet(stage: str, done: int, total: int, /) -> None:
        nonlocal met
        if stage == "tokenizing" and done == total:
            torch.distributed.barrier()  # both have written everything, neither has put it in place
            met = True

    _a_tenth(pytest.MonkeyPatch())
    return embedded_data(cache, progress=meet), met


def test_killed_and_raced_for_the_cache_holds_one_whole_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankFailure, match=f"exit code {-signal.SIGKILL}"):
        run_ranks(_killed_while_writing, 1, tmp_path)
    assert list((tmp_path / "embedded").glob(".tmp-*"))
    assert _finished(tmp_path) == []
    (first, first_met), (second, second_met) = run_ranks(_at_the_same_time, 2, tmp_path)
    assert first_met
    assert second_met
    assert first == second
    _a_tenth(monkeypatch)
    assert embedded_data(tmp_path, progress=_no_making) == first
    check_prefix(first)
    assert _finished(tmp_path) == [first.parent]


def _finished(cache: Path) -> list[Path]:
    return [path for path in (cache / "embedded").iterdir() if not path.name.startswith(".tmp-")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the whole corpus."""
    cache = tmp_path_factory.mktemp("cache")
    run_ranks(embedded_data, 1, cache)
    return cache


def test_the_corpus_is_enough_for_a_quickstart_to_see_little_of_it_twice(cache: Path) -> None:
    meta = check_prefix(embedded_data(cache))
    assert (meta.vocab_size, meta.eod) == (1024, 0)
    assert meta.tokens is not None
    assert meta.tokens > 2_000_000


def test_the_tokens_are_the_library_of_this_python(cache: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = embedded_data(cache)
    tokenizer = load_tokenizer(at(prefix, ".tokenizer.json"))
    found = IndexedDataset(str(prefix))
    names = [entry.name for entry in check_prefix(prefix).inputs]
    for name in ("argparse.py", "json/decoder.py", "this.py"):
        number = names.index(name)
        begin, end = found.document_indices[number : number + 2]
        ids = [int(token) for k in range(begin, end) for token in found[k]]
        library = Path(os.__file__).parent
        assert tokenizer.decode(ids[:-1]).encode() == (library / name).read_bytes()


def test_the_order_mixes_subjects_and_is_the_same_every_time() -> None:
    names = [source.name for source in embedded_sources()]
    assert names == [source.name for source in embedded_sources()]
    last = names[-len(names) // 20 :]
    assert len({name[0] for name in last}) > 5
    assert not any(part in {"site-packages", "test", "encodings"} for name in names for part in name.split("/"))


class _MadeAnew(Exception):
    pass


def _no_making(stage: str, done: int, total: int, /) -> None:
    if stage != "reading":
        raise _MadeAnew


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:1025"])
def test_another_tokenizer_is_another_corpus(cache: Path, tokenizer: str) -> None:
    embedded_data(cache, tokenizer="bpe:1024", progress=_no_making)
    with pytest.raises(_MadeAnew):
        embedded_data(cache, tokenizer=tokenizer, progress=_no_making)


@pytest.mark.slow  # a corpus that is not there is made above
def test_a_damaged_corpus_is_made_again(cache: Path) -> None:
    prefix = embedded_data(cache)
    before = files_at(prefix)
    at(prefix, ".bin").write_bytes(before[".bin"][:-10])
    assert embedded_data(cache) == prefix
    assert files_at(prefix) == before
