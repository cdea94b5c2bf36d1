"""The examples for Hugging Face models and DeepSpeed, and launch/deepspeed.sh, in their smallest form."""

import csv
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import command as in_process
from support.processes import HANGS_AFTER_S

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = {"deepspeed_gpt2": ("gpt2", "n_embd"), "trainer_llama": ("llama", "hidden_size")}
each_folder = pytest.mark.parametrize("folder", FOLDERS)


def run(*words: str | Path, **environment: str) -> str:
    """What a command says, on the CPU and in the root of the repository. It has to end well."""
    with started(*words, **environment) as process:
        return ended(process)


def started(*words: str | Path, **environment: str) -> "subprocess.Popen[str]":
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, "PATH": path, **own}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> str:
    try:
        said, _ = process.communicate(timeout=HANGS_AFTER_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # launchers then end their own processes
        raise
    assert process.returncode == 0, said
    return said


def read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


# ---- two widths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "small", "wide", "tried"),
    [("bert", 64, 256, (5, 4)), pytest.param("resnet", 16, 64, (7, 6), marks=pytest.mark.slow)],
)
def test_two_widths_make_a_table_and_a_picture(
    name: str, small: int, wide: int, tried: tuple[int, int], tmp_path: Path
) -> None:
    said = run(sys.executable, EXAMPLES / f"{name}_two_widths.py", "--steps", "2", "--output", tmp_path)
    with (tmp_path / f"{name}_two_widths.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["learning rate", f"width {small}", f"width {wide} μP", f"width {wide} standard"]
    at_small = [row for row in rows if row[1]]
    at_wide = [row for row in rows if row[2] and row[3]]
    assert (len(at_small), len(at_wide)) == tried
    (tuned,) = [row for row in rows if "tuned" in row[0]]
    assert tuned in at_wide
    assert float(tuned[1]) == min(float(row[1]) for row in at_small)
    assert any(row[2] != row[3] for row in at_wide)  # μP does something there
    assert all(cell in said for row in rows for cell in row)
    assert f"that was best at width {small}" in said
    assert (tmp_path / f"{name}_two_widths.png").read_bytes().startswith(b"\x89PNG")


def test_a_diverged_run_is_said_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import two_widths

    experiment = two_widths.Experiment(
        name="x", title="x", small=1, wide=4, learning_rates=[0.25, 0.5, 1.0], factors=[1.0], steps=1, run=max
    )
    outcome = two_widths.Outcome({0.25: 3.0, 0.5: 2.0, 1.0: math.nan}, {0.5: 1.5}, {0.5: math.nan})
    assert outcome.tuned == 0.5
    assert two_widths.rows(experiment, outcome)[1:] == [
        ["0.25", "3.000", "", ""],
        ["0.5 (tuned)", "2.000", "1.500", "diverged"],
        ["1", "diverged", "", ""],
    ]
    assert two_widths.sentence(experiment, outcome).endswith("the standard parametrization diverges.")
    two_widths.picture(experiment, outcome, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------


@each_folder
def test_the_configuration_has_the_entry_and_nothing_else_more(folder: str) -> None:
    name, _ = FOLDERS[folder]
    stock, with_entry = read(EXAMPLES / folder / "ds.json"), read(EXAMPLES / folder / "ds_mup.json")
    assert with_entry.pop("mup") == {"recipe": f"examples/{folder}/{name}.recipe.yaml"}
    assert with_entry == stock


@each_folder
def test_the_models_differ_in_width_alone(folder: str) -> None:
    name, width = FOLDERS[folder]
    base, target = (read(EXAMPLES / folder / f"{name}_{size}.json") for size in (64, 256))
    assert (base[width], target[width]) == (64, 256)
    for key in base:
        assert target[key] in (base[key], 4 * base[key])


def test_the_configuration_is_what_ds_config_writes_and_torch_adam(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    answer = in_process(capfd)(*words_of("ds-config"))
    assert answer.code == 0
    written = json.loads(answer.out)
    written["optimizer"]["params"]["torch_adam"] = True
    assert written == read(EXAMPLES / "deepspeed_gpt2" / "ds_mup.json")


@each_folder
def test_the_recipe_is_what_the_readme_s_command_writes(
    folder: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    answer = in_process(capfd)(*words_of("recipe", folder))
    assert answer.code == 0
    assert answer.out == (EXAMPLES / folder / f"{FOLDERS[folder][0]}.recipe.yaml").read_text(encoding="utf-8")


def words_of(name: str, within: str = "") -> list[str]:
    """The words of a command in the examples' README, without where it writes to."""
    text = re.sub(r"\\\n\s*", " ", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    (found,) = [line for line in text.splitlines() if line.startswith(f"mup-megatron {name} ") and within in line]
    return shlex.split(found)[1:-2]


# The other's script differs in who calls DeepSpeed; its launcher is in test_ds_launch.
@pytest.mark.parametrize("folder", [pytest.param("deepspeed_gpt2", marks=pytest.mark.slow), "trainer_llama"])
def test_the_script_trains_with_the_entry_and_without(folder: str, tmp_path: Path) -> None:
    said = run(EXAMPLES / folder / "run.sh", "--steps", "3", PROCESSES="1", WIDTHS="64", OUTPUT=str(tmp_path))
    loss = losses(said)
    assert loss.keys() == {("ds", 64), ("ds_mup", 64)}
    assert "goes with the recipe. 3 parameter groups" in said
    assert "fingerprint" not in (tmp_path / "ds_64.log").read_text(encoding="utf-8")
    assert "fingerprint" in (tmp_path / "ds_mup_64.log").read_text(encoding="utf-8")
    # The width is the recipe's own: only what the JSON can't say, GPT-2's multipliers, makes a difference.
    assert (loss["ds", 64] == loss["ds_mup", 64]) == (folder == "trainer_llama")


def losses(said: str) -> dict[tuple[str, int], float]:
    """(Configuration, width) → loss, of what run.sh prints."""
    found = re.findall(r"^(ds\w*)\.json +width (\d+): mean loss .* (\S+)$", said, re.MULTILINE)
    return {(config, int(width)): float(loss) for config, width, loss in found}


@pytest.mark.slow
@each_folder
def test_the_wider_model_is_better(folder: str, tmp_path: Path) -> None:
    loss = losses(run(EXAMPLES / folder / "run.sh", OUTPUT=str(tmp_path)))
    assert len(loss) == 4
    assert loss["ds_mup", 256] < loss["ds_mup", 64] - 0.02
    assert loss["ds_mup", 256] < loss["ds", 256] - 0.02


# ---- launch/deepspeed.sh -------------------------------------------------------------------------------------------

SETTINGS = {
    "MODEL": "examples/deepspeed_gpt2/gpt2_256.json",
    "RECIPE": "examples/deepspeed_gpt2/gpt2.recipe.yaml",
    "TRAIN_ITERS": "100",
    "BATCH": "16",
}


def test_the_launch_script_s_command_line_and_configuration(tmp_path: Path) -> None:
    own = {"HOSTFILE": "launch/hostfile", "ZERO_STAGE": "1", "MICRO_BATCH": "4", "DATA": "some where"}
    said = run("launch/deepspeed.sh", "--dry-run", "--steps", "5", OUTPUT=str(tmp_path), **SETTINGS, **own)
    assert shlex.split(said.splitlines()[-1]) == [
        "deepspeed", "--hostfile", "launch/hostfile", "--master_port", "29500",
        "--module", "mup_megatron.launch", "--deepspeed", "examples/deepspeed_gpt2/train.py",
        "--model", SETTINGS["MODEL"], "--deepspeed_config", str(tmp_path / "ds.json"), "--data", "some where",
        "--steps", "5",
    ]  # fmt: skip
    written = read(tmp_path / "ds.json")
    expected = read(EXAMPLES / "deepspeed_gpt2" / "ds_mup.json")
    assert written == expected | {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"MODEL": ""}, "set MODEL"),
        ({"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere: no such file"),
        ({"NODE_RANK": "0"}, "set HOSTFILE"),
    ],
)
def test_what_is_not_set_is_named(changes: dict[str, str], complaint: str, tmp_path: Path) -> None:
    environment = {**os.environ, **SETTINGS, "OUTPUT": str(tmp_path), **changes}
    done = subprocess.run(
        ["launch/deepspeed.sh", "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_two_processes(tmp_path: Path) -> None:
    own = {**SETTINGS, "MASTER_PORT": free_port(), "SLOTS": "2", "OUTPUT": str(tmp_path)}
    said = run("launch/deepspeed.sh", "--steps", "2", **own)
    assert trained(said)
    assert "dist_world_size=2" in said


@pytest.mark.slow
def test_two_nodes_of_a_hostfile_without_ssh(tmp_path: Path) -> None:
    """Two names of this machine stand for two nodes."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n", encoding="utf-8")
    own = {
        **SETTINGS,
        "HOSTFILE": str(hostfile),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    nodes = [
        started("launch/deepspeed.sh", "--steps", "2", **own, NODE_RANK=str(rank), OUTPUT=str(tmp_path / str(rank)))
        for rank in (0, 1)
    ]
    with nodes[0], nodes[1]:
        said, _ = map(ended, nodes)
    assert trained(said)
    assert "nnodes=2" in said


def trained(text: str) -> bool:
    """The recipe was honoured, and the script came to its end."""
    return "fingerprint" in text and "width 256: mean loss of the last 2 steps" in text


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
