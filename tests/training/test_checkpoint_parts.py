"""A checkpoint whose parts are not what was written, while its manifest agrees: it is refused, and no code runs."""

import io
import json
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_mutators import CANARY, RunsCode, agree_with_files
from support.processes import run_ranks
from support.shapes import recipe_for
from support.training_runs import Finished, base, command_line, make_text

from mup_megatron.recipe import save_recipe
from mup_megatron.yaml_io import dump_yaml

TRACKER = "latest_checkpointed_iteration.txt"
NAME = "iter_0000002"
DATA = "__0_0.distcp"
PARTS = ("metadata.json", "mup/recipe.yaml", "mup/run.json", "mup/plan.json", "mup/metrics.csv", "mup/validation.csv",
         ".metadata", DATA)  # fmt: skip

Damage = Callable[[Path], object]
"""Changes a checkpoint's folder."""


def words(folder: Path) -> list[str]:
    files = [str(folder / "m.yaml"), "--recipe", str(folder / "r.yaml"), "--data", str(folder / "text")]
    places = ["--output", str(folder / "out"), "--data-cache-path", str(folder / "cache")]
    own = ["--save", str(folder / "ck"), "--load", str(folder / "ck"), "--save-interval", "2"]
    return ["train", *files, *places, *own, "--train-iters", "4", "--global-batch-size", "4", "--eval-iters", "1"]


def _begun(folder: Path) -> None:
    """A run of four iterations that stopped after its second, in this rank."""
    make_text(folder)
    (folder / "m.yaml").write_text(dump_yaml(base().model_dump(mode="json")))
    save_recipe(recipe_for(base(), lr=0.01), folder / "r.yaml")
    finished = command_line(*words(folder))
    assert finished.code == 0, finished
    shutil.rmtree(folder / "ck" / "iter_0000004")
    (folder / "ck" / TRACKER).write_text("2")
    (folder / "out" / "result.json").unlink()


def _part(name: str, content: bytes | None) -> Damage:
    def damage(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return damage


def _json(name: str, change: Callable[[Any], Any]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return damage


def _metadata(change: Callable[[Any], Any]) -> Damage:
    """Changes the object that `.metadata` holds, or replaces it by what `change` returns."""

    def damage(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        replaced = change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata if replaced is None else replaced))

    return damage


def _object(name: str, change: Callable[[Any], Any]) -> Damage:
    """Changes an object in a checkpoint's data."""

    def damage(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        place = next(info for key, info in metadata.storage_data.items() if key.fqn.startswith(name))
        data = (folder / place.relative_path).read_bytes()
        held = torch.load(io.BytesIO(data[place.offset : place.offset + place.length]), weights_only=False)
        stream = io.BytesIO()
        torch.save(change(held), stream)
        place.offset, place.length = len(data), len(stream.getvalue())
        (folder / place.relative_path).write_bytes(data + stream.getvalue())
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def _put(container: Any, key: Any, value: Any) -> None:
    container[key] = value


def _first(table: dict[Any, Any], kind: str) -> Any:
    return next(value for value in table.values() if type(value).__name__ == kind)


def _objects_pickle(folder: Path) -> None:
    with (folder / "common.pt").open("wb") as stream:
        torch.save({"iteration": RunsCode()}, stream)


DAMAGES: dict[str, tuple[Damage, str, str]] = {
    **{f"{name} deleted": (_part(name, None), name, "") for name in PARTS},
    **{f"{name} empty": (_part(name, b""), name, "") for name in PARTS},
    **{f"{name} not UTF-8": (_part(name, b"\xff\xfe\x80"), name, "") for name in PARTS},
    # ---- what would run code: the class is named, and the file
    "code as metadata": (_metadata(lambda _: RunsCode()), ".metadata", "mkdir"),
    "code as a plan": (_metadata(lambda m: setattr(m, "planner_data", RunsCode())), ".metadata", "mkdir"),
    "code as an entry": (_metadata(lambda m: _put(m.state_dict_metadata, "x", RunsCode())), ".metadata", "mkdir"),
    "code as a place": (
        _metadata(lambda m: _put(m.storage_data, next(iter(m.storage_data)), RunsCode())),
        ".metadata",
        "mkdir",
    ),
    "code as random numbers": (_object("rng_state", lambda _: [RunsCode()]), ".distcp", "mkdir"),
    "code as a tensor": (
        _object("optimizer", lambda held: [held, OrderedDict(a=RunsCode())]),
        ".distcp",  # whichever of the two that data is spread over
        "mkdir",
    ),
    "code in a file that Megatron looks for": (_objects_pickle, "common.pt", ""),
    "a class that is not torch's": (_metadata(lambda _: np.random.RandomState(1)), ".metadata", "numpy"),
    # ---- what contradicts itself
    "another object as metadata": (_metadata(lambda _: {"a": 1}), ".metadata", "a dict in place of"),
    "no tables": (_metadata(lambda m: setattr(m, "state_dict_metadata", None)), ".metadata", "tables are missing"),
    "a tensor in no file": (
        _metadata(lambda m: m.storage_data.pop(next(iter(m.storage_data))) and None),
        ".metadata",
        "is in no file",
    ),
    "a tensor that nothing tells of": (
        _metadata(lambda m: m.state_dict_metadata.pop("decoder.final_layernorm.weight") and None),
        "",
        "decoder.final_layernorm.weight",
    ),
    "an object that nothing tells of": (
        _metadata(lambda m: m.state_dict_metadata.pop(next(k for k in m.state_dict_metadata if "rng" in k)) and None),
        "",
        "damaged",
    ),
    "a tensor outside": (
        _metadata(lambda m: setattr(_first(m.storage_data, "_StorageInfo"), "relative_path", "../../r.yaml")),
        ".metadata",
        "no file of the checkpoint",
    ),
    "a tensor beyond the end": (
        _metadata(lambda m: setattr(_first(m.storage_data, "_StorageInfo"), "length", 10**12)),
        ".metadata",
        "beyond the end",
    ),
    "a tensor of another shape": (
        _metadata(
            lambda m: setattr(_first(m.state_dict_metadata, "TensorStorageMetadata"), "size", torch.Size((3, 5, 7)))
        ),
        ".metadata",
        "damaged",
    ),
    "random numbers that are none": (_object("rng_state", lambda _: [[{"python": 1}]]), "", NAME),
    "another backend": (_part("metadata.json", b'{"sharded_backend": "zarr"}'), "metadata.json", "sharded_backend"),
    "a list as format": (_part("metadata.json", b"[]"), "metadata.json", "found list"),
    "a list as the run": (_part("mup/run.json", b"[1]"), "mup/run.json", "does not describe a run"),
    "a key too many": (
        _json("mup/run.json", lambda run: {**run, "model": {**run["model"], "more": None}}),
        "",
        "model.more",
    ),
    "a run nested deep": (_part("mup/run.json", b"[" * 100_000), "mup/run.json", "nested too deep"),
    "another recipe": (
        lambda folder: (folder / "mup/recipe.yaml").write_text(recipe_for(base(), lr=0.02).to_yaml()),
        "mup/recipe.yaml",
        "of another recipe",
    ),
    "another plan": (
        _json("mup/plan.json", lambda plan: {**plan, "model": {**plan["model"], "softmax_scale": 1.0}}),
        "mup/plan.json",
        "not the plan",
    ),
    "a plan that lacks a parameter": (
        _json("mup/plan.json", lambda plan: {**plan, "parameters": plan["parameters"][1:]}),
        "mup/plan.json",
        "not the plan",
    ),
    "fewer rows": (
        _part("mup/metrics.csv", b"iteration,loss,lr,grad_norm\n1,5.0,0.1,1.0\n"),
        "mup/metrics.csv",
        "1 rows",
    ),
    "a row of NUL": (_part("mup/metrics.csv", b"iteration,loss,lr,grad_norm\n\0,5.0,0.1,1.0\n"), "mup/metrics.csv", ""),
    "rows of no numbers": (
        _part("mup/metrics.csv", b"iteration,loss,lr,grad_norm\n1,nan,0.1,1.0\n2,5,0.1,1.0\n"),
        "mup/metrics.csv",
        "not a finite number",
    ),
}
"""Name → the damage, the file that must be named, and what else must be said."""


def _each(folder: Path, work: Path) -> dict[str, tuple[Finished, bool, bool]]:
    """For each damage, in this rank: the answer, whether code ran, and whether the checkpoint is as it was before."""
    import os

    answers = {}
    for number, (name, (damage, _, _)) in enumerate(DAMAGES.items()):
        place = work / str(number)
        shutil.copytree(folder, place)
        damage(place / "ck" / NAME)
        agree_with_files(place / "ck" / NAME)
        if name == "code in a file that Megatron looks for":
            manifest = place / "ck" / NAME / "mup/files.json"
            files = json.loads(manifest.read_text())
            manifest.write_text(json.dumps({key: value for key, value in files.items() if key != "common.pt"}))
        before = {path: path.read_bytes() for path in (place / "ck").rglob("*") if path.is_file()}
        os.chdir(place)
        finished = command_line(*words(place))
        unchanged = before == {path: path.read_bytes() for path in (place / "ck").rglob("*") if path.is_file()}
        answers[name] = (finished, (place / CANARY).exists(), unchanged)
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Finished, bool, bool]]:
    folder = tmp_path_factory.mktemp("begun")
    run_ranks(_begun, 1, folder)
    found: dict[str, tuple[Finished, bool, bool]] = run_ranks(_each, 1, folder, tmp_path_factory.mktemp("damaged"))[0]
    return found


@pytest.mark.parametrize("name", DAMAGES)
def test_a_part_that_is_not_what_was_written(answers: dict[str, tuple[Finished, bool, bool]], name: str) -> None:
    finished, ran, unchanged = answers[name]
    _, file, said = DAMAGES[name]
    assert not ran
    assert unchanged
    assert (finished.code, finished.stdout) == (2, "")
    assert finished.stderr.count("mup-megatron: ") == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    last = finished.stderr[finished.stderr.index("mup-megatron: ") :]
    assert file in last
    assert said in last
    assert len(last) < 600, "one sentence, of which the path of this test's folder is a part"


def test_such_a_checkpoint_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With readers that take whatever a pickle asks for; else the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(RunsCode()))
    assert (tmp_path / CANARY).is_dir()
