"""Whose checkpoint it is: what is written among Megatron's arguments, and who may go on from it."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest

from mup_megatron.errors import InputError
from mup_megatron.megatron.pretrain import checkpoints
from mup_megatron.megatron.pretrain.checkpoints import SavedRecipe
from mup_megatron.recipe import Recipe, load_recipe, recipe

BASE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 511, "seq_length": 64}


def a_recipe(lr: float = 0.006, **more: Any) -> Recipe:
    return recipe({"base": {**BASE, **more}, "hyperparameters": {"lr": lr}}, source="test")


def signed(given: Recipe) -> argparse.Namespace:
    values = argparse.Namespace(lr=1.0)
    checkpoints.sign(values, given)
    return values


# ---- among the arguments ------------------------------------------------------------------------------------------


def test_a_recipe_comes_back_whole_from_pickled_arguments() -> None:
    given = a_recipe()
    found = checkpoints.recipe_within(pickle.loads(pickle.dumps(signed(given))))
    assert found == SavedRecipe(given.fingerprint, given)


def test_plain_megatrons_arguments_have_none() -> None:
    assert checkpoints.recipe_within(argparse.Namespace(lr=1.0)) == SavedRecipe(None, None)
    assert checkpoints.recipe_within(None) == SavedRecipe(None, None)  # a checkpoint without arguments


@pytest.mark.parametrize("content", [None, 3, "{", "[]", '{"version": 9}'])
def test_a_damaged_recipe_is_said_to_be_one(content: Any) -> None:
    values = signed(a_recipe())
    values.mup_recipe_content = content
    with pytest.raises(InputError, match="the checkpoint's recipe"):
        checkpoints.recipe_within(values)


# ---- who may go on ------------------------------------------------------------------------------------------------


def test_the_same_recipe_goes_on() -> None:
    checkpoints.require_same(checkpoints.recipe_within(signed(a_recipe())), a_recipe(), accept=False)


def test_what_only_informs_makes_no_other_recipe() -> None:
    told = recipe({**a_recipe().model_dump(mode="json"), "provenance": {"study": "x"}}, source="test")
    checkpoints.require_same(checkpoints.recipe_within(signed(told)), a_recipe(), accept=False)


def test_another_recipe_is_refused_with_both_fingerprints_and_what_differs() -> None:
    before, now = a_recipe(lr=0.006), a_recipe(lr=0.003, hidden_size=128)
    with pytest.raises(InputError) as error:
        checkpoints.require_same(checkpoints.recipe_within(signed(before)), now, accept=False)
    message = str(error.value)
    assert before.fingerprint in message
    assert now.fingerprint in message
    assert "hyperparameters.lr: 0.006 there, 0.003 here" in message
    assert "base.hidden_size: 64 there, 128 here" in message
    assert message.count(" there, ") == 2  # nothing that is alike
    assert "--mup-accept-recipe-change" in message


def test_a_recipe_with_another_horizon_is_refused() -> None:
    content = a_recipe().model_dump(mode="json")
    tuning = {"train_iters": 100, "global_batch_size": 8, "seq_length": 16}

    def moved(rule: str) -> Recipe:
        own = {"rule": rule, "tokens": 51200, "batch": 16}
        return recipe({**content, "training": tuning, "horizon": own}, source="moved")

    checkpoints.require_same(checkpoints.recipe_within(signed(moved("steps"))), moved("steps"), accept=False)
    with pytest.raises(InputError, match="steps there, timescale here"):
        checkpoints.require_same(checkpoints.recipe_within(signed(moved("steps"))), moved("timescale"), accept=False)
    with pytest.raises(InputError, match="another recipe"):
        checkpoints.require_same(checkpoints.recipe_within(signed(a_recipe())), moved("steps"), accept=False)


def test_plain_megatrons_is_refused_too() -> None:
    with pytest.raises(InputError, match="trained without a recipe"):
        checkpoints.require_same(SavedRecipe(None, None), a_recipe(), accept=False)


def test_who_means_it_may() -> None:
    checkpoints.require_same(SavedRecipe(None, None), a_recipe(), accept=True)
    checkpoints.require_same(checkpoints.recipe_within(signed(a_recipe(lr=0.1))), a_recipe(), accept=True)


def test_a_folded_checkpoint_is_refused_even_if_a_change_is_accepted() -> None:
    values = signed(a_recipe())
    checkpoints.sign_folded(values, folded=True)
    for accept in (False, True):
        with pytest.raises(InputError, match=r"folded into its weights, .* `mup-megatron unfold`"):
            checkpoints.require_same(checkpoints.recipe_within(values), a_recipe(), accept=accept)
    checkpoints.sign_folded(values, folded=False)
    assert vars(values) == vars(signed(a_recipe()))


# ---- without the plug-in's flags ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10\n")
    checkpoints.write_sidecar(str(folder), a_recipe())
    return tmp_path


def test_the_copy_beside_a_checkpoint_is_the_recipe(saved: Path) -> None:
    assert load_recipe(saved / "iter_0000010" / checkpoints.SIDECAR) == a_recipe()


def test_a_copy_that_cannot_be_written_is_told_and_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("a file")
    assert "elsewhere" in str(checkpoints.write_sidecar(str(tmp_path / "elsewhere"), a_recipe()))
    assert checkpoints.write_sidecar(None, a_recipe()) is None  # a run that saves nothing


def test_the_copy_of_the_folder_speaks_for_a_checkpoint_without_one(saved: Path) -> None:
    (saved / "iter_0000010" / checkpoints.SIDECAR).rename(saved / checkpoints.SIDECAR)
    with pytest.raises(InputError, match=r"Give --mup-recipe .*/mup.recipe.yaml"):
        checkpoints.require_plain(["--load", str(saved)])


def test_only_the_first_rank_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    checkpoints.write_sidecar(str(tmp_path), a_recipe())
    assert not (tmp_path / checkpoints.SIDECAR).exists()


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
@pytest.mark.parametrize("form", ["{flag} {root}", "{flag}={root}"])
def test_a_plain_line_does_not_go_on_from_a_recipes_checkpoint(saved: Path, flag: str, form: str) -> None:
    words = ["--lr", "0.1", *form.format(flag=flag, root=saved).split()]
    with pytest.raises(InputError, match=r"trained with a recipe .* Give --mup-recipe .*iter_0000010/mup.recipe.yaml"):
        checkpoints.require_plain(words)


def test_the_step_that_is_asked_for_counts(saved: Path) -> None:
    (saved / "iter_0000020").mkdir()  # plain
    checkpoints.require_plain(["--load", str(saved), "--ckpt-step", "20"])
    with pytest.raises(InputError):
        checkpoints.require_plain(["--load", str(saved), "--ckpt-step", "10"])


@pytest.mark.parametrize("tracker", [None, "", "what?", "30", "release"])
def test_what_is_no_checkpoint_of_a_recipe_is_left_to_megatron(saved: Path, tracker: str | None) -> None:
    (saved / "latest_checkpointed_iteration.txt").unlink()
    if tracker is not None:
        (saved / "latest_checkpointed_iteration.txt").write_text(tracker)
    checkpoints.require_plain(["--load", str(saved)])
    checkpoints.require_plain(["--load"])
    checkpoints.require_plain([])
