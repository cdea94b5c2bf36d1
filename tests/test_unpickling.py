"""Pickles are read with a list of what they may name, and whatever else they name is not looked up."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from fuzz_mutators import CANARY, RunsCode

from mup_megatron.errors import InputError
from mup_megatron.unpickling import read_pickle, read_torch, torch_loads_only_tensors

ALLOWED = {"collections": {"OrderedDict"}}


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
