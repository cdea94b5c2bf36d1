"""Recipes: validation, fingerprint, defaults, and the way to disk and back."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml as yaml_1_1
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shapes import gpt

from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe, load_recipe, recipe, save_recipe

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "seq_length": 16,
}
SMALL: dict[str, Any] = {"base": BASE, "hyperparameters": {"lr": 0.006}}

# As in the documentation of the file format.
DOCUMENTED = """
version: 1
base: {num_layers: 4, hidden_size: 256, num_attention_heads: 4, vocab_size: 1000, seq_length: 128}
hyperparameters:
  lr: 0.006
  min_lr: 0.0
  init_method_std: 0.05
  embedding_multiplier: 10.0
  output_multiplier: 1.0
  attention_multiplier: 1.0
  weight_decay: 0.1
  adam_beta1: 0.9
  adam_beta2: 0.95
  adam_eps: 1.0e-8
  clip_grad: 1.0
schedule: {lr_decay_style: linear, lr_warmup_fraction: 0.01}
per_parameter:
  - {match: "embedding.*", lr_mult: 1.0, init_mult: 1.0, multiplier: 1.0}
parametrization:
  rule: mup
  optimizer: adam
  weight_decay_exponent: 1.0
training: {train_iters: 1000, global_batch_size: 32, seq_length: 128}
provenance: {}
"""


def _recipe(**changes: Any) -> Recipe:
    return recipe({**SMALL, **changes}, source="a.recipe.yaml")


def _tuned(**changes: Any) -> Recipe:
    return _recipe(hyperparameters={"lr": 0.006, **changes})


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_documented_file_is_a_recipe(tmp_path: Path) -> None:
    found = load_recipe(_written(tmp_path / "a.recipe.yaml", DOCUMENTED))
    assert (found.hyperparameters.lr, found.hyperparameters.adam_eps) == (0.006, 1e-8)
    assert found.base.hidden_size == 256
    assert found.per_parameter[0].match == "embedding.*"
    assert found.training.train_iters == 1000


# ---- fingerprint ---------------------------------------------------------------------------------------------------


def fingerprint_of(content: dict[str, Any]) -> str:
    """As the file format defines it, from a file in which every default is written out."""
    counted = {key: value for key, value in content.items() if key not in ("training", "provenance")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@pytest.mark.parametrize("text", [DOCUMENTED, f"base: {json.dumps(BASE)}\nhyperparameters: {{lr: 6e-4}}\n"])
def test_the_fingerprint_is_what_the_file_format_says(text: str, tmp_path: Path) -> None:
    found = load_recipe(_written(tmp_path / "a.recipe.yaml", text))
    save_recipe(found, tmp_path / "b.recipe.yaml")
    # A saved recipe holds every default, so that anybody can compute it, here with another reader.
    written = (tmp_path / "b.recipe.yaml").read_text()
    assert fingerprint_of(yaml_1_1.safe_load(written)) == found.fingerprint
    assert written.startswith(f"# fingerprint: {found.fingerprint}\n")


def test_training_and_provenance_do_not_count() -> None:
    plain = _recipe().fingerprint
    assert _recipe(training={"train_iters": 7}, provenance={"study": "x", "trial": 3}).fingerprint == plain


def test_defaults_written_out_do_not_count() -> None:
    explicit = _recipe(
        version=1,
        base={**BASE, "swiglu": False},
        hyperparameters={"lr": 0.006, "adam_beta1": 0.9},
        schedule={"lr_decay_style": "linear"},
        per_parameter=[],
    )
    assert explicit.fingerprint == _recipe().fingerprint


OTHERS = ("init_method_std", "embedding_multiplier", "output_multiplier", "attention_multiplier", "weight_decay")
OTHERS += ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad")
CHANGES: list[dict[str, Any]] = [
    {"base": {**BASE, "hidden_size": 128}},
    {"base": {**BASE, "swiglu": True}},
    *({"hyperparameters": {"lr": 0.006, key: 0.125}} for key in OTHERS),
    {"hyperparameters": {"lr": 0.007}},
    {"hyperparameters": {"lr": 0.006, "min_lr": 0.001}},
    {"schedule": {"lr_warmup_fraction": 0.5}},
    {"per_parameter": [{"match": "*", "lr_mult": 2.0}]},
    {"parametrization": {"rule": "standard"}},
    {"parametrization": {"optimizer": "sgd"}},
    {"parametrization": {"weight_decay_exponent": 0.5}},
]


def test_everything_that_changes_a_run_changes_the_fingerprint() -> None:
    found = [_recipe(**change).fingerprint for change in [{}, *CHANGES]]
    assert len(set(found)) == len(found)


def test_the_order_of_overrides_counts() -> None:
    a, b = {"match": "a*", "lr_mult": 2.0}, {"match": "b*", "lr_mult": 3.0}
    assert _recipe(per_parameter=[a, b]).fingerprint != _recipe(per_parameter=[b, a]).fingerprint


@settings(max_examples=40, deadline=None)
@given(lr=st.floats(1e-300, 1e300), eps=st.floats(1e-300, 1.0), std=st.floats(1e-9, 9.0), whole=st.integers(1, 9))
def test_a_saved_recipe_is_the_same_recipe(
    lr: float, eps: float, std: float, whole: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("r") / "a.recipe.yaml"
    # A whole number where a fraction is expected has the fingerprint of the fraction.
    found = _tuned(lr=lr, adam_eps=eps, init_method_std=std, output_multiplier=whole)
    save_recipe(found, path)
    assert load_recipe(path) == found
    assert load_recipe(path).fingerprint == found.fingerprint
    assert (
        found.fingerprint == _tuned(lr=lr, adam_eps=eps, init_method_std=std, output_multiplier=1.0 * whole).fingerprint
    )


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"version": 2}, r"version: should be 1, found 2"),
    "unknown key": ({"hyperparameter": {}}, r"hyperparameter: unknown key\. Did you mean 'hyperparameters'\?"),
    "unknown hyperparameter": (
        {"hyperparameters": {"lr": 0.1, "adam_betta2": 0.9}},
        r"hyperparameters\.adam_betta2: unknown key\. Did you mean 'adam_beta2'\?",
    ),
    "unknown key of the base": (
        {"base": {**BASE, "ffn_size": 3}},
        r"base\.ffn_size: unknown key\. Did you mean 'ffn_hidden_size'\?",
    ),
    "unknown key of an override": (
        {"per_parameter": [{"match": "*", "lrmult": 2.0}]},
        r"per_parameter\.0\.lrmult: unknown key\. Did you mean 'lr_mult'\?",
    ),
    "no learning rate": ({"hyperparameters": {}}, r"hyperparameters\.lr: missing\. Add this key\."),
    "NaN": ({"hyperparameters": {"lr": float("nan")}}, r"hyperparameters\.lr: must be a finite number, found nan"),
    "infinite": ({"hyperparameters": {"lr": float("inf")}}, r"hyperparameters\.lr: must be a finite number, found inf"),
    "negative": ({"hyperparameters": {"lr": -0.1}}, r"hyperparameters\.lr: should be greater than 0, found -0\.1"),
    "zero": ({"hyperparameters": {"lr": 0.0}}, r"hyperparameters\.lr: should be greater than 0, found 0"),
    "word": ({"hyperparameters": {"lr": "fast"}}, r"hyperparameters\.lr: should be a valid number, found 'fast'"),
    "a beta of 1": (
        {"hyperparameters": {"lr": 0.1, "adam_beta2": 1.0}},
        r"hyperparameters\.adam_beta2: should be less than 1, found 1",
    ),
    "negative weight decay": (
        {"hyperparameters": {"lr": 0.1, "weight_decay": -0.1}},
        r"hyperparameters\.weight_decay: should be greater than or equal to 0",
    ),
    "floor above the peak": (
        {"hyperparameters": {"lr": 0.1, "min_lr": 0.2}},
        r"hyperparameters: min_lr 0\.2 is above lr 0\.1\. Lower it\.",
    ),
    "warm-up longer than the decay": (
        {"schedule": {"lr_warmup_fraction": 0.5, "lr_decay_fraction": 0.4}},
        r"schedule: lr_warmup_fraction 0\.5 does not end before lr_decay_fraction 0\.4\. Shorten the warm-up\.",
    ),
    "schedule of more than a million runs": (
        {"schedule": {"lr_decay_fraction": 1.1e6}},
        r"schedule\.lr_decay_fraction: should be less than or equal to 1000000",
    ),
    "no such rule": ({"parametrization": {"rule": "ntk"}}, r"parametrization\.rule: should be 'mup' or 'standard'"),
    "no such optimizer": (
        {"parametrization": {"optimizer": "adamw"}},
        r"parametrization\.optimizer: should be 'adam', 'sgd', 'muon' or 'lion', found 'adamw'",
    ),
    "empty pattern": ({"per_parameter": [{"match": ""}]}, r"per_parameter\.0\.match: "),
    "negative multiplier": (
        {"per_parameter": [{"match": "*", "lr_mult": -1.0}]},
        r"per_parameter\.0\.lr_mult: should be greater than 0",
    ),
    "heads that don't divide": (
        {"base": {**BASE, "num_attention_heads": 5}},
        r"base: hidden_size 64 is not divisible by num_attention_heads 5\.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_with_file_key_and_remedy(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(InputError, match=rf"^a\.recipe\.yaml: {message}") as caught:
        _recipe(**changes)
    assert str(caught.value).endswith((".", "?"))


@pytest.mark.parametrize("text", ["1e-8", "6e-4", "1e-08", "1.0e-8"])
def test_a_number_is_a_number(text: str, tmp_path: Path) -> None:
    content = DOCUMENTED.replace("adam_eps: 1.0e-8", f"adam_eps: {text}")
    assert load_recipe(_written(tmp_path / "a.yaml", content)).hyperparameters.adam_eps == float(text)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(InputError, match=r"a\.yaml: no such file"):
        load_recipe(path)
    with pytest.raises(InputError, match=r"a\.yaml: base: missing\. Add this key\."):
        load_recipe(_written(path, ""))
    with pytest.raises(InputError, match=r"a\.yaml: line 3: not valid YAML"):
        load_recipe(_written(path, "base:\n  a: 1\n b: 2\n"))
    with pytest.raises(InputError, match=r"a\.yaml: line 1: not valid YAML: could not determine a constructor"):
        load_recipe(_written(path, "base: !!python/object/apply:os.getcwd []\n"))


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_a_recipe_makes_a_plan_with_its_fingerprint() -> None:
    found = _recipe(base=json.loads(gpt(1).model_dump_json()))
    plan = found.plan(gpt(4))
    assert (plan.fingerprint, plan.lr) == (found.fingerprint, 0.006)


def test_a_target_of_another_architecture_is_refused_with_the_key() -> None:
    found = _recipe(base=json.loads(gpt(1).model_dump_json()))
    with pytest.raises(InputError, match=r"swiglu is False in the recipe's base but True in the target"):
        found.plan(gpt(4, swiglu=True))


def test_an_override_that_matches_nothing_is_an_error() -> None:
    found = _recipe(base=json.loads(gpt(1).model_dump_json()), per_parameter=[{"match": "nothing"}])
    with pytest.raises(InputError, match=r"per_parameter\[0\] 'nothing' matches no parameter"):
        found.plan(gpt(4))


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        _recipe().version = 2  # type: ignore[assignment, misc]
