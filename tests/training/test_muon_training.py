"""`train` with Muon: a run that goes on has its momenta and groups, and what cannot be trained is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_ranks
from support.shapes import recipe_for
from support.training_runs import base, make_text, options, target

from mup_megatron.errors import InputError
from mup_megatron.megatron import optimizers, versions
from mup_megatron.training.options import require_possible
from mup_megatron.training.train import run_training

MUON = recipe_for(base(), optimizer="muon", lr=0.02, muon_scale_mode="spectral", muon_nesterov=True)


def stopped_and_gone_on(folder: Path) -> tuple[Any, Any]:
    """In a rank: the losses of a run, and of one that goes on from its middle."""
    text = make_text(folder)
    how = {"train_iters": 10, "eval_iters": 0}
    whole = run_training(
        target(), MUON, text, options(folder / "whole", **how, save=folder / "ck", save_interval=5)
    ).losses
    shutil.rmtree(folder / "ck" / "iter_0000010")
    (folder / "ck" / "latest_checkpointed_iteration.txt").write_text("5")
    again = run_training(target(), MUON, text, options(folder / "again", **how, load=folder / "ck")).losses
    return whole, again


@pytest.mark.skipif(versions.optimizer_package_problem("muon") is not None, reason="megatron-core 0.16 has no Muon")
def test_a_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    ((whole, again),) = run_ranks(stopped_and_gone_on, 1, tmp_path)
    assert len(whole) == 10
    assert again == whole


@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "expert_tensor_parallel_size"])
def test_shards_are_not_taken_for_matrices(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "known_release", lambda: None)
    own = recipe_for(base(), optimizer="muon", muon_tp_mode="blockwise")
    require_possible(target(), own, options(tmp_path), 1)
    with pytest.raises(
        InputError, match=r"muon_tp_mode blockwise: .* of 2 .*Use --muon-tp-mode duplicated \(muon_tp_mo"
    ):
        require_possible(target(), own, options(tmp_path, **{size: 2}), 2)


@pytest.mark.parametrize("name", ["muon", "lion"])
def test_no_distributed_optimizer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "known_release", lambda: None)
    own = recipe_for(base(), optimizer=name)
    with pytest.raises(
        InputError, match=rf"--use-distributed-optimizer: .* the recipe's optimizer is {name}\. Drop it"
    ):
        require_possible(target(), own, options(tmp_path, use_distributed_optimizer=True), 1)


def test_older_releases_do_not_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "known_release", lambda: (0, 16))
    with pytest.raises(InputError, match=r"is muon, for which Megatron-Core has to be 0\.19 or later, and it is 0\.16"):
        require_possible(target(), MUON, options(tmp_path), 1)


def test_the_package_that_it_is_from_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "known_release", lambda: (0, 19))
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"emerging-optimizers.*pip install 'mup-megatron\[muon\]'.* Python 3\.12"):
        require_possible(target(), MUON, options(tmp_path), 1)
