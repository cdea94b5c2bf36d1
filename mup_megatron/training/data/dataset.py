"""A PREFIX → Megatron's own GPTDataset → the micro-batches of one iteration.

The samples and their order are those of a Megatron-LM run with the same data path, seed, sequence length, split and
numbers of samples. Not a data loader: there are no workers and nothing to save. Where a run stands is the number of its
iteration, and the same samples make up a global batch in every layout.
"""

import hashlib
import json
import re
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version_text
from mup_megatron.training.data import CACHE
from mup_megatron.training.data.prefix import DataMeta, at, publish, remove_damaged, staging
from mup_megatron.training.data.reading import check_prefix, read_index, require_known_tokens
from mup_megatron.training.ranks import on_first_rank
from mup_megatron.validation import brief

if TYPE_CHECKING:
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

DEFAULT_SPLIT = "99,1,0"


@dataclass(frozen=True)
class DatasetTokenizer:
    """The part of a tokenizer that GPTDataset asks for. It has no padding token, so no token of the data is masked."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """The values that Megatron names its cached indices after."""
        return {"vocab_size": self.vocab_size, "eod": self.eod}


def build_datasets(
    prefix: Path,
    *,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    split: str = DEFAULT_SPLIT,
    cache_dir: Path = CACHE,
) -> tuple["GPTDataset", "GPTDataset | None"]:
    """Builds Megatron's data sets for training and validation.

    Call it on all ranks when torch.distributed is on: the first rank checks the data and makes the indices, in a folder
    that appears only when they are whole; the others wait, then read them. `cache_dir` must be seen by all.

    Items are dictionaries of tensors of shape [seq_length]: `tokens`, `labels`, `loss_mask`, `position_ids`. There is
    no attention mask; Megatron's attention makes the causal one itself.

    Args:
        prefix: what `mup-megatron data` made, or Megatron's own tool with a PREFIX.json beside it.
        seq_length: tokens per sample.
        train_samples: samples of the whole run, train_iters × global_batch_size. Where that is more than one epoch the
            order depends on it, as in Megatron.
        valid_samples: likewise; 0 for no validation set. The training samples don't depend on it.
        seed: of the order.
        split: Megatron's `--split`: shares of the sequences for training, validation, test.
        cache_dir: where the indices are kept, in `index/`.

    Raises:
        InputError: on every rank: the data are missing or damaged, too short for `seq_length`, or the disk is full.
    """
    assert seq_length > 0
    assert train_samples > 0
    assert valid_samples >= 0
    _require_split(split)
    prefix, cache_dir = prefix.resolve(), cache_dir.resolve()
    wanted = (train_samples, valid_samples or None)

    def prepare() -> tuple[DataMeta, Path]:
        meta = check_prefix(prefix)
        config = _config(prefix, meta, seq_length=seq_length, seed=seed, split=split, path_to_cache=None)
        _require_tokens(prefix, config, wanted)
        _require_room(prefix, config, wanted)
        settings = [_stamp(prefix), str(prefix), meta.vocab_size, meta.eod, seq_length, wanted, seed, split]
        key = hashlib.sha256(json.dumps([core_version_text(), *settings]).encode()).hexdigest()[:16]
        indices = cache_dir / "index" / key
        if indices.exists() and not _are_sound(indices, len(read_index(prefix).sequence_lengths)):
            remove_damaged(indices)
        if not indices.is_dir():
            require_known_tokens(prefix, meta)
            with staging(indices.parent) as folder:
                _construct(prefix, _with_cache(config, folder), wanted)
                publish(folder, indices)
        return meta, indices

    meta, indices = on_first_rank(prepare)
    if not indices.is_dir():
        raise InputError(f"{indices}: made by the first rank, not seen by this one. Use a cache that all nodes share.")
    config = _config(prefix, meta, seq_length=seq_length, seed=seed, split=split, path_to_cache=indices)
    with _arrays_alone(indices):
        train, valid = _construct(prefix, config, wanted)
    assert train is not None
    return train, valid


def sample_indices(
    iteration: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> list[list[int]]:
    """Lists the samples that a data-parallel rank takes in an iteration (counted from 0), one list per micro-batch.

    Iteration i uses samples i·GBS … (i+1)·GBS − 1. They are dealt out as by Megatron's `MegatronPretrainingSampler`:
    a micro-batch of consecutive samples to every rank in turn, until none is left.

    Raises:
        InputError: the global batch does not divide into micro-batches for every rank.
    """
    together = micro_batch_size * data_parallel_size
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % together:
        raise InputError(
            f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size {micro_batch_size} × "
            f"{data_parallel_size} data-parallel ranks. Choose sizes that divide."
        )
    assert 0 <= data_parallel_rank < data_parallel_size
    first = iteration * global_batch_size + data_parallel_rank * micro_batch_size
    starts = range(first, (iteration + 1) * global_batch_size, together)
    return [list(range(start, start + micro_batch_size)) for start in starts]


def global_batch(
    dataset: "GPTDataset",
    iteration: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> list[dict[str, "torch.Tensor"]]:
    """Returns this rank's micro-batches of an iteration (counted from 0), with tensors [micro_batch, seq_length].

    Raises:
        InputError: see `sample_indices`.
    """
    from torch.utils.data import default_collate

    batches = sample_indices(
        iteration,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    assert batches[-1][-1] < len(dataset), "the data set was built for fewer iterations"
    return [default_collate([dataset[index] for index in batch]) for batch in batches]


def _config(
    prefix: Path, meta: DataMeta, *, seq_length: int, seed: int, split: str, path_to_cache: Path | None
) -> "GPTDatasetConfig":
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split=split,
        path_to_cache=str(path_to_cache) if path_to_cache else None,
        tokenizer=DatasetTokenizer(meta.vocab_size, meta.eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _with_cache(config: "GPTDatasetConfig", folder: Path) -> "GPTDatasetConfig":
    from copy import copy

    config = copy(config)
    config.path_to_cache = str(folder)
    return config


def _ranges(config: "GPTDatasetConfig", sequences: int) -> list[tuple[int, int]]:
    """First and last (exclusive) sequence of training and of validation, rounded as Megatron's builder does."""
    shares = [share or (0.0, 0.0) for share in config.split_matrix[:2]]
    return [(round(begin * float(sequences)), round(end * float(sequences))) for begin, end in shares]


def _construct(prefix: Path, config: "GPTDatasetConfig", wanted: tuple[int | None, ...]) -> "list[GPTDataset | None]":
    """Does what BlendedMegatronDatasetBuilder does for a single prefix, without barriers and only for what is wanted.

    Its barriers would leave all others waiting when the first rank fails, and it would never end on an empty split.
    """
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    tokens = GPTDataset.build_low_level_dataset(str(prefix), config)
    ranges = _ranges(config, GPTDataset.numel_low_level_dataset(tokens))
    datasets: list[GPTDataset | None] = []
    for split, (begin, end), samples in zip((Split.train, Split.valid), ranges, wanted, strict=True):
        indices = np.arange(begin, end, dtype=np.int32)
        datasets.append(
            GPTDataset(tokens, str(prefix), indices, samples, split, config) if samples is not None else None
        )
    return datasets


def _require_split(split: str) -> None:
    shares = split.split(",")
    if not (
        len(shares) <= 3
        and all(re.fullmatch(r"[0-9]{1,12}(\.[0-9]*)?", share) for share in shares)
        and any(map(float, shares))
    ):
        raise InputError(
            f"split {brief(split)}: write shares of training, validation and test, for example {DEFAULT_SPLIT}."
        )


def _require_tokens(prefix: Path, config: "GPTDatasetConfig", wanted: tuple[int | None, ...]) -> None:
    lengths = read_index(prefix).sequence_lengths
    needed = config.sequence_length + 1
    for name, (begin, end), samples in zip(
        ("training", "validation"), _ranges(config, len(lengths)), wanted, strict=True
    ):
        tokens = int(lengths[begin:end].sum())
        if samples is not None and tokens < needed:
            raise InputError(
                f"{at(prefix, '.idx')}: split {config.split} leaves {tokens} tokens for {name}, and one sample of "
                f"seq_length {config.sequence_length} needs {needed}. "
                "Use more text, a shorter seq_length or another split."
            )


_BYTES_PER_SAMPLE = 24
"""What Megatron's three indices take while they are made: two numbers for each sample's place, one for its turn."""
_BYTES_PER_SEQUENCE = 16
"""Likewise for each sequence and epoch."""


def _require_room(prefix: Path, config: "GPTDatasetConfig", wanted: tuple[int | None, ...]) -> None:
    """Raises InputError if the indices of so many samples do not fit into memory: the making of them cannot be caught.

    A small corpus takes many epochs, and so more.
    """
    lengths = read_index(prefix).sequence_lengths
    needed = 0
    for (begin, end), samples in zip(_ranges(config, len(lengths)), wanted, strict=True):
        if samples is not None:
            tokens = int(lengths[begin:end].sum())
            epochs = samples * config.sequence_length // tokens + 1
            needed += _BYTES_PER_SAMPLE * samples + _BYTES_PER_SEQUENCE * (end - begin) * epochs
    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"{at(prefix, '.idx')}: Megatron's index of {sum(samples or 0 for samples in wanted)} samples needs some "
            f"{needed / 2**30:.0f} GiB of memory, and {free / 2**30:.0f} GiB are free. Lower --train-iters, "
            "--eval-iters or --global-batch-size."
        )


def _stamp(prefix: Path) -> list[int]:
    """Changes when the data at a prefix are made anew; Megatron's own names of indices don't."""
    found = [at(prefix, suffix).stat() for suffix in (".idx", ".bin")]
    return [number for stat in found for number in (stat.st_size, stat.st_mtime_ns)]


_UNREADABLE = (EOFError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError, tokenize.TokenError)
"""What numpy raises for a file that is no array: it evaluates the header as a literal, and else takes it to tokens."""


def _are_sound(indices: Path, sequences: int) -> bool:
    """Returns whether cached indices are numbers alone and stay within each other. Reads no pickle."""
    import numpy as np

    try:
        for path in indices.glob("*-document_index.npy"):
            documents, samples, order = (
                np.load(path.with_name(path.name.replace("document_index", name)), mmap_mode="r", allow_pickle=False)
                for name in ("document_index", "sample_index", "shuffle_index")
            )
            whole = all(array.dtype.kind in "iu" for array in (documents, samples, order))
            shapes = (documents.ndim, samples.ndim, order.ndim, samples.shape[1:]) == (1, 2, 1, (2,))
            if not (whole and shapes and len(documents) and len(samples) > 1 and len(order)):
                return False
            within = ((documents, sequences), (samples[:, 0], len(documents)), (order, len(samples) - 1))
            if any(array.min() < 0 or array.max() >= end for array, end in within) or samples.min() < 0:
                return False
    except (OSError, *_UNREADABLE):
        return False
    return any(indices.glob("*-document_index.npy"))


@contextmanager
def _arrays_alone(indices: Path) -> Iterator[None]:
    """For the time of Megatron's reading, numpy loads no pickle; it asks numpy to, though it never writes one."""
    import numpy as np

    before = np.load

    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return before(*args, **{**kwargs, "allow_pickle": False})
        except _UNREADABLE as error:
            raise InputError(f"{indices}: damaged ({brief(error)}). Remove this folder; it is made again.") from None

    np.load = load
    try:
        yield
    finally:
        np.load = before
