"""Checkpoints of `mup-megatron train`, folded for stock software, and unfolded for going on with training."""

import csv
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_mutators import RunsCode, agree_with_files
from support.exported import KINDS, models, recipe_of
from support.processes import run_ranks
from support.saved_models import save_one, stock_logits
from support.training_runs import Finished, base, command_line, make_text, target

from mup_megatron.recipe import Hyperparameters, Recipe, save_recipe
from mup_megatron.yaml_io import dump_yaml

EXACT = 1e-5
STOCK = ("gpt2", "llama with biases", "qwen3", "mixtral", "deepseek_v3")
FP32 = 1e-6
"""Relative, of a loss after weights were folded and unfolded in single precision."""


# ---- for stock software ----------------------------------------------------------------------------------------------


def _folded(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Finished]]:
    """Live logits of several kinds, those of stock Megatron-Core from folded checkpoints, and what was said."""
    logits, said, found = {}, {}, {}
    for number, name in enumerate(STOCK):
        logits[name] = save_one(folder / str(number), name)
        save_recipe(recipe_of(models(KINDS[name])[0]), folder / f"{number}.yaml")
        own = ["--recipe", str(folder / f"{number}.yaml")]
        said[name] = command_line("fold", str(folder / str(number)), *own, "--to", str(folder / f"folded {number}"))
        if said[name].code == 0:
            found[name] = stock_logits(folder / f"folded {number}", name)
    return logits, found, said


@pytest.fixture(scope="module")
def folded(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Finished]]:
    folder = tmp_path_factory.mktemp("folded")
    return folder, *run_ranks(_folded, 1, folder)[0]


@pytest.mark.parametrize("name", STOCK)
def test_stock_megatron_computes_a_folded_checkpoint_as_it_was_trained(
    folded: tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Finished]], name: str
) -> None:
    _, logits, found, said = folded
    assert said[name].code == 0, said[name]
    assert (found[name] - logits[name]).abs().max() < EXACT
    assert logits[name].std() > 0.1
    assert "multipliers folded into " in said[name].stdout
    assert "there is no state of an optimizer" in said[name].stdout


# ---- and back --------------------------------------------------------------------------------------------------------

_LLAMA: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
}
RUNS: dict[str, tuple[dict[str, Any], dict[str, float], list[str]]] = {
    "tied": ({}, {"embedding_multiplier": 4.0, "output_multiplier": 2.0, "attention_multiplier": 0.5}, []),
    "llama": (
        _LLAMA,
        {
            "embedding_multiplier": 4.0,
            "output_multiplier": 2.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.5,
        },
        [],
    ),
    "of any size": (
        _LLAMA,
        {
            "embedding_multiplier": 3.0,
            "output_multiplier": 1.7,
            "attention_multiplier": 1.6,
            "residual_multiplier": 0.8,
        },
        [],
    ),
    "bf16": (_LLAMA, {"embedding_multiplier": 4.0, "residual_multiplier": 0.5}, ["--bf16"]),
    "distributed": (_LLAMA, {"embedding_multiplier": 4.0}, ["--use-distributed-optimizer"]),
}


def _losses(folder: Path) -> list[str]:
    with (folder / "metrics.csv").open() as stream:
        return [row["loss"] for row in csv.DictReader(stream)]


def _train(name: str, more: list[str], to: str, *words: str) -> Finished:
    return command_line(
        "train", f"{name}/m.yaml", "--recipe", f"{name}/r.yaml", "--data", "text", "--output", f"{name}/{to}",
        "--data-cache-path", "cache", "--train-iters", "4", "--global-batch-size", "4", "--eval-iters", "0",
        *more, *words,
    )  # fmt: skip


def _there_and_back(folder: Path) -> dict[str, dict[str, Finished]]:
    """Runs of four iterations, in this rank; those after the second once more from an unfolded checkpoint."""
    os.chdir(folder)
    make_text(folder)
    said = {}
    for name, (keys, multipliers, more) in RUNS.items():
        own = Path(name)
        own.mkdir()
        (own / "m.yaml").write_text(dump_yaml(target(**keys).model_dump(mode="json")))
        save_recipe(Recipe(base=base(**keys), hyperparameters=Hyperparameters(lr=0.01, **multipliers)), own / "r.yaml")
        recipe = ["--recipe", f"{name}/r.yaml"]

        def train(
            to: str, *words: str, own: Path = own, recipe: list[str] = recipe, more: list[str] = more
        ) -> Finished:
            return command_line(
                "train", f"{own}/m.yaml", *recipe, "--data", "text", "--output", f"{own}/{to}",
                "--data-cache-path", "cache", "--train-iters", "4", "--global-batch-size", "4", "--eval-iters", "0",
                *more, *words,
            )  # fmt: skip

        whole = train("whole", "--save", f"{name}/ck", "--save-interval", "2")
        (own / "ck" / "latest_checkpointed_iteration.txt").write_text("2")
        fold = command_line("fold", f"{name}/ck", *recipe, "--to", f"{name}/folded")
        unfold = command_line("unfold", f"{name}/folded", *recipe, "--to", f"{name}/unfolded")
        said[name] = {
            "whole": whole,
            "fold": fold,
            "unfold": unfold,
            "go on": train("rest", "--load", f"{name}/unfolded"),
            "folded": train("no", "--load", f"{name}/folded"),
            "again": command_line("fold", f"{name}/folded", *recipe, "--to", f"{name}/twice"),
            "export": command_line("export", f"{name}/folded", *recipe, "--to", f"{name}/hf"),
            "not folded": command_line("unfold", f"{name}/ck", *recipe, "--to", f"{name}/no"),
        }
    return said


@pytest.fixture(scope="module")
def back(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Finished]]]:
    folder = tmp_path_factory.mktemp("back")
    return folder, run_ranks(_there_and_back, 1, folder)[0]


@pytest.mark.parametrize("name", ["tied", "llama", "of any size", "bf16"])
def test_what_is_unfolded_goes_on_as_if_it_had_not_been_folded(
    back: tuple[Path, dict[str, dict[str, Finished]]], name: str
) -> None:
    """To the bit where multipliers are powers of two, with clipping: nothing was trained folded."""
    folder, said = back
    for step in ("whole", "fold", "unfold", "go on"):
        assert said[name][step].code == 0, said[name][step]
    whole, rest = _losses(folder / name / "whole"), _losses(folder / name / "rest")
    if name == "of any size":
        assert [*map(float, rest)] == pytest.approx([*map(float, whole)], rel=FP32)
    else:
        assert rest == whole


def test_another_fold_is_another_run(back: tuple[Path, dict[str, dict[str, Finished]]]) -> None:
    """Nothing above holds by itself: the folded weights and what Adam keeps of them are others."""
    folder, said = back
    assert "the optimizer's state goes along" in said["llama"]["fold"].stdout
    assert said["llama"]["fold"].stdout.startswith("llama/folded: multipliers folded into ")
    assert said["llama"]["unfold"].stdout.startswith("llama/unfolded: multipliers taken out of ")
    kept = [_tensors(folder / "llama" / each / "iter_0000002") for each in ("ck", "folded", "unfolded")]
    key = "decoder.layers.mlp.linear_fc2.weight"
    assert torch.equal(kept[1][key], 0.5 * kept[0][key])
    assert torch.equal(kept[1][f"optimizer.state.exp_avg.{key}"], 2 * kept[0][f"optimizer.state.exp_avg.{key}"])
    assert torch.equal(kept[1][f"optimizer.state.exp_avg_sq.{key}"], 4 * kept[0][f"optimizer.state.exp_avg_sq.{key}"])
    assert kept[0].keys() == kept[2].keys()
    assert [key for key, each in kept[0].items() if not torch.equal(each, kept[2][key])] == []
    assert any(key.startswith("optimizer.state.fp32_param.") for key in _tensors(folder / "bf16/ck/iter_0000002"))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from mup_megatron.megatron import stored

    metadata = FileSystemReader(folder).read_metadata()
    return {
        key: stored.read_tensor(folder, metadata, key, remedy="")
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


@pytest.mark.parametrize("what", ["folded", "again", "export"])
def test_a_folded_checkpoint_is_neither_trained_on_nor_folded_again_nor_exported(
    back: tuple[Path, dict[str, dict[str, Finished]]], what: str
) -> None:
    _, said = back
    found = said["llama"][what]
    assert found.code == 2, found
    assert "llama/folded/iter_0000002: its multipliers are folded into its weights" in found.stderr
    assert "`mup-megatron unfold " in found.stderr
    assert len(found.stderr) < 320


def test_what_is_not_folded_is_not_unfolded(back: tuple[Path, dict[str, dict[str, Finished]]]) -> None:
    found = back[1]["llama"]["not folded"]
    assert (found.code, found.stderr) == (2, "mup-megatron: llama/ck: is not folded. Go on with it as it is.\n")


def test_state_that_is_cut_along_ranks_is_left_out_and_not_given_back(
    back: tuple[Path, dict[str, dict[str, Finished]]],
) -> None:
    folder, said = back
    found = said["distributed"]
    assert "without the optimizer's state, which is not there by parameter" in found["fold"].stdout
    assert found["unfold"].code == 2
    assert "its optimizer's state was left out when it was folded" in found["unfold"].stderr
    assert any(key.startswith("optimizer.") for key in _tensors(folder / "distributed/ck/iter_0000002"))
    assert not any(key.startswith("optimizer.") for key in _tensors(folder / "distributed/folded/iter_0000002"))


def test_nothing_is_left_of_what_could_not_be_done(back: tuple[Path, dict[str, dict[str, Finished]]]) -> None:
    folder, _ = back
    assert [path for path in folder.rglob(".*") if path.name != ".metadata"] == []
    for name in RUNS:
        assert not (folder / name / "twice").exists()
        assert not (folder / name / "no" / "iter_0000002").exists()


# ---- files that are damaged ------------------------------------------------------------------------------------------


def _damaged(folder: Path, to: Path) -> dict[str, Finished]:
    def told(name: str, text: str) -> Finished:
        copy = to / name
        shutil.copytree(folder / "llama" / "folded", copy)
        (copy / "iter_0000002" / "mup" / "folded.json").write_text(text)
        agree_with_files(copy / "iter_0000002")
        recipe = str(folder / "llama" / "r.yaml")
        return command_line("unfold", str(copy), "--recipe", recipe, "--to", str(to / f"{name} out"))

    def code_beside(copy: Path) -> None:
        torch.save(RunsCode(), copy / "common.pt")

    def a_damaged_part(copy: Path) -> None:
        """Of a tensor that is not changed."""
        from torch.distributed.checkpoint import FileSystemReader

        stored = FileSystemReader(copy).read_metadata().storage_data
        place = next(each for key, each in stored.items() if key.fqn == "decoder.final_layernorm.weight")
        with (copy / place.relative_path).open("r+b") as stream:
            stream.seek(place.offset)
            stream.write(bytes(place.length))

    def folded_with(name: str, change: Callable[[Path], None]) -> Finished:
        copy = to / name
        shutil.copytree(folder / "llama" / "ck", copy)
        change(copy / "iter_0000002")
        agree_with_files(copy / "iter_0000002")
        recipe = str(folder / "llama" / "r.yaml")
        return command_line("fold", str(copy), "--recipe", recipe, "--to", str(to / f"{name} out"))

    right = (folder / "llama" / "folded" / "iter_0000002" / "mup" / "folded.json").read_text()
    content = json.loads(right)
    return {
        "empty": told("empty", ""),
        "of another recipe": told("other", json.dumps({**content, "fingerprint": "0" * 64})),
        "of another model": told(
            "model", json.dumps({**content, "folded": [{"tensor": "decoder.layers.9.x", "factor": 2.0}]})
        ),
        "of another width": told(
            "width",
            json.dumps({**content, "folded": [{**each, "factor": 2 * each["factor"]} for each in content["folded"]]}),
        ),
        "code beside": folded_with("code", code_beside),
        "a part": folded_with("part", a_damaged_part),
        "of nothing": told("factor", json.dumps({**content, "folded": [{**content["folded"][0], "factor": 0.0}]})),
    }


@pytest.fixture(scope="module")
def damaged(
    back: tuple[Path, dict[str, dict[str, Finished]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Finished]:
    found: dict[str, Finished] = run_ranks(_damaged, 1, back[0], tmp_path_factory.mktemp("damaged"))[0]
    return found


@pytest.mark.parametrize(
    ("what", "said"), [("code beside", "common.pt: holds"), ("a part", "final_layernorm.weight: d")]
)
def test_what_is_not_changed_is_looked_at_before_it_is_copied(
    damaged: dict[str, Finished], what: str, said: str
) -> None:
    assert damaged[what].code == 2, damaged[what]
    assert said in damaged[what].stderr


@pytest.mark.parametrize("what", ["empty", "of another recipe", "of another model", "of another width", "of nothing"])
def test_what_says_the_folds_is_checked(damaged: dict[str, Finished], what: str) -> None:
    assert damaged[what].code == 2, damaged[what]
    assert "mup/folded.json" in damaged[what].stderr


def _without_room(folder: Path, to: Path) -> Finished:
    """What `fold` says, in this rank, where no file can be as large as it has to be."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    own = folder / "llama"
    return command_line("fold", str(own / "ck"), "--recipe", str(own / "r.yaml"), "--to", str(to / "out"))


def test_a_full_disk_leaves_no_folder_and_the_checkpoint_as_it_was(
    back: tuple[Path, dict[str, dict[str, Finished]]], tmp_path: Path
) -> None:
    folder, _ = back
    kept = {path: path.stat().st_mtime_ns for path in (folder / "llama" / "ck").rglob("*")}
    said = run_ranks(_without_room, 1, folder, tmp_path)[0]
    assert said.code == 2, said
    assert f"--to {tmp_path / 'out'}: cannot be written (File too large)" in said.stderr
    assert [*tmp_path.iterdir()] == []
    assert {path: path.stat().st_mtime_ns for path in (folder / "llama" / "ck").rglob("*")} == kept
