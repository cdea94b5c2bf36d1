"""Whose a checkpoint of DeepSpeed's is, is read without running what the checkpoint asks for. No engine is needed."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_mutators import CANARY, RunsCode
from support.ds_models import recipe_for

from mup_megatron.deepspeed.checkpoints import client_state, recipe_of_checkpoint
from mup_megatron.deepspeed.resume import around_load
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
    found = recipe_of_checkpoint(root, None, universal=False)
    assert found is not None
    assert found.recipe == recipe


@pytest.mark.parametrize("as_zip", [True, False])
def test_the_users_own_client_state_may_be_anything(root: Path, as_zip: bool) -> None:
    """Megatron-DeepSpeed's is its arguments and the state of its random numbers. DeepSpeed unpickles it right after."""
    recipe = recipe_for("gpt2")
    own = {"args": argparse.Namespace(lr=0.1), "rng": np.random.get_state(), "mine": RunsCode()}
    save(root, {"module": {"w": torch.ones(2)}, **own, **client_state(recipe)}, as_zip=as_zip)
    found = recipe_of_checkpoint(root, None, universal=False)
    assert found is not None
    assert found.recipe == recipe
    assert not (root / CANARY).exists()


def test_our_part_is_plain(root: Path) -> None:
    for content in (RunsCode(), {"recipe": RunsCode()}):
        save(root, {"module": {}, "mup_megatron": content})
        with pytest.raises(InputError, match="recipe cannot be read"):
            recipe_of_checkpoint(root, None, universal=False)
        assert not (root / CANARY).exists()


class PlainEngine(torch.nn.Module):
    """As much of an engine as is looked at before an engine without an entry loads."""

    optimizer = object()

    def load_universal_checkpoint(self) -> bool:
        return False


def test_a_run_without_an_entry_hears_of_the_recipe_beside_anything(root: Path) -> None:
    save(root, {"module": {}, "args": argparse.Namespace(), **client_state(recipe_for("gpt2"))})
    with (
        pytest.raises(InputError, match="was trained with a recipe"),
        around_load(PlainEngine(), str(root), None, optimizer=True),
    ):
        raise AssertionError("loaded")


def test_a_run_without_an_entry_hears_that_nobody_could_look(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "t" / STATES).write_bytes(b"\xff" * 50)
    with around_load(PlainEngine(), str(root), None, optimizer=True):
        pass
    told = capsys.readouterr().err
    assert "warning: " in told
    assert f"{STATES}: damaged" in told
    assert "trained with a recipe is not known" in told


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
        recipe_of_checkpoint(root, None, universal=False)
    assert said in str(refusal.value)
