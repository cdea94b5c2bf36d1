"""Whose a checkpoint of DeepSpeed's is, is read without running what the checkpoint asks for. No engine is needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_mutators import CANARY, RunsCode
from support.ds_models import recipe_for

from mup_megatron.deepspeed.checkpoints import client_state, origin
from mup_megatron.errors import InputError

STATES = "mp_rank_00_model_states.pt"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "latest").write_text("t\n")
    return tmp_path


def save(root: Path, content: Any, *, as_zip: bool = True) -> None:
    torch.save(content, root / "t" / STATES, _use_new_zipfile_serialization=as_zip)


@pytest.mark.parametrize("as_zip", [True, False])
def test_the_recipe_is_found_beside_the_weights(root: Path, as_zip: bool) -> None:
    recipe = recipe_for("gpt2")
    save(root, {"module": {"w": torch.ones(2)}, **client_state(recipe)}, as_zip=as_zip)
    found = origin(root, None, universal=False)
    assert found is not None
    assert found.recipe == recipe


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("key", ["mup_megatron", "mine"])
def test_a_class_is_refused_by_its_name_and_file(root: Path, as_zip: bool, key: str) -> None:
    save(root, {"module": {}, key: RunsCode()}, as_zip=as_zip)
    with pytest.raises(InputError, match=rf"{STATES}: holds posix\.mkdir, which .* may run code.*add_safe_globals"):
        origin(root, None, universal=False)
    assert not (root / CANARY).exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "t" / STATES).write_bytes(b""), f"{STATES}: damaged"),
        (lambda root: (root / "t" / STATES).write_bytes(b"\xff" * 50), f"{STATES}: damaged"),
        (lambda root: save(root, [1, 2]), f"{STATES}: not a file of DeepSpeed's model states"),
        (lambda root: save(root, {"mup_megatron": {"recipe": "[" * 100_000}}), "recipe cannot be read"),
        (lambda root: save(root, {"mup_megatron": 3}), "recipe cannot be read"),
        (lambda root: (root / "latest").write_bytes(b"\xff"), "latest: not UTF-8 text"),
    ],
)
def test_damaged_checkpoints(root: Path, damage: Callable[[Path], object], said: str) -> None:
    save(root, {"module": {}})
    damage(root)
    with pytest.raises(InputError) as refusal:
        origin(root, None, universal=False)
    assert said in str(refusal.value)
