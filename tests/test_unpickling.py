"""Pickles are read with a list of what they may name, and whatever else they name is not looked up."""

import argparse
import io
import pickle
import random
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_mutators import CANARY, RunsCode

from mup_megatron.errors import InputError
from mup_megatron.unpickling import StandIn, read_pickle, read_plain_values, read_torch, torch_loads_only_tensors

ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"PurePosixPath"},
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING"},
}


def read(data: bytes) -> object:
    return read_pickle(io.BytesIO(data), ALLOWED, source="a file", remedy="Remove it.")


def saved(value: object, *, as_zip: bool = True) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=as_zip)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("value", [1, [1.0, "x", None], {"a": (1, {2})}, OrderedDict(a=1)], ids=repr)
def test_plain_values_and_what_is_on_the_list_are_read(value: object) -> None:
    assert read(pickle.dumps(value)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_another_class_is_refused_by_its_name_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^a file: holds posix\.mkdir, which .* may run code.* Remove it\.$"):
        read(pickle.dumps([OrderedDict(a=RunsCode())], protocol))
    assert not (tmp_path / CANARY).exists()


def test_a_name_within_a_listed_class_is_another_name() -> None:
    """Since protocol 4 a pickle may ask for an attribute of a class, such as a method."""
    with pytest.raises(InputError, match=r"holds collections\.OrderedDict\.fromkeys"):
        read(b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.")


def test_a_class_that_cannot_be_imported_is_not_imported() -> None:
    with pytest.raises(InputError, match=r"holds no_such_module\.Name"):
        read(b"\x80\x04\x8c\x0eno_such_module\x8c\x04Name\x93.")


@pytest.mark.parametrize("data", [b"", b"\x80", b"not a pickle", pickle.dumps([1, 2])[:-3], b"\x80\x04K\x01R."])
def test_what_is_no_pickle_is_damaged(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^a file: damaged \(.*\)\. Remove it\.$"):
        read(data)


_A_CLASS = b"\x80\x04\x8c\x07pathlib\x8c\x0dPurePosixPath\x93"
_A_MEMBER = (
    b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x14_MEM_FORMAT_ENCODING\x93K\x00\x85R"  # called with 0
)


@pytest.mark.parametrize(
    "data",
    [
        _A_CLASS + b"N}\x8c\x08suffixesK\x07s\x86b.",
        _A_CLASS + b"}\x8c\x08suffixesK\x07sb.",
        _A_CLASS + b"K\x07a.",
        _A_CLASS + b"(K\x07e.",
        _A_CLASS + b"K\x01K\x07s.",
        _A_CLASS + b"(K\x01K\x07u.",
        _A_CLASS + b"(K\x07\x90.",
        _A_MEMBER + b"}\x8c\x07_value_K\x07sb.",
    ],
)
def test_a_pickle_changes_nothing_that_was_there_before_it(data: bytes) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    before = dict(vars(PurePosixPath)), {member: dict(vars(member)) for member in _MEM_FORMAT_ENCODING}
    with pytest.raises(InputError, match=r"^a file: damaged \(UnpicklingError: it would change .* itself\)"):
        read(data)
    assert before == (dict(vars(PurePosixPath)), {member: dict(vars(member)) for member in _MEM_FORMAT_ENCODING})


@pytest.mark.parametrize("as_zip", [True, False])
def test_torchs_files_hold_tensors_and_plain_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_zip: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    found = read_torch(saved({"a": torch.ones(2)}, as_zip=as_zip), source="a file", remedy="Remove it.")
    assert found["a"].tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match=r"^a file: holds posix\.mkdir"):
        read_torch(saved([RunsCode()], as_zip=as_zip), source="a file", remedy="Remove it.")
    assert not (tmp_path / CANARY).exists()
    with pytest.raises(InputError, match=r"^a file: damaged"):
        read_torch(io.BytesIO(b"x" * 100), source="a file", remedy="Remove it.")


def test_a_library_cannot_ask_torch_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.load
    with torch_loads_only_tensors(), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(saved([RunsCode()]), weights_only=False)
    assert not (tmp_path / CANARY).exists()
    assert torch.load is before
    torch.load(saved([RunsCode()]), weights_only=False)
    assert (tmp_path / CANARY).exists(), "else the above would prove nothing"


@pytest.mark.parametrize("as_zip", [True, False])
def test_plain_values_are_read_whatever_is_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_zip: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Linear(2, 2)
    others: dict[str, Any] = {
        "args": argparse.Namespace(lr=1.0, path=Path("x")),
        "rng": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "numbers": {np.float64(1.0): np.arange(3), (1, torch.float16): {1, frozenset({2})}},
        "module": module,
        "optimizer": torch.optim.AdamW(module.parameters()).state_dict(),
        "sizes": OrderedDict(a=torch.Size([1])),
        "code": RunsCode(),
    }
    path = tmp_path / "file.pt"
    torch.save({"mine": {"a": [1, "x"]}, **others}, path, _use_new_zipfile_serialization=as_zip)
    found = read_plain_values(path, remedy="Remove it.")
    assert isinstance(found, dict)
    assert found["mine"] == {"a": [1, "x"]}
    assert isinstance(found["code"], StandIn)
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("data", [b"", b"\xff" * 50, b"PK\x05\x06" + bytes(18), pickle.dumps(1)])
def test_what_holds_no_plain_values_is_damaged(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"file\.pt: damaged .*Remove it\.$"):
        read_plain_values(path, remedy="Remove it.")
