"""The quickstart on real training: killed and started again it gives what it would have given undisturbed, and a folder
holds one experiment only.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from support.commands import contents

from mup_megatron.architectures.registry import load_model_file
from mup_megatron.errors import InputError
from mup_megatron.quickstart.experiment import Cell, Experiment, ExperimentSettings, GridFile, Result, claim, run
from mup_megatron.recipe import load_recipe
from mup_megatron.training.data.reading import read_meta

ROOT = Path(__file__).parents[2]
SETTINGS = ExperimentSettings(
    seed=3,
    width=32,
    widening=2,
    trials=2,
    learning_rates=(2.0**-9, 2.0**-8),
    num_layers=1,
    head_size=32,
    vocab_size=257,
    seq_length=16,
    train_iters=3,
    global_batch_size=2,
    eval_iters=1,
)
DRIVER = """
import json, os, sys
os.environ["OMP_NUM_THREADS"] = "1"
from pathlib import Path
from mup_megatron.cli.quickstart import conduct
from mup_megatron.quickstart.experiment import ExperimentSettings
from mup_megatron.training.data.documents import documents, scan
from mup_megatron.training.data.writing import write_data
from mup_megatron.training.data.tokenizer import make_tokenizer, parse_tokenizer
from mup_megatron.training.ranks import preload

settings, here, *folders = sys.argv[1:]
preload()
here = Path(here)
for name in ("text", "other"):
    sources = scan([here / f"{name}.txt"])
    byte = make_tokenizer(parse_tokenizer("byte"), lambda: ())
    write_data(here / name, documents(sources), byte, sources=sources, spec="byte", force=True)
for folder in folders:
    content = json.loads(settings)
    content["learning_rates"] = tuple(content["learning_rates"])
    conduct(ExperimentSettings(**content), here / "text", Path(folder), cache=here / "cache", workers=1)
"""
ANSWER = ("quickstart.png", "summary.json", "grid.csv", "quickstart.recipe.yaml")


def started(here: Path, *folders: Path) -> subprocess.Popen[str]:
    """A process that makes the data and runs the experiment in each folder; its standard output is a file in `here`."""
    words = [json.dumps(asdict(SETTINGS)), str(here), *map(str, folders)]
    with (here / "stdout").open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *words],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )


def again(settings: ExperimentSettings, data: Path, folder: Path, ticks: list[str] | None = None) -> Experiment:
    """The experiment in this process, which has no Megatron: good for what is finished or refused."""
    told = [] if ticks is None else ticks
    return run(
        settings,
        data,
        folder,
        cache=folder.parent / "cache",
        workers=1,
        say=lambda text: None,
        tick=lambda done, total, text: told.append(text),
    )


def losses(folder: Path) -> dict[tuple[str, str, str], float]:
    with (folder / "grid.csv").open() as stream:
        return {(row["width"], row["rule"], row["lr"]): float(row["loss"]) for row in csv.DictReader(stream)}


def test_killed_in_the_grid_and_started_again_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    data, other = tmp_path / "text", tmp_path / "other"
    for text, words in ((data, "squared is"), (other, "times itself is")):
        text.with_suffix(".txt").write_text(" ".join(f"{n} {words} {n * n}," for n in range(400)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    # One process runs the experiment undisturbed, begins it in another folder, and is killed once a cell is done there.
    with started(tmp_path, whole, killed) as process:
        assert process.stderr is not None
        first_cells = 0
        said = []
        for line in process.stderr:
            said.append(line)
            first_cells += line.startswith("[1/2] width 32, mup, lr ")
            if first_cells == 2:
                break
        process.kill()
        process.stderr.read()  # ends when everything that the process started is gone too
    assert process.returncode == -9, "".join(said)
    done = {(row["width"], row["rule"], row["lr"]) for row in json.loads((killed / "grid.json").read_text())["runs"]}
    assert done

    # The answer, and nothing else, is on standard output.
    out = (tmp_path / "stdout").read_text().splitlines()
    assert out[0].split() == "width lr validation loss best of grid at about optimum moved".split()
    assert [line.split("  ")[0] for line in out[1:4]] == [
        "proxy, tuned",
        "μP, transferred",
        "standard, same hyperparameters",
    ]
    summary = json.loads((whole / "summary.json").read_text())
    assert out[4:] == ["", summary["caption"], "", "   ".join(str(whole / name) for name in ANSWER)]
    assert (whole / "quickstart.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    recipe = load_recipe(whole / "quickstart.recipe.yaml")
    assert (recipe.fingerprint, recipe.hyperparameters.lr) == (summary["fingerprint"], summary["lr"])
    assert recipe.base == load_model_file(whole / "proxy.yaml") == SETTINGS.model(32)
    assert load_model_file(whole / "target.yaml") == SETTINGS.model(64)
    losses_whole = losses(whole)
    assert len(set(losses_whole.values())) == len(losses_whole) == 6, "each of the six runs is another one"
    provenance = recipe.provenance
    assert provenance["lr_grid"] == {"lr": summary["lr"], "loss": summary["proxy"]["best"]}
    study = optuna.load_study(study_name="quickstart", storage=f"sqlite:///{whole / 'study.db'}")
    assert (provenance["search"]["loss"], provenance["search"]["lr"]) == (study.best_value, study.best_params["lr"])

    # Started again, it runs what was missing and nothing else.
    with started(tmp_path, killed) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    ran = [line for line in err.splitlines() if "] width " in line]
    assert len(ran) == 6 - len(done)
    for width, rule, lr in done:
        assert not [line for line in ran if f"width {width}, {rule}, lr {lr:.3g}:" in line]
    assert len(optuna.load_study(study_name="quickstart", storage=f"sqlite:///{killed / 'study.db'}").trials) == 2
    assert losses(killed) == losses_whole
    for name in ANSWER[:3]:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert load_recipe(killed / ANSWER[3]) == recipe

    # Once more: nothing is left to do.
    ticks: list[str] = []
    found = again(SETTINGS, data, killed, ticks)
    assert ticks == []
    assert [result.row() for result in found.results] == summary["grid"]

    # Another experiment does not go there.
    before = contents(killed)
    for settings, prefix, told in (
        (replace(SETTINGS, seed=4), data, "settings.json: holds another experiment: seed was 3 and is 4. Give another"),
        (replace(SETTINGS, train_iters=4), data, "train_iters was 3 and is 4"),
        (SETTINGS, other, f"data_sha256 was {read_meta(data).bin_sha256!r} and is {read_meta(other).bin_sha256!r}"),
    ):
        with pytest.raises(InputError) as refused:
            again(settings, prefix, killed)
        assert told in str(refused.value)
        assert contents(killed) == before

    # Nor does a grid go with another search than its own.
    shutil.copy(killed / "grid.json", tmp_path)
    content = json.loads((killed / "grid.json").read_text())
    content["belongs_to"]["recipe"] = recipe.fingerprint[::-1]
    (killed / "grid.json").write_text(json.dumps(content))
    before = contents(killed)
    with pytest.raises(InputError, match=r"grid\.json: its runs belong to another experiment or another search"):
        again(SETTINGS, data, killed)
    assert contents(killed) == before
    shutil.copy(tmp_path / "grid.json", killed)
    assert again(SETTINGS, data, killed).results == found.results


OWNER: dict[str, Any] = {"experiment": {"seed": 1}, "recipe": "0f"}
RESULTS = (
    Result(cell=Cell(width=32, rule="mup", lr=0.1), loss=4.25, reason=None),
    Result(cell=Cell(width=64, rule="standard", lr=0.1), loss=None, reason="too hot"),
)


def test_a_grid_is_read_as_it_was_written(tmp_path: Path) -> None:
    stored = GridFile(tmp_path / "grid.json", OWNER)
    assert stored.read() == {}
    stored.write(RESULTS)
    assert stored.read() == {result.cell: result for result in RESULTS}


@pytest.mark.parametrize("owner", [{**OWNER, "recipe": "1f"}, {**OWNER, "experiment": {"seed": 2}}])
def test_a_grid_of_something_else_is_refused_and_kept(tmp_path: Path, owner: dict[str, Any]) -> None:
    file = tmp_path / "grid.json"
    GridFile(file, OWNER).write(RESULTS)
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"grid\.json: its runs belong to another .* Move it away"):
        GridFile(file, owner).read()
    assert file.read_bytes() == before


def test_a_folder_belongs_to_the_experiment_that_claimed_it(tmp_path: Path) -> None:
    claim(tmp_path / "out", {"seed": 1, "trials": 2})
    claim(tmp_path / "out", {"seed": 1, "trials": 2})
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"another experiment: seed was 1 and is 2; width was None and is 64\. Give"):
        claim(tmp_path / "out", {"seed": 2, "trials": 2, "width": 64})
    assert contents(tmp_path) == before


ROW = '{"width": [1], "rule": "mup", "lr": 0.1, "loss": 1.0, "reason": null}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1",
        "[]",
        "3",
        '"grid"',
        "null",
        '{"runs": 1, "belongs_to": {}}',
        "\xff",
        "[" * 100_000,
        f'{{"belongs_to": {{}}, "runs": [{ROW}]}}',
        '{"belongs_to": {}, "runs": [null]}',
    ],
)
def test_a_file_that_the_quickstart_did_not_write_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    for name in ("settings.json", "grid.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"settings\.json: .* Give another --output, or move"):
        claim(tmp_path, {"seed": 1})
    with pytest.raises(InputError, match=r"grid\.json: .*ove .* away"):
        GridFile(tmp_path / "grid.json", {}).read()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["study.db", "grid.json"])
def test_results_that_belong_to_nothing_are_refused_and_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"{name}: there is no settings\.json that says what it belongs to"):
        claim(tmp_path, {"seed": 1})
    assert contents(tmp_path) == before
