"""Whatever is wrong with a file or a flag: exit code 2, one sentence with file, key and remedy, and nothing is lost."""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from support.commands import BASE, RECIPE, TARGET, Command, contents, write

from mup_megatron.cli.main import group
from mup_megatron.recipe import load_recipe

ROOT = Path(__file__).parents[2]
EXPLAIN = ("explain", "target.yaml", "--recipe", "r.yaml")
RUNS_CODE = """
num_layers: !!python/object/apply:os.mkdir [was_run]
hidden_size: !!python/object/new:os.mkdir [was_run]
num_attention_heads: !!python/name:os.mkdir ''
"""


def refused(run: Command, here: Path, *words: object) -> str:
    """What is said, once all else that must hold has been seen to hold."""
    before = contents(here)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert 'File "' not in err
    assert contents(here) == before
    assert err.startswith("mup-megatron: ")
    assert re.search(r"[.:] [A-Z]", err), "after what is wrong, what to do"
    return err.removeprefix("mup-megatron: ")


TARGETS = {
    "unknown key": ({"hiden_size": 128}, "target.yaml: hiden_size: unknown key. Did you mean 'hidden_size'?"),
    "wrong type": ({"num_layers": "two"}, "target.yaml: num_layers: should be a valid integer, found 'two'. Correct"),
    "heads that don't divide": (
        {"num_attention_heads": 5},
        "target.yaml: hidden_size 128 is not divisible by num_attention_heads 5. Change one of them, or give",
    ),
    "another architecture": (
        {"swiglu": True},
        "r.yaml for target.yaml: swiglu is False in the recipe's base but True in the target. ",
    ),
    "NaN": ({"init_method_std": float("nan")}, "target.yaml: init_method_std: must be a finite number, found nan."),
    "experts": (
        {"num_experts": 8},
        "the recipe's base has layers of attention and mlp, and the target of attention and",
    ),
    "more than all experts": ({"num_experts": 8, "moe_router_topk": 9}, "target.yaml: moe_router_topk 9 is more than"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_model_files(run: Command, here: Path, case: str) -> None:
    changes, said = TARGETS[case]
    write(here / "target.yaml", {**TARGET, **changes})
    assert said in refused(run, here, *EXPLAIN)


RECIPES = {
    "unknown key": ({"hyperparameter": {"lr": 0.1}}, "r.yaml: hyperparameter: unknown key. Did you mean 'hyperpara"),
    "unknown inner key": (
        {"hyperparameters": {"lr": 0.1, "weight_decy": 0.1}},
        "r.yaml: hyperparameters.weight_decy: unknown key. Did you mean 'weight_decay'?",
    ),
    "unknown key of the base": (
        {"base": {**BASE, "heads": 1}},
        "r.yaml: base.heads: unknown key.",
    ),
    "unknown key of an override": (
        {"per_parameter": [{"match": "*", "lr": 1.0}]},
        "r.yaml: per_parameter.0.lr: unknown key. Known keys: match, lr_mult, init_mult, multiplier.",
    ),
    "wrong type": ({"hyperparameters": {"lr": "fast"}}, "r.yaml: hyperparameters.lr: should be a valid number, found"),
    "NaN": ({"hyperparameters": {"lr": float("nan")}}, "r.yaml: hyperparameters.lr: must be a finite number, found"),
    "infinite": ({"hyperparameters": {"lr": float("inf")}}, "r.yaml: hyperparameters.lr: must be a finite number"),
    "negative": ({"hyperparameters": {"lr": -0.1}}, "r.yaml: hyperparameters.lr: should be greater than 0, found -0.1"),
    "missing": ({"hyperparameters": {}}, "r.yaml: hyperparameters.lr: missing. Add this key."),
    "another version": ({"version": 2}, "r.yaml: version: should be 1, found 2."),
    "base with heads that don't divide": (
        {"base": {**BASE, "num_attention_heads": 5}},
        "r.yaml: base: hidden_size 32 is not divisible by num_attention_heads 5.",
    ),
    "an override of a vector": (
        {"per_parameter": [{"match": "*", "init_mult": 2.0}]},
        "per_parameter[0] '*': decoder.layers.0.self_attention.linear_qkv.layer_norm_weight is a bias or gain",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(run: Command, here: Path, case: str) -> None:
    changes, said = RECIPES[case]
    write(here / "r.yaml", {**RECIPE, **changes})
    assert said in refused(run, here, *EXPLAIN)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)  # permissions would not stop root


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "no such file. Check the path."),
    "a folder": (_folder, "cannot be read (Is a directory). Check the path"),
    "unreadable": (_unreadable, "cannot be read (Too many levels of symbolic links). Check the path"),
    "empty": (lambda path: path.write_text(""), ": missing. Add this key."),
    "binary": (lambda path: path.write_bytes(b"\x80\x02}q\x00."), "not UTF-8 text (byte 0). Save it as UTF-8."),
    "zeros": (lambda path: path.write_bytes(bytes(64)), "not valid YAML: "),
    "a list": (lambda path: path.write_text("- 1\n- 2\n"), "expected keys and values, found list."),
    "a word": (lambda path: path.write_text("hello"), "expected keys and values, found str."),
    "an open bracket": (lambda path: path.write_text("a: 1\nb: {c: 1\n"), "line 3: not valid YAML: "),
    "a tab": (lambda path: path.write_text("a: 1\n\tb: 1\n"), "line 2: not valid YAML: "),
    "a key given twice": (
        lambda path: path.write_text("a: 1\na: 2\n"),
        "line 2: a: this key is given twice. Remove one",
    ),
    "two documents": (lambda path: path.write_text("a: 1\n---\nb: 1\n"), "not valid YAML: but found another document"),
    "cut in the middle": (lambda path: path.write_bytes(path.read_bytes()[:-40]), ""),
    "nested without end": (lambda path: path.write_text("[" * 1000), "not valid YAML: "),
    "YAML that would run code": (
        lambda path: path.write_text(RUNS_CODE),
        "line 2: not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.mkdir'. Correct the file.",
    ),
}


@pytest.mark.parametrize("name", ["target.yaml", "r.yaml", "space.yaml"])
@pytest.mark.parametrize("case", FILES)
def test_files_that_are_something_else(run: Command, here: Path, name: str, case: str) -> None:
    write(here / "space.yaml", {"lr": {"low": 0.001, "high": 0.01}, "embedding_multiplier": {"low": 1, "high": 10}})
    damage, said = FILES[case]
    damage(here / name)
    words: tuple[object, ...] = EXPLAIN
    if name == "space.yaml":
        words = ("sweep", "base.yaml", "--data", "text", "--trials", "1", "--study", "s", "--space", name)
        if case in ("empty", "a list", "a word"):
            said = "no hyperparameters. Write lines such as"
    answer = refused(run, here, *words)
    assert answer.startswith(f"{name}: ")
    assert said in answer
    assert not (here / "was_run").exists()


def test_the_yaml_that_would_run_code_would_run_it(here: Path) -> None:
    """With a loader that is not safe; else the test above would prove nothing."""
    import yaml

    yaml.load(RUNS_CODE.splitlines()[1], yaml.UnsafeLoader)
    assert (here / "was_run").is_dir()


@pytest.mark.parametrize("flag", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_layouts_that_do_not_divide_the_target(run: Command, here: Path, flag: str) -> None:
    said = refused(run, here, "train", "target.yaml", "--recipe", "r.yaml", "--data", "d", "--output", "out",
                   "--train-iters", "1", "--global-batch-size", "1", flag, "3")  # fmt: skip
    key = {"--tensor-model-parallel-size": "num_attention_heads 4", "--pipeline-model-parallel-size": "num_layers 1"}
    assert said.splitlines()[0] == f"{flag} 3 does not divide {key[flag]}. Choose a divisor of it."


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_data_that_are_cut_short(run: Command, here: Path, data: Path, suffix: str) -> None:
    file = here / f"text{suffix}"
    file.write_bytes(file.read_bytes()[:-10])
    said = refused(run, here, "sweep", "base.yaml", "--data", "text", "--trials", "1", "--study", "s")
    assert said.startswith(f"text{suffix}: ")
    assert "truncated" in said
    assert "Make the data again: mup-megatron data FILES… -o text --force" in said


def test_a_full_disk_costs_no_recipe(here: Path) -> None:
    """A write beyond the limit fails, as on a full disk; the signal that comes first would kill."""

    def little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "mup_megatron", "recipe", "--base", "base.yaml", "--lr", "0.5", "-o", "r.yaml",
               "--force"]  # fmt: skip
    before = contents(here)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("COVERAGE_PROCESS_CONFIG", None)  # `make coverage` would write more than there is room for
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, preexec_fn=little_room)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "mup-megatron: r.yaml: cannot be written (File too large); what was there before is unchanged. "
        "Free some space or choose another place.\n"
    )
    assert contents(here) == before, "nothing half written either"
    assert load_recipe(here / "r.yaml").hyperparameters.lr == 0.006


def test_a_kind_of_model_that_is_not_supported_yet_is_called_so(run: Command, here: Path) -> None:
    write(here / "target.yaml", {**TARGET, "moe_latent_size": 2})
    assert "target.yaml: moe_latent_size: models with latent experts" in refused(run, here, *EXPLAIN)


def test_every_number_of_things_on_a_command_line_has_an_upper_bound() -> None:
    """Those of a run are bounded by its options, with messages of their own: see tests/training/test_train_refusals."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        for option in command.params if name not in ("train", "sweep") else ():
            assert not (isinstance(option.type, click.IntRange) and option.type.max is None), (name, option.opts)
