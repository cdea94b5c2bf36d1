from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mup_megatron.errors import InputError
from mup_megatron.training.data.prefix import DataMeta, at
from mup_megatron.training.data.reading import (
    check_prefix,
    read_index,
    require_known_tokens,
    require_vocab,
    small_vocabulary_warning,
)


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


def test_data_of_another_tokenizer_are_noticed() -> None:
    said = small_vocabulary_warning(1024, 50257, data="d")
    assert said is not None
    assert said.startswith("Warning: d has a vocabulary of 1024, the model one of 50257.")
    assert small_vocabulary_warning(50000, 50257, data="d") is None, "rounded up"
