"""Language models of today: experts, routers, latent attention, multipliers that a model has by itself.

What each tensor gets is written out by hand from the sides that it multiplies; where microsoft/mup has a say, it is
asked. Models are real ones of the library, small.
"""

import copy
import functools
import math
import re
from typing import Any

import mup
import pytest
import torch
import transformers
from support.hf_causal import EXPERTS, MODELS, causal
from support.hf_families import recipe_at
from transformers import PretrainedConfig, PreTrainedModel

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, param_groups, plan_for, verification
from mup_megatron.huggingface.plan import _factory
from mup_megatron.live import hooks
from mup_megatron.modules.shapes import MetaModule
from mup_megatron.theory import Acts, Plan, PlanEntry, Property, Role

BASE, WIDTH = 32, 128
RATIO = WIDTH // BASE
SIGMA, ETA, EPS, LAMBDA = 0.02, 0.01, 1e-6, 0.1
HYPERPARAMETERS = {"lr": ETA, "adam_eps": EPS, "weight_decay": LAMBDA}


def planned(base: PretrainedConfig, target: PretrainedConfig, **content: Any) -> Plan:
    own = content.pop("hyperparameters", {})
    std = getattr(base, "initializer_range", SIGMA)
    given = HYPERPARAMETERS | {"init_method_std": std} | own
    return plan_for(target, recipe_at(base, hyperparameters=given, **content))


@functools.cache
def plan_of(name: str) -> Plan:
    """The plan of a model as it is in `MODELS`, made once: several tests look at it."""
    return plan(name)


def plan(name: str, base: dict[str, Any] | None = None, target: dict[str, Any] | None = None, **content: Any) -> Plan:
    return planned(causal(name, BASE, **base or {}), causal(name, WIDTH, **target or {}), **content)


def live(config: PretrainedConfig, *, seed: int = 3) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, (config.architectures or [""])[0])(copy.deepcopy(config))
    return model.eval()


def got(entry: PlanEntry) -> tuple[Any, ...]:
    return entry.role, entry.width_ratio, entry.lr, entry.eps, entry.weight_decay, entry.multiplier


def near(*values: Any) -> Any:
    role, *numbers = values
    return (role, *(pytest.approx(number, rel=1e-12) for number in numbers))


def hidden(r_in: float, r_out: float, share: float = 1.0) -> Any:
    return near(Role.HIDDEN, r_in, ETA / r_in, EPS / r_out * share, LAMBDA * r_in, 1.0)


FOLDED = near(Role.OUTPUT, RATIO, ETA / RATIO, EPS, LAMBDA * RATIO, 1.0)
"""An output whose multiplier is in its weight."""


def of(found: Plan, pattern: str) -> list[PlanEntry]:
    entries = [entry for entry in found.entries if re.search(pattern, entry.name)]
    assert entries, pattern
    return entries


# ---- every model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_has_each_parameter_and_can_be_applied(name: str) -> None:
    found, model = plan_of(name), live(causal(name, WIDTH))
    assert [(e.name, e.shape) for e in found.entries] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    apply_plan(model, found)
    for entry, parameter in zip(found.entries, model.parameters(), strict=True):
        if entry.init_std is not None:
            rms = parameter.detach().double().square().mean().sqrt().item()
            assert rms == pytest.approx(entry.init_std, rel=5 / (2 * parameter.numel()) ** 0.5 + 1e-3), entry.name
    groups = param_groups(model.named_parameters(), found)
    assert sum(len(group["params"]) for group in groups) == len([p for p in model.parameters() if p.requires_grad])
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_at_the_base_nothing_changes(name: str) -> None:
    config = causal(name, BASE)
    plain, ours = live(config), live(config)
    found = planned(config, config)
    apply_plan(ours, found)
    assert not any(hooks.found(module) for module in ours.modules())
    losses = []
    for model in (plain, ours):
        weights = [p for p in model.parameters() if p.requires_grad]
        vector = {n: found[n].is_vector for n, _ in model.named_parameters()}
        plain_groups = [
            {"params": [p for n, p in model.named_parameters() if p.requires_grad and vector[n] is kind],
             "weight_decay": 0.0 if kind else LAMBDA} for kind in (False, True)
        ]  # fmt: skip
        groups = plain_groups if model is plain else param_groups(model.named_parameters(), found)
        optimizer = torch.optim.AdamW(groups, lr=ETA, eps=EPS)
        for step in range(2):
            ids = (torch.arange(12)[None] * 7 + step) % 64
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert weights
    assert losses[:2] == losses[2:]
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), ours.parameters(), strict=True))


# ---- experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERTS)
def test_each_expert_is_a_hidden_matrix_of_its_own(name: str) -> None:
    config = causal(name, WIDTH)
    found, model = plan_of(name), live(config)
    ffn = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    for entry in of(found, r"experts\.(gate_up|down)_proj$"):
        up = "gate_up" in entry.name
        assert (entry.fan_in, entry.fan_out) == ((WIDTH, 2 * ffn) if up else (ffn, WIDTH)), entry.name
        assert got(entry) == hidden(RATIO, RATIO)
        assert entry.init_std == pytest.approx(found[entry.name].library_std / RATIO**0.5, rel=1e-9)
        assert Property.EXPERT in entry.properties
        # What the library says itself of which side comes first, where it says it.
        transposed = getattr(model.get_submodule(entry.module), "is_transposed", None)
        if transposed is not None:
            assert entry.shape[1:] == ((entry.fan_in, entry.fan_out) if transposed else (entry.fan_out, entry.fan_in))


@pytest.mark.parametrize("name", EXPERTS)
def test_a_router_is_a_folded_output(name: str) -> None:
    found = plan_of(name)
    for entry in of(found, r"(mlp\.gate|router|feed_forward\.router|router\.layer|mlp\.router)\.weight$"):
        assert got(entry) == FOLDED
        assert entry.init_std == pytest.approx(entry.library_std / RATIO, rel=1e-9)
        assert {Property.ROUTER, Property.FOLDED} <= entry.properties


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_router_may_be_hidden(name: str) -> None:
    """Of all that is a router, which the test above sees of each model: alone, beside a shared gate, with a bias."""
    routers = {entry.name for entry in plan_of(name).entries if Property.ROUTER in entry.properties}
    found = plan(name, parametrization={"router": "hidden"})
    assert routers == {entry.name for entry in found.entries if Property.ROUTER in entry.properties}
    assert {found[router].role for router in routers} == {Role.HIDDEN}


def test_the_gate_of_a_shared_expert_is_one_too() -> None:
    found = plan_of("qwen2_moe")
    for entry in of(found, r"shared_expert_gate\.weight$"):
        assert got(entry) == FOLDED
    for entry in of(found, r"shared_expert\.(gate|up|down)_proj\.weight$"):
        assert got(entry) == hidden(RATIO, RATIO)
        assert Property.EXPERT not in entry.properties


def test_experts_of_a_fixed_size() -> None:
    found = plan("qwen3_moe", {"moe_intermediate_size": 24}, {"moe_intermediate_size": 24})
    assert {got(entry) == hidden(RATIO, 1.0) for entry in of(found, r"experts\.gate_up_proj$")} == {True}
    assert {got(entry) == hidden(1.0, RATIO) for entry in of(found, r"experts\.down_proj$")} == {True}


def test_another_number_of_experts_moves_their_eps_alone() -> None:
    same = plan_of("qwen3_moe")
    # 4 experts of which 2 see a token; 16 of which 1 does: an eighth of the share.
    other = plan("qwen3_moe", target={"num_experts": 16, "num_experts_per_tok": 1})
    for one, entry in zip(same.entries, other.entries, strict=True):
        assert (entry.lr, entry.init_std, entry.weight_decay) == (one.lr, one.init_std, one.weight_decay)
        eighth = Property.EXPERT in entry.properties
        assert entry.eps == pytest.approx(one.eps / 8 if eighth else one.eps, rel=1e-12), entry.name
        assert ("tokens" in entry.rule) is eighth
    assert got(of(other, r"mlp\.gate\.weight$")[0]) == FOLDED


def test_biases_of_experts_routers_and_sinks() -> None:
    found = plan_of("gpt_oss")
    for entry in of(found, r"experts\.(gate_up|down)_proj_bias$"):
        assert (entry.role, entry.is_vector, entry.lr, entry.weight_decay) == (Role.INPUT, True, ETA, 0.0)
        assert entry.eps == pytest.approx(EPS / RATIO)
    for entry in of(found, r"router\.bias$"):
        assert (entry.role, entry.is_vector, entry.lr, entry.eps) == (Role.SCALAR, True, ETA, EPS)
    for entry in of(found, r"sinks$"):
        assert (entry.role, entry.is_vector, entry.lr, entry.width_ratio) == (Role.INPUT, True, ETA, 1.0)
        assert entry.init_std == entry.library_std
    for entry in of(plan_of("ernie4_5_moe"), r"e_score_correction_bias$"):
        assert (entry.role, entry.is_vector, entry.lr, entry.eps) == (Role.SCALAR, True, ETA, EPS)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_mup_takes_the_same_sides_of_experts_for_infinite(name: str) -> None:
    """mup's own shapes of the live model: the learning rate of its Adam is η over the ratio of the last infinite side.

    Base and target are wider by one ratio on every side, so that no convention on the order of sides matters.
    """
    with torch.device("meta"):
        models = [
            getattr(transformers, (own.architectures or [""])[0])(own)
            for own in (causal(name, width) for width in (WIDTH, BASE, 3 * BASE))
        ]
    model, small, wider = models
    mup.set_base_shapes(model, small, delta=wider, rescale_params=False, do_assert=False)
    shapes = {n: p.infshape for n, p in model.named_parameters()}
    for entry in of(plan_of(name), r"experts\.(gate_up|down)_proj$|self_attn\.[qo]_proj\.weight$"):
        assert shapes[entry.name].ninf() == 2
        assert entry.lr == pytest.approx(ETA / shapes[entry.name].width_mult(), rel=1e-12)


# ---- latent attention ----------------------------------------------------------------------------------------------

LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32")


@pytest.mark.parametrize("name", LATENT)
def test_latents_of_fixed_rank(name: str) -> None:
    found = plan_of(name)
    for entry in of(found, r"self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.weight$"):
        assert got(entry) == hidden(RATIO, 1.0)
    for entry in of(found, r"self_attn\.(q_b_proj|kv_b_proj)\.weight$"):
        assert got(entry) == hidden(1.0, RATIO)
        assert entry.init_std == entry.library_std
    for entry in of(found, r"self_attn\.(q_a|kv_a)_layernorm\.weight$"):
        assert (entry.role, entry.eps) == (Role.SCALAR, EPS)
    assert not any(entry.multiplier != 1.0 for entry in found.entries if "self_attn" in entry.name)


@pytest.mark.parametrize("name", LATENT)
def test_latents_of_growing_rank(name: str) -> None:
    wide = {"q_lora_rank": 48, "kv_lora_rank": 80}
    found = plan(name, target=wide)
    for entry in of(found, r"self_attn\.(q_b_proj|kv_b_proj)\.weight$"):
        assert got(entry) == hidden(RATIO, RATIO)
    for entry in of(found, r"self_attn\.(q_a|kv_a)_layernorm\.weight$"):
        assert (entry.role, entry.eps) == (Role.INPUT, EPS / RATIO)


@pytest.mark.parametrize(
    ("name", "shallow", "deep"),
    [
        ("deepseek_v32", {}, {}),
        ("llama4_text", {}, {}),
        ("qwen3_moe", {"mlp_only_layers": [0]}, {"mlp_only_layers": [0, 3]}),
    ],
)
def test_a_base_of_fewer_layers_says_less_of_what_its_layers_are(
    name: str, shallow: dict[str, Any], deep: dict[str, Any]
) -> None:
    found = plan(name, base=shallow, target={"num_hidden_layers": 4, **deep})
    alike = plan(name, base=shallow, target=shallow) if shallow else plan_of(name)
    own = {re.sub(r".*layers\.\d+\.", "", entry.name): got(entry) for entry in of(alike, r"layers\.")}
    assert {re.sub(r".*layers\.\d+\.", "", e.name): got(e) for e in of(found, r"layers\.[23]\.")}.items() <= own.items()


def test_sgd_is_refused_where_a_rank_stays() -> None:
    with pytest.raises(InputError, match=r"^model\.layers\.0\.self_attn\.\S+: a bottleneck"):
        plan("deepseek_v3", parametrization={"optimizer": "sgd"})


def test_an_indexer_is_inside_attention_and_gets_no_gradient() -> None:
    """Its scores choose positions, which no factor changes, and no loss of the model's reaches it."""
    found = plan_of("deepseek_v32")
    for entry in of(found, r"indexer\.(wk|weights_proj)\.weight$"):
        assert got(entry) == hidden(RATIO, 1.0)
    model = live(causal("deepseek_v32", BASE))
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "indexer" in n}
    assert gradients
    assert all(grad is None or not grad.any() for grad in gradients.values())


# ---- multipliers of a model's own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_embeddings_that_grow_with_width_are_taken_back(name: str) -> None:
    found = plan(name, hyperparameters={"embedding_multiplier": 3.0})
    entry = found["model.embed_tokens.weight"]
    assert (entry.multiplier, entry.stock_multiplier) == (3.0, pytest.approx(RATIO**0.5, rel=1e-6))
    small, wide = live(causal(name, BASE)), live(causal(name, WIDTH))
    apply_plan(wide, found)
    ids = torch.arange(64)[None]
    base = small.get_input_embeddings()(ids).square().mean().sqrt()
    target = wide.get_input_embeddings()(ids).square().mean().sqrt()
    assert (target / base).item() == pytest.approx(3.0, rel=0.08)


def test_multipliers_in_the_configuration_are_the_bases() -> None:
    found = plan_of("granite")
    model = live(causal("granite", WIDTH))
    assert found.softmax_scale == 0.1
    assert not found.changes_softmax_scale
    apply_plan(model, found)
    assert [name for name, module in model.named_modules() if hooks.found(module)] == ["lm_head"]
    assert hooks.found(model.get_submodule("lm_head")) == [(Acts.INPUT, 1 / RATIO)]
    doubled = plan("granite", hyperparameters={"attention_multiplier": 2.0})
    assert doubled.softmax_scale == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("granite", "embedding_multiplier", 6.0),
        ("granite", "attention_multiplier", 0.2),
        ("granite", "residual_multiplier", 0.4),
        ("granite", "logits_scaling", 16.0),
        ("cohere", "logit_scale", 0.2),
    ],
)
def test_a_multiplier_that_differs_is_refused_by_its_key(name: str, key: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{key} is .* in the recipe's base but {value}") as raised:
        plan(name, target={key: value})
    assert len(str(raised.value)) <= 300


def test_heads_that_grow_where_the_model_scales_queries_itself() -> None:
    """Gemma 2 has the number under the root as a key of its own, which does not follow the size of heads."""
    found = plan("gemma2", target={"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1})
    assert found.softmax_scale == pytest.approx(16**-0.5 * 16 / 64)
    assert math.isclose(found.own_softmax_scale, 16**-0.5)


# ---- what is refused -----------------------------------------------------------------------------------------------


def refused(config: Any, *words: str) -> None:
    """Base and target are of 32 and 64."""
    with pytest.raises(InputError) as raised:
        planned(config(32), config(64))
    message = str(raised.value)
    assert len(message) <= 300, message
    assert all(word in message for word in words), message


def test_hyper_connections_are_refused_by_name() -> None:
    def deepseek(width: int) -> PretrainedConfig:
        return transformers.DeepseekV4Config(
            vocab_size=64, hidden_size=width, moe_intermediate_size=width, num_hidden_layers=1, n_routed_experts=4,
            num_attention_heads=width // 16, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_lora_rank=8,
            o_groups=1, num_experts_per_tok=2, layer_types=["sliding_attention"], mlp_layer_types=["moe"],
            architectures=["DeepseekV4ForCausalLM"],
        )  # fmt: skip

    refused(deepseek, "attn_hc.fn", "which side is fan_in cannot be known")


def test_experts_side_by_side_in_one_matrix_are_refused_by_name() -> None:
    def dbrx(width: int) -> PretrainedConfig:
        return transformers.DbrxConfig(
            vocab_size=64, d_model=width, n_heads=width // 16, n_layers=1, max_seq_len=32,
            attn_config={"kv_n_heads": 1, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
            architectures=["DbrxForCausalLM"],
        )  # fmt: skip

    refused(dbrx, "dbrx")


def test_numbers_of_experts_that_differ_where_nobody_says_how_many_see_a_token() -> None:
    def switch(width: int) -> PretrainedConfig:
        return transformers.SwitchTransformersConfig(
            vocab_size=64, d_model=width, d_ff=width, num_heads=width // 16, num_layers=2, num_sparse_encoder_layers=1,
            num_experts=width // 16, architectures=["SwitchTransformersForConditionalGeneration"],
        )  # fmt: skip

    refused(switch, "num_experts is 2 in the recipe's base but 4")


# ---- layers that are alike -----------------------------------------------------------------------------------------


def test_layers_that_are_alike_are_looked_at_once_and_others_are_not_passed_over() -> None:
    config = causal("gemma2", BASE, num_hidden_layers=5, layer_types=["full_attention"] * 5)

    def scales(**changed: float) -> list[float | None]:
        built = MetaModule.of(_factory(transformers.Gemma2ForCausalLM, config), keeps=True)
        for layer, scale in changed.items():
            built.module.get_submodule(f"model.layers.{layer.removeprefix('at_')}.self_attn").scaling = scale
        return [found.scale for found in verification.forward_of(built).softmaxes]

    # The first one's input is the embedding's, which has a factor that no other's has.
    assert scales() == pytest.approx([0.25, 0.25])
    assert scales(at_3=7.0) == pytest.approx([0.25, 0.25, 7.0])
