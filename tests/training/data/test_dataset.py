import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_mutators import CANARY, RunsCode
from small_data import make_data
from support import stock
from support.processes import run_ranks

from mup_megatron.errors import InputError
from mup_megatron.training.data import dataset as module
from mup_megatron.training.data.dataset import (
    DatasetTokenizer,
    _arrays_alone,
    build_datasets,
    global_batch,
    sample_indices,
)
from mup_megatron.training.data.prefix import DataMeta, at, copy_data

SETTINGS: dict[str, Any] = {"seq_length": 32, "train_samples": 200, "valid_samples": 10, "seed": 7, "split": "80,20,0"}


def _tokens(dataset: Any) -> np.ndarray[Any, Any]:
    return np.stack([item["tokens"].numpy() for item in (dataset[k] for k in range(len(dataset)))])


def test_samples_are_those_of_megatrons_own_builder(data: tuple[Path, DataMeta], tmp_path: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=32,
        blend=([str(data[0])], None),
        split="80,20,0",
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=DatasetTokenizer(257, 256),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [200, 10, 0], lambda: True, config).build()
    ours = build_datasets(data[0], cache_dir=tmp_path / "ours", **SETTINGS)
    for our, their in zip(ours, theirs, strict=False):
        assert type(our) is GPTDataset
        assert len(our) == len(their) > 0
        for k in range(len(our)):
            assert our[k].keys() == {"tokens", "labels", "loss_mask", "position_ids"}
            for key, value in our[k].items():
                assert torch.equal(value, their[k][key])


def test_an_item_predicts_the_next_token_everywhere(data: tuple[Path, DataMeta], tmp_path: Path) -> None:
    train, valid = build_datasets(data[0], cache_dir=tmp_path, **SETTINGS)
    assert valid is not None
    for item in (train[0], valid[3]):
        assert item["tokens"].shape == (32,)
        assert torch.equal(item["labels"][:-1], item["tokens"][1:])
        assert item["loss_mask"].tolist() == [1.0] * 32
        assert item["position_ids"].tolist() == list(range(32))


def test_the_end_of_a_document_is_learned_too(data: tuple[Path, DataMeta], tmp_path: Path) -> None:
    train, _ = build_datasets(data[0], cache_dir=tmp_path, **SETTINGS)
    ends = [(item["labels"] == 256, item["loss_mask"]) for item in (train[k] for k in range(len(train)))]
    assert sum(int(found.sum()) for found, _ in ends) > 5
    assert all(bool((mask[found] == 1).all()) for found, mask in ends)


def test_the_order_depends_on_the_seed_and_not_on_validation_or_the_cache(
    data: tuple[Path, DataMeta], tmp_path: Path
) -> None:
    first = _tokens(build_datasets(data[0], cache_dir=tmp_path / "a", **SETTINGS)[0])
    again = _tokens(build_datasets(data[0], cache_dir=tmp_path / "a", **SETTINGS)[0])
    train, nothing = build_datasets(data[0], cache_dir=tmp_path / "b", **SETTINGS | {"valid_samples": 0})
    other = _tokens(build_datasets(data[0], cache_dir=tmp_path / "a", **SETTINGS | {"seed": 8})[0])
    assert np.array_equal(first, again)
    assert np.array_equal(first, _tokens(train))
    assert nothing is None
    assert not np.array_equal(first, other)


def test_training_and_validation_share_no_text(data: tuple[Path, DataMeta], tmp_path: Path) -> None:
    train, valid = build_datasets(data[0], cache_dir=tmp_path, **SETTINGS)
    assert valid is not None
    assert set(train.indices.tolist()).isdisjoint(valid.indices.tolist())
    assert max(train.indices) < min(valid.indices)


def test_a_single_file_leaves_something_to_validate_on(tmp_path: Path) -> None:
    prefix, meta = make_data(tmp_path, files=1)
    assert meta.documents == 1
    settings = SETTINGS | {"split": "90,10,0", "seq_length": 16}
    train, valid = build_datasets(prefix, cache_dir=tmp_path / "cache", **settings)
    assert valid is not None
    assert len(train) >= 200
    assert len(valid) >= 10


def test_data_made_anew_get_new_indices(tmp_path: Path) -> None:
    prefix, _ = make_data(tmp_path / "small", files=12)
    other, _ = make_data(tmp_path / "large", files=30)
    cache = tmp_path / "cache"
    build_datasets(prefix, cache_dir=cache, **SETTINGS)
    copy_data(other, prefix, force=True)
    found = _tokens(build_datasets(prefix, cache_dir=cache, **SETTINGS)[0])
    wanted = _tokens(build_datasets(other, cache_dir=cache, **SETTINGS)[0])
    assert np.array_equal(found, wanted)


def test_who_loses_the_race_for_the_indices_uses_the_winners(
    data: tuple[Path, DataMeta], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    construct = module._construct
    winner: list[Any] = []

    def late(*args: Any) -> Any:
        made = construct(*args)
        if not winner:
            winner.append(None)
            winner[0] = build_datasets(data[0], cache_dir=tmp_path, **SETTINGS)[0]
        return made

    monkeypatch.setattr(module, "_construct", late)
    loser, _ = build_datasets(data[0], cache_dir=tmp_path, **SETTINGS)
    assert np.array_equal(_tokens(loser), _tokens(winner[0]))
    assert len(list((tmp_path / "index").iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq_length": 5000}, "tokens for validation, and one sample of seq_length 5000 needs 5001"),
        ({"seq_length": 50_000, "valid_samples": 0}, "tokens for training"),
        ({"split": "100,0,0"}, "leaves 0 tokens for validation"),
        ({"split": "0,1,0"}, "leaves 0 tokens for training"),
        ({"split": "0,0,0"}, "write shares"),
        ({"split": "most,some"}, "write shares"),
        ({"split": "1,1,1,1"}, "write shares"),
    ],
)
def test_too_little_text_is_said_before_anything_is_built(
    data: tuple[Path, DataMeta], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        build_datasets(data[0], cache_dir=tmp_path / "cache", **SETTINGS | changes)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(data: tuple[Path, DataMeta], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(InputError, match=r"cache.*cannot be written"):
        build_datasets(data[0], cache_dir=tmp_path / "cache", **SETTINGS)


def _on_a_rank(prefix: Path, cache: Path) -> tuple[Any, str]:
    try:
        train, _ = build_datasets(prefix, cache_dir=cache, **SETTINGS)
    except InputError as error:
        return None, str(error)
    return _tokens(train), ""


def test_all_ranks_get_the_same_samples_or_the_same_sentence(data: tuple[Path, DataMeta], tmp_path: Path) -> None:
    alone = _tokens(build_datasets(data[0], cache_dir=tmp_path / "a", **SETTINGS)[0])
    for tokens, _ in run_ranks(_on_a_rank, 2, data[0], tmp_path / "b"):
        assert np.array_equal(tokens, alone)
    copy_data(data[0], tmp_path / "bad")
    at(tmp_path / "bad", ".bin").write_bytes(b"")
    (_, first), (_, second) = run_ranks(_on_a_rank, 2, tmp_path / "bad", tmp_path / "c")
    assert first == second
    assert "bad.bin: truncated" in first


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 1), (2, 3), (4, 3), (12, 1), (1, 12)])
def test_an_iteration_has_the_same_samples_in_every_layout(micro: int, ranks: int) -> None:
    dealt = [
        sample_indices(
            5, global_batch_size=12, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=ranks
        )
        for rank in range(ranks)
    ]
    assert {len(batches) for batches in dealt} == {12 // micro // ranks}
    # One micro-batch from every rank, then the next from every rank: the samples come in their order.
    in_turn = [sample for step in zip(*dealt, strict=True) for batch in step for sample in batch]
    assert in_turn == list(range(60, 72))


if importlib.util.find_spec("megatron.training"):  # not in the wheel of megatron-core 0.16

    @pytest.mark.parametrize("rank", [0, 1])
    def test_samples_are_dealt_out_as_by_megatrons_sampler(rank: int) -> None:
        from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

        layout = {"micro_batch_size": 3, "data_parallel_rank": rank, "data_parallel_size": 2}
        theirs = MegatronPretrainingSampler(total_samples=96, consumed_samples=3 * 12, **layout)
        iterations = (sample_indices(number, global_batch_size=12, **layout) for number in range(3, 8))
        assert [batch for batches in iterations for batch in batches] == list(theirs)


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="--global-batch-size 10 is not a multiple of --micro-batch-size 4"):
        sample_indices(0, global_batch_size=10, micro_batch_size=4)


def test_micro_batches_are_stacked_items(data: tuple[Path, DataMeta], tmp_path: Path) -> None:
    train, _ = build_datasets(data[0], cache_dir=tmp_path, **SETTINGS)
    batches = global_batch(
        train, 2, global_batch_size=12, micro_batch_size=3, data_parallel_rank=1, data_parallel_size=2
    )
    assert [batch["tokens"].shape for batch in batches] == [(3, 32), (3, 32)]
    for batch, samples in zip(batches, ([27, 28, 29], [33, 34, 35]), strict=True):
        for row, sample in enumerate(samples):
            for key, value in train[sample].items():
                assert torch.equal(batch[key][row], value)


def _losses_with_and_without_a_mask(prefix: Path, cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = stock.Sizes(vocab_size=320, seq_length=32)
    stock.init_parallel(stock.Layout())
    (model,) = stock.build_chunks(sizes, stock.Layout(), stock.transformer_config(sizes, stock.Layout()))
    train, _ = build_datasets(prefix, cache_dir=cache, **SETTINGS)
    (batch,) = global_batch(train, 0, global_batch_size=4, micro_batch_size=4)
    causal = torch.ones(32, 32, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        with_mask, without = (
            model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"]) for mask in (causal, None)
        )
    return with_mask, without


def test_a_model_reads_the_batches_and_needs_no_attention_mask(data: tuple[Path, DataMeta], tmp_path: Path) -> None:
    ((with_mask, without),) = run_ranks(_losses_with_and_without_a_mask, 1, data[0], tmp_path)
    assert without.shape == (4, 32)
    assert torch.equal(with_mask, without)


def _npy_that_runs_code(path: Path) -> None:
    objects = np.empty(1, dtype=object)
    objects[0] = RunsCode()
    np.save(path, objects, allow_pickle=True)


@pytest.mark.parametrize("name", ["document", "sample", "shuffle"])
@pytest.mark.parametrize(
    "damage",
    [
        _npy_that_runs_code,
        lambda path: path.write_bytes(pickle.dumps(RunsCode())),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"}", b" ", 1)),
        lambda path: path.unlink(),
        lambda path: np.save(path, np.load(path) + 10**6),
        lambda path: np.save(path, np.load(path).astype(np.float64)),
        lambda path: np.save(path, np.load(path)[:0]),
    ],
    ids=["objects", "pickle", "empty", "cut", "open header", "gone", "beyond", "floats", "none"],
)
def test_damaged_indices_are_made_again_and_run_nothing(
    data: tuple[Path, DataMeta], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    before = _tokens(build_datasets(data[0], cache_dir=tmp_path / "cache", **SETTINGS)[0])
    damage(next((tmp_path / "cache").rglob(f"*-train-{name}_index.npy")))
    again, _ = build_datasets(data[0], cache_dir=tmp_path / "cache", **SETTINGS)
    assert np.array_equal(_tokens(again), before)
    assert not (tmp_path / CANARY).exists()


def test_only_what_numpy_cannot_read_is_called_a_damaged_index(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "open.npy", np.zeros(1))
    (tmp_path / "open.npy").write_bytes((tmp_path / "open.npy").read_bytes().replace(b"}", b" ", 1))
    for name in ("objects", "empty", "open"):
        with pytest.raises(InputError, match=r"damaged.*Remove this folder"), _arrays_alone(tmp_path):
            np.load(tmp_path / f"{name}.npy", allow_pickle=True)
    with pytest.raises(ValueError, match=r"^of the library's$"), _arrays_alone(tmp_path):
        raise ValueError("of the library's")


def test_tokens_that_are_none_of_the_vocabulary_are_found_when_the_indices_are_made(
    data: tuple[Path, DataMeta], tmp_path: Path
) -> None:
    copy_data(data[0], tmp_path / "text")
    build_datasets(tmp_path / "text", cache_dir=tmp_path / "cache", **SETTINGS)
    tokens = np.fromfile(tmp_path / "text.bin", dtype=np.uint16)
    tokens[-1] = 300
    tokens.tofile(tmp_path / "text.bin")
    with pytest.raises(InputError, match=r"text\.bin: token \d+ is id 300"):
        build_datasets(tmp_path / "text", cache_dir=tmp_path / "cache", **SETTINGS)


@pytest.mark.parametrize("sizes", [{"train_samples": 2**40}, {"valid_samples": 2**40}])
def test_indices_that_memory_cannot_hold_are_not_begun(
    data: tuple[Path, DataMeta], tmp_path: Path, sizes: dict[str, int]
) -> None:
    with pytest.raises(
        InputError, match=r"samples needs some [0-9]+ GiB of memory, and [0-9]+ GiB are free\. Lower --tr"
    ):
        build_datasets(data[0], cache_dir=tmp_path, **SETTINGS | sizes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", ["9" * 400 + ",1,0", "1,,0", "nan,1", "-1,2", "1,2,3,4"])
def test_shares_that_are_no_numbers_are_refused(data: tuple[Path, DataMeta], tmp_path: Path, split: str) -> None:
    with pytest.raises(InputError, match="write shares of training, validation and test"):
        build_datasets(data[0], cache_dir=tmp_path, **SETTINGS | {"split": split})
