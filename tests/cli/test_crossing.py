"""Every shipped file with every command that takes its kind, and what one command writes with those that read it.

Files are found by themselves: a new example is crossed with all of it, and one whose kind nobody knows is an error.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.commands import Answer, Command, contents

from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, load_model_file, model_file
from mup_megatron.recipe import HuggingFaceBase, load_recipe
from mup_megatron.yaml_io import dump_yaml, parse_yaml, read_yaml

ROOT = Path(__file__).parents[2]
SHIPPED = [
    path.relative_to(ROOT)
    for folder in ("configs", "examples", "launch")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".yaml", ".json", ".sh")
]


PUBLISHED = {f"{name}.recipe.yaml" for name in ("cerebras_gpt", "crystalcoder", "granite_3.0", "minicpm")}
"""Recipes of others' models, none of which is a file here: tests/test_published_recipes.py has their shapes."""


def _kind(path: Path) -> str:
    if path.suffix == ".sh":
        return "script"
    content = read_yaml(ROOT / path)
    assert isinstance(content, Mapping)
    for kind, key in (
        ("recipe", "hyperparameters"),
        ("hugging face", "model_type"),
        ("deepspeed", "zero_optimization"),
        ("model", "num_layers"),
        ("model", "hybrid_layer_pattern"),
        ("model", "architecture"),
        ("space", "lr"),
    ):
        if key in content:
            return "published" if path.name in PUBLISHED else kind
    raise AssertionError(f"{path}: of no kind that this test knows. Add it here, with the commands that take it.")


KINDS = {path: _kind(path) for path in SHIPPED}


def _all(kind: str) -> list[Any]:
    return [pytest.param(path, id=str(path)) for path, of in KINDS.items() if of == kind]


@pytest.fixture
def at_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root as the current folder, where the paths inside shipped files begin; and an empty one to write to."""
    monkeypatch.chdir(ROOT)
    return tmp_path


def done(answer: Answer) -> str:
    """The output of a command that ended well."""
    assert (answer.code, answer.err) == (0, "")
    return answer.out


def explained(answer: Answer, proxy: ModelFile, model: ModelFile) -> str:
    """The output of a plan, which has one remark where a proxy has other heads for each key/value group."""
    heads = [each.num_attention_heads // each.query_groups for each in (proxy, model)]
    if heads[0] == heads[1]:
        return done(answer)
    [remark] = answer.err.splitlines()
    assert remark.startswith(f"Query heads for each key/value group: {heads[0]} at the base, {heads[1]} here.")
    return done(answer._replace(err=""))


def refused(answer: Answer, name: object) -> None:
    """That a command ended with a sentence about a file."""
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"mup-megatron: {name}: ")
    assert all(len(line) <= 300 for line in answer.err.removeprefix("mup-megatron: ").splitlines())


def _model_of_flags(run: Command, *words: object) -> dict[str, Any]:
    answer = run("model", "--from-args", "--", *words)
    # The script has a tokenizer of its user's.
    assert not answer.err or "Megatron takes the size of its tokenizer, which cannot be read here" in answer.err
    content = parse_yaml(done(answer._replace(err="")), source="model")
    return _said(model_file(content, source="model"))


def _said(model: ModelFile) -> dict[str, Any]:
    """What a model file says, with what follows from the rest of it; the std is a recipe's, if there is one."""
    of_recipe = {"init_method_std", "max_position_embeddings", "ffn_hidden_size", "kv_channels"}
    follows = ("ffn_size", "head_size", "query_groups", "positions")
    return model.model_dump(exclude=of_recipe) | {key: getattr(model, key) for key in follows}


# ---- model files ---------------------------------------------------------------------------------------------------


def _proxy(run: Command, target: Path, folder: Path) -> Path:
    """A proxy of a shipped model, or its own file where it is too narrow to have one."""
    model = load_model_file(target)
    proxy = folder / "proxy.yaml"
    width = 2 * model.hidden_size // model.num_attention_heads
    if model.num_attention_heads < 4:
        return target
    done(run("proxy", target, "--hidden-size", width, "-o", proxy))
    return proxy


def _of_few_layers(path: Path, folder: Path) -> Path:
    """The file; of a model with experts, which has tens of thousands of tensors, one of its first four layers."""
    content = read_yaml(path)
    assert isinstance(content, Mapping)
    if "num_experts" not in content:
        return path
    few = {"num_layers": 4} | ({"moe_layer_freq": "([0]*3+[1]*1)"} if "moe_layer_freq" in content else {})
    (folder / path.name).write_text(dump_yaml({**content, **few}))
    return folder / path.name


@pytest.mark.parametrize("path", _all("model"))
def test_a_model_file_goes_through_every_command(run: Command, at_root: Path, path: Path) -> None:
    model = load_model_file(path)
    program = architecture_of(model).command_line.programs[0]
    assert _model_of_flags(run, program, *done(run("args", path, "--one-line")).split()) == _said(model)
    whole, path = path, _of_few_layers(path, at_root)
    proxy = _proxy(run, path, at_root)
    tuned, ds = at_root / "own.recipe.yaml", at_root / "ds.json"
    done(run("recipe", "--base", proxy, "--lr", "0.01", "--lr-warmup-fraction", "0.1", "-o", tuned))
    assert explained(run("explain", whole, "--recipe", tuned, "--brief"), load_model_file(proxy), model)
    model = load_model_file(path)
    flags = done(run("args", path, "--recipe", tuned, "--train-iters", "100", "--one-line")).split()
    assert _model_of_flags(run, program, *flags) == _said(model)
    done(run("ds-config", path, "--recipe", tuned, "--train-iters", "100", "-o", ds))
    assert "goes with the recipe" in done(run("ds-config", path, "--recipe", tuned, "--check", ds))
    native = ("--use-mup", "--mup-base-hidden-size", load_model_file(proxy).hidden_size, "--optimizer", "adam",
              "--lr-decay-style", "linear", "--train-iters", "100")  # fmt: skip
    if not isinstance(architecture_of(model), Decoder) or model.multi_latent_attention:
        assert run("from-native", "--", program, *flags, *native).code == 2
    elif model.hidden_size > load_model_file(proxy).hidden_size:
        done(run("from-native", "-o", at_root / "native.recipe.yaml", "--", *flags, *native))
        native_base = load_recipe(at_root / "native.recipe.yaml").megatron_base
        assert explained(
            run("explain", path, "--recipe", at_root / "native.recipe.yaml", "--brief"), native_base, model
        )


# ---- recipes -------------------------------------------------------------------------------------------------------


def _targets(recipe: Path) -> Iterator[Path]:
    """The shipped models that a recipe's base has the architecture of."""
    base = load_recipe(ROOT / recipe).base
    for path, kind in KINDS.items():
        if isinstance(base, HuggingFaceBase) and kind == "hugging face":
            content = read_yaml(ROOT / path)
            if isinstance(content, Mapping) and content["model_type"] == base.model_type:
                yield path
        if isinstance(base, ModelFile) and kind == "model" and path.parent.name == "models":
            model = load_model_file(ROOT / path)
            alike = _families(model) == _families(base) and model.seq_length == base.seq_length
            if alike and model.hidden_size >= base.hidden_size:
                yield path


def _families(model: ModelFile) -> set[str]:
    stacks = architecture_of(model).stacks(model)
    return {family.name for layers in stacks.values() for families in layers for family in families} | {*stacks}


@pytest.mark.parametrize("path", _all("recipe"))
def test_a_recipe_goes_with_the_models_of_its_kind(run: Command, at_root: Path, path: Path) -> None:
    targets = [*_targets(path)]
    assert targets
    for number, target in enumerate(targets):
        assert done(run("explain", target, "--recipe", path, "--brief"))
        for more in ((), ("--train-iters", "200", "--global-batch-size", "16")):
            ds = at_root / f"{number}{len(more)}.json"
            done(run("ds-config", target, "--recipe", path, *more, "-o", ds))
            assert "goes with the recipe" in done(run("ds-config", target, "--recipe", path, "--check", ds))
        if KINDS[target] == "model":
            flags = done(run("args", target, "--recipe", path, "--train-iters", "200", "--one-line")).split()
            assert _model_of_flags(run, *flags) == _said(load_model_file(target))
        else:
            refused(run("args", target, "--recipe", path), target)


# ---- Hugging Face and DeepSpeed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", _all("hugging face"))
def test_a_hugging_face_configuration_is_a_base_of_its_own(run: Command, at_root: Path, path: Path) -> None:
    tuned, ds = at_root / "own.recipe.yaml", at_root / "ds.json"
    done(run("recipe", "--base", path, "--lr", "0.01", "-o", tuned))
    assert done(run("explain", path, "--recipe", tuned, "--brief"))
    done(run("ds-config", path, "--recipe", tuned, "-o", ds))
    assert "goes with the recipe" in done(run("ds-config", path, "--recipe", tuned, "--check", ds))
    for command in (("args", path), ("proxy", path)):
        refused(run(*command), path)


def _beside(path: Path, kind: str) -> list[Path]:
    return [other for other, of in KINDS.items() if of == kind and other.parent == path.parent]


@pytest.mark.parametrize("path", _all("deepspeed"))
def test_a_deepspeed_configuration_is_right_or_lacks_the_entry(run: Command, at_root: Path, path: Path) -> None:
    [recipe] = _beside(path, "recipe")
    entry = "mup" in json.loads((ROOT / path).read_text())
    for target in _beside(path, "hugging face"):
        code, out, _ = run("ds-config", target, "--recipe", recipe, "--check", path)
        assert (code, "goes with the recipe" in out, '"mup": missing' in out) == (int(not entry), entry, not entry)


def _checks() -> Iterator[Any]:
    """Every DeepSpeed configuration that `check` takes: those that are shipped, and those that `ds-config` writes."""
    for path in (path for path, kind in KINDS.items() if kind == "deepspeed"):
        for target in _beside(path, "hugging face"):
            if "mup" in json.loads((ROOT / path).read_text()):
                yield pytest.param(target, path, (), id=f"{target}-{path.name}")
            for words in ((), ("--train-iters", "200", "--global-batch-size", "16")):
                if path.stem == "ds":  # once in a folder
                    yield pytest.param(target, None, words, id=f"{target}-{'-'.join(words) or 'auto'}")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "ds", "words"), _checks())
def test_check_takes_every_deepspeed_configuration(
    run: Command, at_root: Path, target: Path, ds: Path | None, words: tuple[str, ...]
) -> None:
    [recipe] = _beside(target, "recipe")
    if ds is None:
        ds = at_root / "ds.json"
        done(run("ds-config", target, "--recipe", recipe, *words, "-o", ds))
        content = json.loads(ds.read_text())
        content["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed's own would be compiled first
        ds.write_text(json.dumps(content))
    words = ("check", target, "--recipe", recipe, "--deepspeed", ds, "--widths", "32,64,128", "--seeds", "2",
             "--output", at_root / "out")  # fmt: skip
    # In a process of its own: the engine keeps what it finds at its first import.
    answer = subprocess.run([sys.executable, "-m", "mup_megatron", *map(str, words)], capture_output=True, text=True,
                            check=False, env=os.environ | {"DS_ACCELERATOR": "cpu"})  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr


# ---- search spaces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", _all("space"))
def test_a_space_is_read_before_the_data_are_missed(run: Command, at_root: Path, path: Path) -> None:
    for proxy in ("configs/models/tiny.yaml", "launch/gpt3_6.7b/tiny/proxy.yaml"):
        answer = run("sweep", proxy, "--data", at_root / "none", "--trials", "1", "--study", "s", "--space", path)
        refused(answer, f"{at_root / 'none'}.bin")


# ---- scripts -------------------------------------------------------------------------------------------------------

SIZES = re.findall(r"^(\d[\w.]*)", (ROOT / "launch/layouts.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("size", SIZES)
def test_the_launch_script_says_its_models(run: Command, at_root: Path, size: str) -> None:
    of_file = load_model_file(Path(f"configs/models/gpt3_{size}.yaml"))
    assert _model_of_flags(run, "launch/gpt3.sh", size) == _said(of_file)
    # From elsewhere too: the script knows where it is. And a flag behind it wins, as in the script.
    assert _model_of_flags(run, ROOT / "launch/gpt3.sh", size, "--num-layers", "3")["num_layers"] == 3


@pytest.mark.parametrize("path", _all("script"))
@pytest.mark.parametrize("command", [("model", "--from-args"), ("from-native",)], ids=["model", "from-native"])
def test_a_script_that_does_not_say_a_model_is_refused_in_a_sentence(
    run: Command, at_root: Path, path: Path, command: tuple[str, ...]
) -> None:
    before = contents(at_root)
    refused(run(*command, "-o", at_root / "out.yaml", "--", path), path)
    assert contents(at_root) == before


# ---- from a proxy to a run -----------------------------------------------------------------------------------------


def test_what_a_search_writes_is_read_by_the_others(run: Command, data: Path, here: Path) -> None:
    """`proxy`, `sweep`, `transfer`, and then every command that takes a recipe."""
    target = {"num_layers": 1, "hidden_size": 128, "num_attention_heads": 8, "vocab_size": 300, "seq_length": 16}
    (here / "t.yaml").write_text(dump_yaml({**target, "transformer_impl": "local"}))
    shutil.copy(ROOT / "configs/spaces/gpt3_6.7b.yaml", here / "space.yaml")
    done(run("proxy", "t.yaml", "--hidden-size", "32", "-o", "p.yaml"))
    found = run("sweep", "p.yaml", "--data", "text", "--trials", "1", "--study", "s", "--space", "space.yaml",
                "--train-iters", "2", "--global-batch-size", "2", "--eval-iters", "1")  # fmt: skip
    assert found.code == 0, found.err
    done(run("transfer", "--study", "s", "-o", "s.recipe.yaml"))
    assert done(run("explain", "t.yaml", "--recipe", "s.recipe.yaml", "--brief"))
    flags = done(run("args", "t.yaml", "--recipe", "s.recipe.yaml", "--train-iters", "9", "--one-line")).split()
    assert _model_of_flags(run, *flags)["hidden_size"] == 128
    done(run("ds-config", "t.yaml", "--recipe", "s.recipe.yaml", "--train-iters", "9", "-o", "ds.json"))
    assert "goes with the recipe" in done(run("ds-config", "t.yaml", "--recipe", "s.recipe.yaml", "--check", "ds.json"))
    trained = run("train", "t.yaml", "--recipe", "s.recipe.yaml", "--data", "text", "--output", "out", "--train-iters",
                  "2", "--global-batch-size", "2")  # fmt: skip
    assert trained.code == 0, trained.err
