"""Depth of Hugging Face models: where branches are, what they are multiplied by, and which models are refused."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from support.hf_families import FAMILIES, config, recipe_at
from support.hf_models import batch, built
from transformers import PretrainedConfig

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, plan_for
from mup_megatron.recipe import Depth, Recipe
from mup_megatron.theory import BRANCH, Plan, fold_branches

BASE, TARGET = 64, 128
PRE_NORM = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "opt", "vit", "t5")


def tuned(own: PretrainedConfig, alpha: float | None = 1.0, **values: float) -> Recipe:
    recipe = recipe_at(own, hyperparameters=values)
    depth = None if alpha is None else Depth(alpha=alpha)
    return recipe.model_copy(update={"parametrization": recipe.parametrization.model_copy(update={"depth": depth})})


def factors(plan: Plan) -> dict[str, tuple[float, float]]:
    sites = [plan.site(place) for place in plan.places if place.carries == BRANCH]
    return {site.module: (site.factor, site.stock) for site in sites}


def stacks(model: torch.nn.Module) -> Iterator[torch.nn.ModuleList]:
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == 4:
            yield module


SEVERAL = [
    pytest.param(each, marks=pytest.mark.slow if each in {"mistral", "qwen2", "qwen3"} else ()) for each in PRE_NORM
]
"""Their branches are known by Llama's line; that they are there, and multiplied, is always looked at."""


@functools.cache
def deeper_plan(family: str) -> Plan:
    """Of twice the base's width and depth, with a tuned multiplier."""
    base, target = config(family, BASE, n=2), config(family, TARGET, n=4)
    return plan_for(built(family, target), tuned(base, 0.5, residual_multiplier=0.5))


@pytest.mark.parametrize("family", PRE_NORM)
def test_every_branch_is_multiplied(family: str) -> None:
    """With a factor of next to nothing layers give what they take."""
    base, target = config(family, BASE, n=2), config(family, TARGET, n=4)
    plan = plan_for(built(family, target), tuned(base, residual_multiplier=1e-12))
    assert {factor for factor, _ in factors(plan).values()} == {5e-13}
    model = built(family, target).eval()
    apply_plan(model, plan)
    moved = []
    for layers in stacks(model):
        for layer in layers:

            def compare(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
                before = args[0] if args else kwargs["hidden_states"]
                after = output[0] if isinstance(output, tuple) else output
                moved.append(float((after - before).abs().max()))

            layer.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        model(**batch(family))
    assert len(moved) == (8 if family == "t5" else 4)
    assert max(moved) < 1e-6


@pytest.mark.parametrize("family", SEVERAL)
def test_what_layers_get(family: str) -> None:
    base, target = config(family, BASE, n=2), config(family, TARGET, n=4)
    plans = [deeper_plan(family), plan_for(built(family, target), tuned(base, None))]
    inside = outside = 0
    for entry in plans[0].entries:
        other = plans[1][entry.name]
        in_layer = bool(entry.stack) and "relative_attention_bias" not in entry.name
        inside, outside = inside + in_layer, outside + (not in_layer)
        lr = 2**-0.5 if in_layer else 1.0
        assert entry.lr == pytest.approx(lr * other.lr, rel=1e-12), entry.name
        assert entry.eps == pytest.approx(lr * other.eps, rel=1e-12), entry.name
        assert entry.weight_decay == pytest.approx(other.weight_decay / lr, rel=1e-12), entry.name
        if entry.init_std is not None:
            # The library's own 1/√(2L) is for the base's L.
            own = math.sqrt(2) if family == "gpt2" and entry.name.endswith("c_proj.weight") else 1.0
            assert entry.init_std == pytest.approx(own * other.init_std, rel=1e-12), entry.name
    assert inside > 20
    assert outside >= 3
    assert {each.ratio for each in plans[0].deepened.values()} == {2.0}


@pytest.mark.parametrize("layers", [(1, 2), (2, 1)])
def test_a_table_that_one_layer_has_is_in_no_branch(layers: tuple[int, int]) -> None:
    """T5's relative positions, which the first layer holds for all: in a stack of one layer it looks as if each had."""
    base, target = (config("t5", width, n=n) for width, n in zip((BASE, TARGET), layers, strict=True))
    plan = plan_for(built("t5", target), tuned(base, 0.5))
    ratios = {"relative_attention_bias" in e.name: e.depth_ratio for e in plan.entries if ".block.0." in e.name}
    assert ratios == {True: 1.0, False: layers[1] / layers[0]}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_base_is_the_librarys(family: str) -> None:
    own = config(family, BASE, n=2)
    ones = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), 1.0)
    plan = plan_for(built(family, own), tuned(own, init_method_std=0.02, **ones))
    models = [built(family, own) for _ in range(2)]
    apply_plan(models[0], plan)
    with torch.no_grad():
        assert models[0](**batch(family)).loss.equal(models[1](**batch(family)).loss)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in models[0].modules())


@pytest.mark.parametrize("family", SEVERAL)
def test_a_fold_is_exact(family: str) -> None:
    """For export: what writes into the stream has the factor, weight and bias, and the library computes alike."""
    plan, target = deeper_plan(family), config(family, TARGET, n=4)
    explicit, exported = (built(family, target, dtype=torch.float64).eval() for _ in range(2))
    for model in (explicit, exported):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02)
    apply_plan(explicit, plan, initialize="keep")
    folded = fold_branches(plan)
    with torch.no_grad():
        for name, parameter in exported.named_parameters():
            parameter.mul_(folded[name].folded)
    apply_plan(exported, folded, initialize="keep")
    assert not [1 for factor, stock in factors(folded).values() if factor != stock]
    with torch.no_grad():
        one, other = (model(**batch(family)).loss for model in (explicit, exported))
    assert one.item() == pytest.approx(other.item(), abs=1e-12)


# ---- multipliers of the library's own ------------------------------------------------------------------------------


def _own(kind: str, width: int, layers: int, **changes: Any) -> PretrainedConfig:
    common = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "max_position_embeddings": 32,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    own: PretrainedConfig = transformers.AutoConfig.for_model(kind, **common | changes)
    own.architectures = {"granite": ["GraniteForCausalLM"], "minicpm3": ["MiniCPM3ForCausalLM"]}.get(kind)
    return own


def test_granites_own_multiplier_stays_and_the_plans_is_relative_to_it() -> None:
    base, target = (_own("granite", width, layers, residual_multiplier=0.22) for width, layers in ((64, 2), (128, 8)))
    plan = plan_for(target, tuned(base))
    assert set(factors(plan).values()) == {(0.25, 1.0)}
    model = transformers.GraniteForCausalLM(target)
    apply_plan(model, plan)
    assert model.model.layers[0].residual_multiplier == 0.22
    assert [len(layer.self_attn.o_proj._forward_hooks) for layer in model.model.layers] == [1] * 8


def test_granites_that_differ_in_it_are_refused() -> None:
    with pytest.raises(InputError, match=r"residual_multiplier is 0\.22 .* but 0\.1 in the target"):
        plan_for(
            _own("granite", 128, 4, residual_multiplier=0.1), tuned(_own("granite", 64, 2, residual_multiplier=0.22))
        )


MINICPM = {
    "num_key_value_heads": 4,
    "num_attention_heads": 4,
    "scale_depth": 1.4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


def test_what_minicpm_does_by_itself_is_not_done_again() -> None:
    """Its code multiplies by scale_depth/√L, which is this rule with α = ½: nothing is left to do; of α = 1 a half."""
    base, target = (_own("minicpm3", 64, layers, **MINICPM) for layers in (2, 8))
    half, whole = (plan_for(target, tuned(base, alpha)) for alpha in (0.5, 1.0))
    assert set(factors(half).values()) == {(0.5, 0.5)}
    assert set(factors(whole).values()) == {(0.25, 0.5)}
    assert set(factors(plan_for(target, tuned(base, None, residual_multiplier=3.0))).values()) == {(3.0, 1.0)}


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"alpha": 1.0}, {"alpha": None, "residual_multiplier": 2.0}])
@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_other_families_are_refused_by_name(family: str, rule: dict[str, Any]) -> None:
    own = config(family, BASE)
    with pytest.raises(InputError, match=f"model type {family}: its residual branches are not known"):
        plan_for(FAMILIES[family][0](config(family, TARGET)), tuned(own, **rule))


def test_layers_that_norm_behind_their_branches_are_refused() -> None:
    own = config("opt", BASE, do_layer_norm_before=False)
    with pytest.raises(InputError, match="norm behind each branch"):
        plan_for(built("opt", config("opt", TARGET, do_layer_norm_before=False)), tuned(own))
