"""`check --exported`: what was exported passes, and a mistake in it is told with the place where it begins."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import KINDS, Weights, drawn, models, recipe_of
from support.processes import run_ranks
from support.saved_models import save_one
from support.training_runs import Finished, command_line

from mup_megatron.check.run_exported import check_exported
from mup_megatron.errors import InputError
from mup_megatron.export.export import export
from mup_megatron.recipe import PerParameter, save_recipe

MISTAKES: Mapping[str, Mapping[str, float | str]] = {
    "embedding": {"embedding_multiplier": 1.0},
    "attention": {"attention_multiplier": 8**-0.5},
    "branches": {"residual_multiplier": 1.0},
    "readout": {"logits_scaling": 1.0},
}
"""Changes of an exported Granite's configuration."""
_CHECKED = ("gpt2", "llama with biases", "granite", "deepseek_v3")


def _checked(folder: Path) -> dict[str, Finished]:
    """What the command says, in this rank, of exports that are right and of those with mistakes."""
    os.chdir(folder)
    found = {}
    for name in _CHECKED:
        save_recipe(recipe_of(models(KINDS[name])[0]), Path(f"{name}.yaml"))
        save_one(folder / f"ck {name}", name)
        own = ["--recipe", f"{name}.yaml"]
        made = command_line("export", f"ck {name}", *own, "--to", f"hf {name}")
        assert made.code == 0, made
        found[name] = command_line("check", "--exported", f"hf {name}", "--against", f"ck {name}", *own)
    config = folder / "hf granite" / "config.json"
    right = config.read_text()
    against = ["--against", "ck granite", "--recipe", "granite.yaml"]
    for mistake, changes in MISTAKES.items():
        config.write_text(json.dumps({**json.loads(right), **changes}))
        found[mistake] = command_line("check", "--exported", "hf granite", *against)
    config.write_text(right)
    config.write_text(json.dumps({**json.loads(right), "num_hidden_layers": 2}))
    found["another model"] = command_line("check", "--exported", "hf granite", *against)
    config.write_text(json.dumps({**json.loads(right), "model_type": "qwen2"}))
    found["another kind"] = command_line("check", "--exported", "hf granite", *against)
    config.write_text(right)
    found["no folder"] = command_line("check", "--exported", "none", *against)
    found["alone"] = command_line("check", "--exported", "hf granite", "--recipe", "granite.yaml")
    found["no target"] = command_line("check", "--recipe", "granite.yaml")
    config.write_text("{")
    found["damaged"] = command_line("check", "--exported", "hf granite", *against)
    return found


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    found: dict[str, Finished] = run_ranks(_checked, 1, tmp_path_factory.mktemp("checked"))[0]
    return found


@pytest.mark.parametrize("name", _CHECKED)
def test_what_was_exported_passes(said: dict[str, Finished], name: str) -> None:
    assert said[name].code == 0, said[name]
    assert said[name].stdout.startswith(f"hf {name}: pass\neager: logits differ by at most ")
    assert "sdpa: logits differ by at most" in said[name].stdout
    assert "generate: 16 tokens are the same with a cache and without" in said[name].stdout


@pytest.mark.parametrize(
    ("mistake", "where"),
    {
        "embedding": "it begins before the first layer (embedding)",
        "attention": "it begins in layer 0",
        "branches": "it begins in layer 0",
        "readout": "it begins behind the layers (final norm or head)",
    }.items(),
)
def test_a_mistake_is_told_with_the_place_where_it_begins(said: dict[str, Finished], mistake: str, where: str) -> None:
    assert said[mistake].code == 1, said[mistake]
    assert said[mistake].stdout.startswith("hf granite: fail\n")
    assert where in said[mistake].stdout


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "another model": "its layers or sizes are not those of the checkpoint",
        "another kind": "--exported hf granite: a model of type qwen2, and exports are llama, qwen3, ",
        "no folder": "--exported none: no config.json there",
        "alone": "--exported DIR and --against CHECKPOINT go together",
        "no target": "Missing argument 'TARGET.yaml'",
        "damaged": "transformers cannot load it",
    }.items(),
)
def test_what_cannot_be_compared_is_refused(said: dict[str, Finished], what: str, words: str) -> None:
    assert (said[what].code, said[what].stdout) == (2, "")
    assert words in said[what].stderr


@pytest.mark.parametrize(
    ("name", "keys", "overrides"),
    [
        ("llama", {"mtp_num_layers": 1}, [("mtp.*.eh_proj.weight", {"multiplier": 2.0})]),
        (
            "gpt2",
            {"transformer_impl": "transformer_engine"},
            [("decoder.*.linear_qkv.layer_norm_weight", {"lr_mult": 2.0})],
        ),
        (
            "mixtral",
            {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True},
            [("decoder.*.experts.linear_fc1.weight*", {"multiplier": 1.25})],
        ),
    ],
    ids=["an override of what is left out", "an override of a fused norm", "a multiplier that the weights have"],
)
def test_the_plan_that_was_trained_is_what_counts(
    tmp_path: Path, name: str, keys: dict[str, Any], overrides: list[tuple[str, dict[str, float]]]
) -> None:
    base, model = (each.model_copy(update=keys) for each in models(KINDS[name]))
    own = tuple(PerParameter(match=match, **changes) for match, changes in overrides)
    source = drawn(model, recipe_of(base).model_copy(update={"per_parameter": own}).plan(model))
    exported = export(source, tmp_path / "out")
    compared = check_exported(exported.to, source)
    assert compared.passed, compared.told()


def test_what_was_trained_in_half_precision_and_is_exported_in_single_is_held_to_single(tmp_path: Path) -> None:
    base, model = models(KINDS["llama"])
    source = drawn(model, recipe_of(base).plan(model))
    held = {name: source.weights.read(name).bfloat16() for name in source.weights.stored}
    source = dataclasses.replace(source, weights=Weights(held))
    single, half = (
        check_exported(export(source, tmp_path / str(dtype), dtype=dtype).to, source) for dtype in (torch.float32, None)
    )
    assert (single.bound, half.bound) == (1e-4, 5e-2)
    assert single.passed, single.told()
    assert half.passed, half.told()
    assert half.differences["eager"][-1].size > 10 * single.bound


def test_what_cannot_be_exported_has_nothing_to_compare(tmp_path: Path) -> None:
    base, model = (each.model_copy(update={"rotary_percent": 0.5}) for each in models(KINDS["llama"]))
    with pytest.raises(InputError, match="no architecture has all that the model has"):
        check_exported(tmp_path, drawn(model, recipe_of(base).plan(model)))


def test_a_gelu_that_was_approximated_is_exported_so(tmp_path: Path) -> None:
    base, model = models(KINDS["gpt2"])
    exact = drawn(model, recipe_of(base).plan(model))
    tanh = dataclasses.replace(exact, tanh_gelu=True)
    folders = [export(source, tmp_path / str(source.tanh_gelu)).to for source in (exact, tanh)]
    assert json.loads((folders[1] / "config.json").read_text())["activation_function"] == "gelu_new"
    passed = [[check_exported(folder, against).passed for against in (exact, tanh)] for folder in folders]
    assert passed == [[True, False], [False, True]]
