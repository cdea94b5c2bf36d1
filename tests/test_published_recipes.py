"""Recipes that others published: the plan of each of their models has the numbers that its authors state for it."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mup_megatron.architectures.registry import model_file
from mup_megatron.recipe import Recipe, load_recipe
from mup_megatron.theory import BRANCH, Plan

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
EMBEDDING = "embedding.word_embeddings.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.0.self_attention.linear_proj.weight"
FC1, FC2 = (f"decoder.layers.0.mlp.linear_{each}.weight" for each in ("fc1", "fc2"))
GAIN = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class Published:
    """What its authors state of one model."""

    recipe: str
    sizes: dict[str, Any]
    softmax_scale: float
    logits: float
    """By which logits are multiplied."""
    init_std: dict[str, float]
    lr: dict[str, float]
    embedding: float
    branches: float = 1.0
    off: dict[str, float] = field(default_factory=dict)
    """Tensor → by which factor the rules' learning rate differs, as the recipe says; the std by the root of it."""


def cerebras(width: int, layers: int, heads: int) -> Published:
    ratio = width / 256
    inner, outer = 0.08 / math.sqrt(ratio), 0.08 / math.sqrt(ratio * 2 * layers)
    return Published(
        "cerebras_gpt",
        {"hidden_size": width, "num_layers": layers, "num_attention_heads": heads},
        softmax_scale=heads / width,
        logits=1 / ratio,
        init_std={EMBEDDING: 0.08, QKV: inner, FC1: inner, PROJ: outer, FC2: outer},
        lr={EMBEDDING: 0.006, GAIN: 0.006, **dict.fromkeys((QKV, PROJ, FC1, FC2), 0.006 / ratio)},
        embedding=10.0,
    )


def granite(width: int, ffn: int, logits_scaling: float, attention: float, **off: float) -> Published:
    hidden = (QKV, PROJ, FC1, FC2)
    return Published(
        "granite_3.0",
        {"hidden_size": width, "ffn_hidden_size": ffn, "num_attention_heads": 32, "num_query_groups": 8},
        softmax_scale=attention,
        logits=1 / logits_scaling,
        init_std={EMBEDDING: 0.1, **dict.fromkeys(hidden, 0.1 / math.sqrt(width / 256))},
        lr={EMBEDDING: 0.02, GAIN: 0.02, **dict.fromkeys(hidden, 0.02 / (width / 256))},
        embedding=12.0,
        branches=0.22,
        off={FC2: off["fc2"]} if off else {},
    )


def minicpm(width: int, layers: int, heads: int, depth: float = 1.0, **sizes: Any) -> Published:
    hidden = (QKV, PROJ, FC1, FC2)
    return Published(
        "minicpm",
        {
            "hidden_size": width, "ffn_hidden_size": width * 5 // 2, "num_layers": layers,
            "num_attention_heads": heads, **sizes,
        },
        softmax_scale=1 / 8,
        logits=256 / width,
        init_std={EMBEDDING: 0.1, **dict.fromkeys(hidden, 0.1 / math.sqrt(width / 256))},
        lr={EMBEDDING: 0.01, GAIN: 0.01, **dict.fromkeys(hidden, 0.01 / (width / 256))},
        embedding=12.0,
        branches=1.4 / math.sqrt(layers),
        off=dict.fromkeys(hidden, depth) if depth != 1.0 else {},
    )  # fmt: skip


CRYSTALCODER = Published(
    "crystalcoder",
    {"hidden_size": 4096, "ffn_hidden_size": 10922, "num_attention_heads": 32},
    softmax_scale=1 / 128,
    logits=0.13875,
    init_std={EMBEDDING: 0.073, QKV: 0.01825, FC1: 0.01825, PROJ: 0.00228125, FC2: 0.00228125},
    lr={EMBEDDING: 0.012, GAIN: 0.012, **dict.fromkeys((QKV, PROJ, FC1, FC2), 0.012 * 0.0625)},
    embedding=14.6,
    off={FC2: 683 * 16 / 10922},
)
MODELS = {
    "Cerebras-GPT 40M, the proxy": cerebras(256, 24, 4),
    "Cerebras-GPT 111M": cerebras(768, 10, 12),
    "Cerebras-GPT 256M": cerebras(1088, 14, 17),
    "Cerebras-GPT 590M": cerebras(1536, 18, 12),
    "Cerebras-GPT 1.3B": cerebras(2048, 24, 16),
    "Cerebras-GPT 2.7B": cerebras(2560, 32, 32),
    "CrystalCoder 7B": CRYSTALCODER,
    "Granite 3.0 2B": granite(2048, 8192, 8.0, 0.015625),
    "Granite 3.0 8B": granite(4096, 12800, 16.0, 0.0078125, fc2=16 / 12.5),
    "MiniCPM 2B": minicpm(2304, 40, 36),
    "MiniCPM 1B": minicpm(1536, 52, 24, math.sqrt(40 / 52), group_query_attention=True, num_query_groups=8),
}


def planned(published: Published) -> tuple[Recipe, Plan]:
    recipe = load_recipe(RECIPES / f"{published.recipe}.recipe.yaml")
    base = recipe.megatron_base.model_dump(exclude_unset=True)
    return recipe, recipe.plan(model_file({**base, **published.sizes}, source=published.recipe))


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_has_what_its_authors_state(name: str) -> None:
    published = MODELS[name]
    recipe, plan = planned(published)
    exactly = {"rel": 1e-12, "abs": 0.0}
    for tensor, expected in published.lr.items():
        assert plan[tensor].lr == pytest.approx(expected * published.off.get(tensor, 1.0), **exactly), tensor
    for tensor, expected in published.init_std.items():
        # Width has the same ratio in both; depth is in the learning rate alone.
        off = 1.0 if recipe.parametrization.depth else math.sqrt(published.off.get(tensor, 1.0))
        assert plan[tensor].init_std == pytest.approx(expected * off, **exactly), tensor
    assert plan.softmax_scale == pytest.approx(published.softmax_scale, **exactly)
    assert plan.output_multiplier == pytest.approx(published.logits, **exactly)
    assert plan[EMBEDDING].multiplier == published.embedding
    branches = {plan.site(place).factor for place in plan.places if place.carries == BRANCH}
    assert all(factor == pytest.approx(published.branches, **exactly) for factor in branches or {1.0})


def test_every_recipe_says_where_it_is_from() -> None:
    for path in RECIPES.glob("*.recipe.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path
        assert load_recipe(path).provenance["source"], path
        assert f"`{path.name}`" in (RECIPES / "README.md").read_text(encoding="utf-8")
