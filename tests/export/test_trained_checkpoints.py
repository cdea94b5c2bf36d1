"""What `mup-megatron train` saves, exported: against the live Megatron model, in every layout, and damaged."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_mutators import CANARY, RunsCode, agree_with_files
from support.exported import KINDS, loaded, models, recipe_of, tokens
from support.processes import run_ranks
from support.saved_models import LIVE, save_again, save_live
from support.training_runs import Finished, command_line

from mup_megatron.recipe import save_recipe

EXACT = 1e-5


def export_all(folder: Path, names: list[str], *more: str, to: str = "hf") -> dict[str, Finished]:
    """`mup-megatron export` of saved models, in this rank, into `folder`/`to` NUMBER."""
    return {
        name: command_line(
            "export", str(folder / str(number)), "--recipe", str(folder / f"{number}.yaml"), *more,
            "--to", str(folder / f"{to}{number}"),
        )
        for number, name in enumerate(LIVE)
        if name in names
    }  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[str, Finished]]:
    """Saved models, their live logits, and what was said when they were exported."""
    folder = tmp_path_factory.mktemp("saved")
    for number, name in enumerate(LIVE):
        save_recipe(recipe_of(models(KINDS[name])[0]), folder / f"{number}.yaml")
    return folder, *run_ranks(_saved_and_exported, 1, folder)[0]


def _saved_and_exported(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Finished]]:
    return save_live(folder), export_all(folder, LIVE)


@pytest.mark.parametrize("number", range(len(LIVE)), ids=LIVE)
def test_an_exported_checkpoint_gives_the_live_models_logits(
    saved: tuple[Path, dict[str, torch.Tensor], dict[str, Finished]], number: int
) -> None:
    folder, logits, said = saved
    name = LIVE[number]
    assert said[name].code == 0, said[name]
    model = models(KINDS[name])[1]
    with torch.no_grad():
        given = loaded(folder / f"hf{number}")(tokens(model)).logits
    assert (given - logits[name]).abs().max() < EXACT
    assert logits[name].std() > 0.1


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}),
        (
            "mixtral",
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
        ),
    ],
    ids=["TP2 × PP3", "TP2, EP2"],
)
def test_the_layout_of_the_run_changes_no_byte(
    saved: tuple[Path, dict[str, torch.Tensor], dict[str, Finished]], tmp_path: Path, name: str, layout: dict[str, Any]
) -> None:
    folder, _, _ = saved
    number = LIVE.index(name)
    world = layout["tensor_model_parallel_size"] * layout.get("pipeline_model_parallel_size", 1)
    run_ranks(save_again, world, folder / str(number), name, tmp_path / str(number), layout)
    shutil.copy(folder / f"{number}.yaml", tmp_path)
    assert len(list((tmp_path / str(number) / "iter_0000001").glob("*.distcp"))) > 1
    said = run_ranks(export_all, 1, tmp_path, [name])[0][name]
    assert said.code == 0, said
    file = "model.safetensors"
    assert (tmp_path / f"hf{number}" / file).read_bytes() == (folder / f"hf{number}" / file).read_bytes()
