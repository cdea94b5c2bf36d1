"""Fingerprints never change with a release: those of before are pinned, and a key that is added does not count."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import Hyperparameters, PerParameter, Recipe, load_recipe, recipe
from mup_megatron.validation import Strict, added, plain
from mup_megatron.yaml_io import parse_yaml

ROOT = Path(__file__).parents[1]
SHIPPED = {
    "configs/recipes/cerebras_gpt.recipe.yaml": "2e29d36c55ae523d3e06fd982facbe82642864f4b133e8f0d2edee2e3fb694af",
    "configs/recipes/crystalcoder.recipe.yaml": "853b8b3d0ed1c2ce201d256ba395677f8200032f88f0aa2f25cc615e4a6eda91",
    "configs/recipes/granite_3.0.recipe.yaml": "e9097ca2dbf111ab753910c4b1cea0172ec1a25c576a33eac6c360d4efe14896",
    "configs/recipes/minicpm.recipe.yaml": "7dd37337079a711241b13e9386a0d6919f1689696975296fae07a65f3250451f",
    "configs/recipes/gpt3_6.7b.recipe.yaml": "05420e49e97428a6785cfc0b4f51cc190f06b7351606c83a0a609c3f2911c7d0",
    "examples/deepspeed_gpt2/gpt2.recipe.yaml": "43a4161ce98290e867af690c55a482ab2d5e495fbc299200408bd8025dc00bc8",
    "examples/trainer_llama/llama.recipe.yaml": "2bb9374b19ce749ae77d14a464b75d9fda14c47fadd5756ac1f3ba13a2a8161f",
}

BASE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "seq_length": 16}
LLAMA = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "kv_channels": 32,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 704,
    "swiglu": True,
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": True,
    "transformer_impl": "local",
    "vocab_size": 32000,
    "seq_length": 2048,
}
TUNED = {
    "lr": 0.003,
    "embedding_multiplier": 10.0,
    "output_multiplier": 0.5,
    "attention_multiplier": 2.0,
    "adam_beta2": 0.95,
    "adam_eps": 1e-9,
    "weight_decay": 0.1,
    "init_method_std": 0.05,
}
SCHEDULE = {
    "lr_decay_style": "WSD",
    "lr_warmup_fraction": 0.01,
    "lr_wsd_decay_fraction": 0.2,
    "lr_wsd_decay_style": "linear",
}
OVERRIDES = [
    {"match": "embedding.*", "lr_mult": 0.5},
    {"match": "*.linear_fc1.weight", "init_mult": 0.0, "multiplier": 2.0},
]
PARAMETERS = {
    "0.weight": {"shape": [8, 4], "grows": [True, False], "init_std": 0.25},
    "0.bias": {"shape": [8], "grows": [True], "init_value": 0.0},
}
PINNED: dict[str, tuple[dict[str, Any], str]] = {
    "every default": (
        {"base": BASE, "hyperparameters": {"lr": 0.006}},
        "e6170e0f80ae4e79788b35c3d4620c978480f7a7b4d4ebc322eefcc5781214fa",
    ),
    "sgd": (
        {
            "base": BASE,
            "hyperparameters": {"lr": 0.006, "min_lr": 0.001, "sgd_momentum": 0.8, "clip_grad": 0.5},
            "parametrization": {"optimizer": "sgd", "rule": "standard", "weight_decay_exponent": 0.5},
        },
        "0416479b2f3c794dd8fb18c45a0a2f13f483cc25d2eb4d144a8a9d466d44ebe0",
    ),
    "nothing at its default": (
        {"base": LLAMA, "hyperparameters": TUNED, "schedule": SCHEDULE, "per_parameter": OVERRIDES},
        "146bdb08295cd6f94563f18a99b8920bed086d6acfda5d5c99fce94adaa64bf4",
    ),
    "a Hugging Face base": (
        {
            "base": {
                "model_type": "gpt2",
                "n_embd": 64,
                "n_head": 4,
                "vocab_size": 100,
                "architectures": ["GPT2LMHeadModel"],
            },
            "hyperparameters": {"lr": 0.006},
        },
        "38ba402c65c4a9508185a2623d0aee643f91fd8c72ab9ea022ef465de16060cf",
    ),
    "a base of torch modules": (
        {
            "base": {"parameters": PARAMETERS, "head_size": 8, "softmax_scale": 0.5},
            "hyperparameters": {"lr": 0.006},
        },
        "061f45a28b070b82e1eb7ac7c9a6403968e46bf31f211b311cb0b29af6c8b12f",
    ),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_keeps_its_fingerprint(name: str) -> None:
    assert load_recipe(ROOT / name).fingerprint == SHIPPED[name]


def test_every_shipped_recipe_is_pinned() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for at in ("configs", "examples")
        for path in ROOT.glob(f"{at}/**/*.recipe.yaml")
    }
    assert found == set(SHIPPED)


@pytest.mark.parametrize("case", PINNED)
def test_a_recipe_keeps_its_fingerprint(case: str) -> None:
    content, fingerprint = PINNED[case]
    assert recipe(content, source="a.recipe.yaml").fingerprint == fingerprint


# ---- as a later release would have it ------------------------------------------------------------------------------


class Stretch(Strict):
    tokens: float = 1.0
    batch: int | None = added("0.4", None)


class LaterModel(ModelFile):
    window: int | None = added("0.2", None)


class LaterOverride(PerParameter):
    eps_mult: float = added("0.3", 1.0)


class LaterHyperparameters(Hyperparameters):
    residual_multiplier: float = added("0.2", 1.0)


class LaterRecipe(Recipe):
    base: LaterModel
    hyperparameters: LaterHyperparameters
    per_parameter: tuple[LaterOverride, ...] = Field(default=(), strict=False)
    stretch: Stretch | None = added("0.3", None)


CONTENT, FINGERPRINT = PINNED["nothing at its default"]
NEW: dict[str, dict[str, Any]] = {
    "in the base": {"base": LLAMA | {"window": 7}},
    "among hyperparameters": {"hyperparameters": TUNED | {"residual_multiplier": 2.0}},
    "in an override": {"per_parameter": [OVERRIDES[0] | {"eps_mult": 2.0}, OVERRIDES[1]]},
    "a section": {"stretch": {}},
    "in a section that is later itself": {"stretch": {"batch": 3}},
}
AT_DEFAULT: dict[str, dict[str, Any]] = {
    "not said": {},
    "in the base": {"base": LLAMA | {"window": None}},
    "among hyperparameters": {"hyperparameters": TUNED | {"residual_multiplier": 1.0}},
    "in an override": {"per_parameter": [OVERRIDES[0] | {"eps_mult": 1.0}, OVERRIDES[1]]},
    "a section": {"stretch": None},
}


@pytest.mark.parametrize("case", AT_DEFAULT)
def test_a_later_key_at_its_default_does_not_count(case: str) -> None:
    later = LaterRecipe.model_validate(CONTENT | AT_DEFAULT[case])
    assert later.fingerprint == FINGERPRINT
    # What is written is read by the release before, too.
    assert recipe(parse_yaml(later.to_yaml(), source="R"), source="R").fingerprint == FINGERPRINT


def test_a_later_key_at_another_value_counts_wherever_it_stands() -> None:
    found = {case: LaterRecipe.model_validate(CONTENT | new) for case, new in NEW.items()}
    assert len({FINGERPRINT, *(each.fingerprint for each in found.values())}) == len(NEW) + 1
    for case, each in found.items():
        assert LaterRecipe.model_validate(parse_yaml(each.to_yaml(), source="R")) == each, case


def test_a_section_that_is_later_itself_has_its_first_defaults() -> None:
    later = LaterRecipe.model_validate(CONTENT | {"stretch": {"batch": None}})
    assert plain(later)["stretch"] == {"tokens": 1.0}
    assert plain(LaterRecipe.model_validate(CONTENT | NEW["in a section that is later itself"]))["stretch"] == {
        "tokens": 1.0,
        "batch": 3,
    }


def test_a_model_file_of_another_architecture_is_asked_for_its_own_keys() -> None:
    """Where a field says `ModelFile` and holds one that has more."""
    hyperparameters = Hyperparameters(lr=0.006)
    first = Recipe(base=ModelFile(**BASE), hyperparameters=hyperparameters)
    assert Recipe(base=LaterModel(**BASE), hyperparameters=hyperparameters).fingerprint == first.fingerprint
    other = Recipe(base=LaterModel(**BASE, window=7), hyperparameters=hyperparameters)
    assert other.fingerprint != first.fingerprint
    assert plain(other)["base"]["window"] == 7


def test_defaults_of_the_first_format_do_count() -> None:
    content = plain(recipe(PINNED["every default"][0], source="R"))
    assert content["hyperparameters"]["adam_beta1"] == 0.9
    counted = {key: value for key, value in content.items() if key not in ("training", "provenance")}
    text = json.dumps(counted, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == PINNED["every default"][1]
