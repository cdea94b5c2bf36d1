"""What `mup-megatron train` saves, exported: against the live Megatron model, in every layout, and damaged."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_mutators import RunsCode, agree_with_files
from support.exported import KINDS, loaded, models, recipe_of, tokens
from support.processes import run_ranks
from support.saved_models import LIVE, save_again, save_live
from support.shapes import recipe_for
from support.training_runs import Finished, assert_refused, base, command_line, make_text, target

from mup_megatron.recipe import save_recipe
from mup_megatron.yaml_io import dump_yaml

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
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "expert_model_parallel_size": 2,
                "expert_tensor_parallel_size": 1,
            },
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


# ---- the command -----------------------------------------------------------------------------------------------------


def _refused(folder: Path, to: Path) -> dict[str, Finished]:
    """What the command says, in this rank, of checkpoints that it does not export, and of one folder of a run."""
    os.chdir(to)
    run, recipe = folder / "0", str(folder / "0.yaml")

    def told(path: Path, *more: str, recipe: str = recipe) -> Finished:
        return command_line("export", str(path), "--recipe", recipe, "--to", "out", *more)

    def damaged(name: str, change: Callable[[Path], object], *, agree: bool) -> Finished:
        copy = to / name
        shutil.copytree(run, copy)
        change(copy / "iter_0000001")
        if agree:
            agree_with_files(copy / "iter_0000001")
        return told(copy)

    def code(inside: Path) -> None:
        (inside / ".metadata").write_bytes(pickle.dumps(RunsCode()))

    def code_as_weight(inside: Path) -> None:
        """In the place of the first weight, in a file that keeps its length."""
        metadata = pickle.loads((inside / ".metadata").read_bytes())
        key = next(key for key in metadata.storage_data if key.fqn == "decoder.final_layernorm.weight")
        info = metadata.storage_data[key]
        stream = io.BytesIO()
        torch.save(RunsCode(), stream)
        data = (inside / info.relative_path).read_bytes()
        info.offset, info.length = len(data), len(stream.getvalue())
        (inside / info.relative_path).write_bytes(data + stream.getvalue())
        (inside / ".metadata").write_bytes(pickle.dumps(metadata))

    def another_model(inside: Path) -> None:
        content = json.loads((inside / "mup" / "run.json").read_text())
        content["model"]["ffn_hidden_size"] = 128
        (inside / "mup" / "run.json").write_text(json.dumps(content))

    def cut(inside: Path) -> None:
        part = next(inside.glob("*.distcp"))
        part.write_bytes(part.read_bytes()[:-1])

    return {
        "another recipe": told(run, recipe=str(folder / "1.yaml")),
        "no folder": told(to / "none"),
        "no checkpoint": told(to),
        "an architecture": told(run, "--architecture", "llama"),
        "a size": told(run, "--max-shard-size", "5"),
        "a tokenizer": told(run, "--tokenizer", str(to)),
        "a part that is cut": damaged("cut", cut, agree=False),
        "a run without a model": damaged(
            "runless", lambda inside: (inside / "mup" / "run.json").write_text("{}"), agree=True
        ),
        "a run of another model": damaged("other", another_model, agree=True),
        "code as metadata": damaged("code", code, agree=True),
        "code as a weight": damaged("weight", code_as_weight, agree=True),
        "nothing": told(run / "iter_0000001", "--dtype", "bfloat16", "--max-shard-size", "100KB"),
    }


@pytest.fixture(scope="module")
def refused(
    saved: tuple[Path, dict[str, torch.Tensor], dict[str, Finished]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Finished]]:
    to = tmp_path_factory.mktemp("refused")
    return to, run_ranks(_refused, 1, saved[0], to)[0]


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "another recipe": ["1.yaml: its fingerprint is", "trained with another recipe", "recipe.yaml"],
        "no folder": ["none: no such folder"],
        "no checkpoint": ["latest_checkpointed_iteration.txt is missing"],
        "an architecture": ["--architecture llama: it has no normalization LayerNorm", "Export to gpt2"],
        "a size": ["'5' is no size"],
        "a tokenizer": ["--tokenizer", "no tokenizer.json"],
        "a part that is cut": [".distcp: truncated or corrupt"],
        "a run without a model": ["run.json", "fingerprint"],
        "a run of another model": ["plan.json: not the plan"],
        "code as metadata": [".metadata: holds", "mkdir"],
        "code as a weight": [".distcp", "mkdir"],
    }.items(),
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    refused: tuple[Path, dict[str, Finished]], what: str, words: list[str]
) -> None:
    folder, said = refused
    assert_refused(said[what], words, folder)
    assert [path for path in folder.iterdir() if path.name.startswith(".out")] == []


def test_one_checkpoint_of_a_run_can_be_named_and_the_answer_says_what_was_done(
    refused: tuple[Path, dict[str, Finished]],
) -> None:
    folder, said = refused
    answer = said["nothing"]
    assert answer.code == 0, answer
    assert answer.stdout.startswith("out: gpt2, ")
    assert "multipliers folded into" in answer.stdout
    assert len(list((folder / "out").glob("model-*.safetensors"))) > 1


def test_the_answer_names_what_the_configuration_says(
    saved: tuple[Path, dict[str, torch.Tensor], dict[str, Finished]],
) -> None:
    said = saved[2]["granite"].stdout
    assert "granite, " in said
    assert "embedding_multiplier 3, attention_multiplier 0.565685, logits_scaling 2.35294" in said


def _from_data_to_generate(folder: Path) -> list[Finished]:
    """A run of the commands themselves, in this rank."""
    os.chdir(folder)
    make_text(folder)
    Path("m.yaml").write_text(dump_yaml(target(position_embedding_type="learned_absolute").model_dump(mode="json")))
    save_recipe(recipe_for(base(), lr=0.01), Path("r.yaml"))
    recipe = ["--recipe", "r.yaml"]
    return [
        command_line(
            "train", "m.yaml", *recipe, "--data", "text", "--save", "ck", "--output", "out",
            "--data-cache-path", "cache",
            "--train-iters", "3", "--global-batch-size", "4", "--eval-iters", "0",
        ),
        command_line("export", "ck", *recipe, "--to", "hf", "--tokenizer", "text.tokenizer.json"),
        command_line("check", "--exported", "hf", "--against", "ck", *recipe),
    ]  # fmt: skip


def test_what_the_commands_make_of_text_speaks(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained, exported, checked = run_ranks(_from_data_to_generate, 1, tmp_path)[0]
    assert (trained.code, exported.code, checked.code) == (0, 0, 0), (trained, exported, checked)
    assert exported.stdout.startswith("hf: gpt2, 85,248 parameters, ")
    model, tokenizer = loaded(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    given = tokenizer("12 squared", return_tensors="pt")
    said = model.generate(**given, min_new_tokens=2, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(said[0]).startswith("12 squared")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id is not None
