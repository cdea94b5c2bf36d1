"""The guard on latent attention and multi-token prediction: what is measured there, and mistakes by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from support import planned
from support.processes import run_ranks
from support.shapes import gpt, hybrid
from support.stock import Layout, Run

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import Recipe

MODEL: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "v_head_dim": 6,
    "qk_layernorm": True,
    "rotary_scaling_factor": 40.0,
    "mscale_all_dim": 1.0,
    "mtp_num_layers": 1,
    "position_embedding_type": "none",
    "untie_embeddings_and_output_weights": True,
}
BASE = gpt(1, **MODEL, qk_head_dim=6, qk_pos_emb_head_dim=4)
TARGET = gpt(2, **MODEL, qk_head_dim=12, qk_pos_emb_head_dim=8)
RECIPE = planned.recipe(BASE, attention_multiplier=2.0)
YARN = (0.1 * math.log(40.0) + 1.0) ** 2
SCALE = 2.0 * YARN * math.sqrt(10) / 20
"""α · mscale² · √d₀/d, and what Megatron's latent attention sets by itself at these sizes."""
STOCK = YARN / math.sqrt(20)
INNER = "mtp.layers.0.transformer_layer"
"""In the layer of multi-token prediction, as the plan calls it."""


def _attentions(run: Run) -> list[Any]:
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    return [part for part in run.chunks[0].modules() if isinstance(part, MLASelfAttention)]


def _stock_scale(run: Run) -> None:
    for attention in _attentions(run):
        attention.softmax_scale = attention.core_attention.softmax_scale = STOCK


def _stock_scale_in_the_last(run: Run) -> None:
    _attentions(run)[-1].core_attention.softmax_scale = STOCK


def _ignored_scale(run: Run) -> None:
    core = _attentions(run)[0].core_attention
    forward = core.forward

    def with_stock(query: Any, *rest: Any, **more: Any) -> Any:
        return forward(query * (STOCK / SCALE), *rest, **more)

    core.forward = with_stock


def _stock_scale_for_inference(run: Run) -> None:
    _attentions(run)[1].softmax_scale = STOCK


def _no_multiplier(run: Run) -> None:
    run.chunks[0].module.output_layer._forward_pre_hooks.clear()


def _up_projection_as_wide(run: Run) -> None:
    for group in run.optimizer.param_groups:
        if any(tuple(p.shape) == (160, 16) for p in group["params"]):
            group["max_lr"] /= 2


MISTAKES: dict[str, tuple[Callable[[Run], None] | None, tuple[str, ...]]] = {
    "none": (None, ()),
    "scale left as it was": (
        _stock_scale,
        (
            f"decoder.layers.0.self_attention.core_attention (and 1 more layer): softmax scale should be {SCALE:.6g}",
            f"{INNER}.self_attention.core_attention: softmax scale should be {SCALE:.6g} and is {STOCK:.6g}",
        ),
    ),
    "in multi-token prediction alone": (
        _stock_scale_in_the_last,
        (f"{INNER}.self_attention.core_attention: softmax scale",),
    ),
    "set and ignored": (_ignored_scale, ("has the right softmax_scale and computes with another",)),
    "left for inference": (
        _stock_scale_for_inference,
        ("decoder.layers.1.self_attention: softmax scale of dynamic inference",),
    ),
    "readout": (_no_multiplier, ("output_layer: multiplier",)),
    "up projection as if its rank had grown": (
        _up_projection_as_wide,
        ("linear_q_up_proj.weight", f"{INNER}.self_attention.linear_q_up_proj.weight"),
    ),
}


IN_A_PATTERN: dict[str, tuple[str, ...]] = {
    "none": (),
    "in multi-token prediction alone": (
        "mtp.layers.0.mtp_model_layer.layers.0.self_attention.core_attention: softmax scale",
    ),
    "set and ignored": (
        "decoder.layers.0.self_attention.core_attention: softmax scale",
        "has the right softmax_scale and computes with another",
    ),
}
"""Some of them in the equal hybrid model, whose latents have no norms."""


def _said() -> tuple[dict[str, str | None], list[float | None], dict[str, str | None]]:
    base, target = (hybrid(model, "+-+-/+-", qk_layernorm=False) for model in (BASE, TARGET))
    in_a_pattern = RECIPE.model_copy(update={"base": base})
    known = core_version() >= (0, 19, 0)
    return *_said_of(RECIPE, TARGET, [*MISTAKES]), _said_of(in_a_pattern, target, [*IN_A_PATTERN])[0] if known else {}


def _said_of(recipe: Recipe, target: ModelFile, cases: list[str]) -> tuple[dict[str, str | None], list[float | None]]:
    from mup_megatron.megatron.guard import require_as_planned
    from mup_megatron.megatron.guard.forward import _measured

    plan = recipe.plan(target)
    said: dict[str, str | None] = {}
    for case in cases:
        mistake, _ = MISTAKES[case]
        run = planned.prepare(recipe, target, Layout())
        if mistake is None:
            measured = [_measured(part.core_attention, part, plan.softmax_scale) for part in _attentions(run)]
        else:
            mistake(run)
        try:
            require_as_planned(run.chunks, plan, run.optimizer, run.scheduler, weights=True)
            said[case] = None
        except InputError as error:
            said[case] = str(error)
    return said, measured


@pytest.fixture(scope="module")
def said() -> tuple[dict[str, str | None], list[float | None], dict[str, str | None]]:
    [found] = run_ranks(_said, 1)
    return found


def test_the_scale_is_measured_where_values_have_heads_of_another_size(said: Any) -> None:
    assert RECIPE.plan(TARGET).softmax_scale == pytest.approx(SCALE)
    assert said[1] == [pytest.approx(SCALE, rel=1e-5)] * 3


@pytest.mark.parametrize("case", MISTAKES)
def test_each_mistake_is_named(case: str, said: Any) -> None:
    words = MISTAKES[case][1]
    if not words:
        assert said[0][case] is None
    else:
        assert said[0][case] is not None
        assert all(word in said[0][case] for word in words), said[0][case]


@pytest.mark.parametrize("case", IN_A_PATTERN)
def test_it_is_in_a_hybrid_pattern_too(case: str, said: Any) -> None:
    if not said[2]:
        pytest.skip("megatron-core 0.16 has no latent attention in a pattern")
    if not IN_A_PATTERN[case]:
        assert said[2][case] is None
    else:
        assert said[2][case] is not None
        assert all(word in said[2][case] for word in IN_A_PATTERN[case]), said[2][case]
