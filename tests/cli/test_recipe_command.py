"""`recipe`: by hand, every key; and the list of defaults."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from support.commands import BASE, Command, contents

from mup_megatron import recipe as recipes
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import load_recipe, recipe
from mup_megatron.yaml_io import parse_yaml

MODELS: dict[str, type[BaseModel]] = {
    "base": ModelFile,
    "hyperparameters": recipes.Hyperparameters,
    "schedule": recipes.Schedule,
    "parametrization": recipes.Parametrization,
    "training": recipes.Training,
}


def test_defaults_show_every_key(run: Command) -> None:
    code, out, err = run("recipe", "--defaults")
    assert (code, err) == (0, "")
    content: Any = parse_yaml(out, source="defaults")
    assert set(content) == set(recipes.Recipe.model_fields)
    for section, model in MODELS.items():
        assert set(content[section]) == set(model.model_fields)
    assert all(f"{key}: " in out.splitlines()[1] for key in recipes.PerParameter.model_fields)
    # A line of the documentation of the format each.
    assert content["hyperparameters"]["adam_eps"] == 1e-8
    assert content["schedule"]["lr_decay_style"] == "linear"
    own = {"rule": "mup", "optimizer": "adam", "weight_decay_exponent": 1.0, "router": "output", "depth": None}
    assert content["parametrization"] == own


def test_missing_keys_take_the_defaults_that_are_shown(run: Command) -> None:
    content: Any = parse_yaml(run("recipe", "--defaults").out, source="defaults")
    content["base"].update(BASE)
    content["hyperparameters"]["lr"] = 0.006
    filled = recipe(content, source="filled in")
    assert filled == recipe({"base": BASE, "hyperparameters": {"lr": 0.006}}, source="minimal")


def test_a_recipe_that_is_written_loads_and_is_the_same(run: Command, here: Path) -> None:
    words = ["recipe", "--base", "base.yaml", "--lr", "6e-3", "--init-method-std", "0.05", "--adam-eps", "1e-12",
             "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1", "--weight-decay-exponent", "0.5"]  # fmt: skip
    assert run(*words, "-o", "new/hand.recipe.yaml") == (0, "new/hand.recipe.yaml\n", "")
    written = load_recipe(here / "new" / "hand.recipe.yaml")
    expected = recipe(
        {
            "base": BASE,
            "hyperparameters": {"lr": 0.006, "init_method_std": 0.05, "adam_eps": 1e-12},
            "schedule": {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.1},
            "parametrization": {"weight_decay_exponent": 0.5},
        },
        source="expected",
    )
    assert written == expected
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert out == (here / "new" / "hand.recipe.yaml").read_text()
    assert out.startswith(f"# fingerprint: {expected.fingerprint}\n")
    assert recipe(parse_yaml(out, source="output"), source="output").fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    "key",
    [
        key
        for section in ("hyperparameters", "schedule", "parametrization")
        for key in MODELS[section].model_fields
        if key != "depth"  # which has keys of its own
    ],
)
def test_every_tuned_key_is_an_option(run: Command, here: Path, key: str) -> None:
    section = next(section for section, model in MODELS.items() if key in model.model_fields and section != "base")
    words = {
        "lr_decay_style": "WSD",
        "lr_wsd_decay_style": "minus_sqrt",
        "rule": "standard",
        "optimizer": "sgd",
        "router": "hidden",
        "muon_nesterov": "True",
        "muon_scale_mode": "shape_scaling",
        "muon_num_ns_steps": "6",
        "muon_coefficient_type": "simple",
        "muon_tp_mode": "distributed",
    }
    value = words.get(key, "0.25")
    code, out, err = run("recipe", "--base", "base.yaml", "--lr", "0.5", f"--{key.replace('_', '-')}", value)
    assert (code, err) == (0, "")
    content: Any = parse_yaml(out, source="output")
    assert str(content[section][key]) == value


def test_a_rule_of_depth_is_an_option(run: Command, here: Path) -> None:
    code, out, err = run("recipe", "--base", "base.yaml", "--lr", "0.5", "--depth-alpha", "0.5")
    assert (code, err) == (0, "")
    content: Any = parse_yaml(out, source="output")
    assert content["parametrization"]["depth"] == {"rule": "completep", "alpha": 0.5}
    assert run("recipe", "--base", "base.yaml", "--lr", "0.5", "--depth-alpha", "2").code == 2


def test_what_exists_is_replaced_only_if_asked_for(run: Command, here: Path) -> None:
    before = contents(here)
    words = ("recipe", "--base", "base.yaml", "--lr", "0.1", "-o", "r.yaml")
    assert run(*words) == (
        2,
        "",
        "mup-megatron: r.yaml: exists already. Give --force to replace it, or another name.\n",
    )
    assert contents(here) == before
    assert run(*words, "--force").code == 0
    assert load_recipe(here / "r.yaml").hyperparameters.lr == 0.1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--base MODEL.yaml is missing"),
        (["--base", "base.yaml"], "--lr is missing"),
        (["--base", "base.yaml", "--lr", "fast"], "'fast' is not a valid float"),
        (["--base", "base.yaml", "--lr", "nan"], "hyperparameters.lr: must be a finite number, found nan"),
        (["--base", "base.yaml", "--lr", "-1"], "hyperparameters.lr: should be greater than 0, found -1.0"),
        (["--base", "base.yaml", "--lr", "0.1", "--min-lr", "0.2"], "min_lr 0.2 is above lr 0.1. Lower it."),
        (["--base", "base.yaml", "--lr", "0.1", "--optimizer", "soap"], "'soap' is not one of 'adam', 'sgd'"),
        (["--base", "r.yaml", "--lr", "0.1"], "r.yaml: hyperparameters: unknown key."),
    ],
)
def test_bad_values_write_nothing(run: Command, here: Path, words: list[str], said: str) -> None:
    before = contents(here)
    code, out, err = run("recipe", *words, "-o", "new.recipe.yaml")
    assert (code, out) == (2, "")
    assert said in err
    assert contents(here) == before


def test_a_hugging_face_base_is_drawn_with_its_own_std_unless_another_is_said(run: Command, here: Path) -> None:
    content = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 1, "initializer_range": 0.05}
    (here / "config.json").write_text(json.dumps(content))
    for words, expected in (((), 0.05), (("--init-method-std", 0.03), 0.03)):
        written: Any = parse_yaml(run("recipe", "--base", "config.json", "--lr", 0.01, *words).out, source="recipe")
        assert written["hyperparameters"]["init_method_std"] == expected
