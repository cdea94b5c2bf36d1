"""Latent attention and multi-token prediction: what is stated of them against the live model, and what each gets."""

import math
import re
from typing import Any

import pytest
import torch
from support import exact, planned
from support.exact import constant, logits, megatron_gpt
from support.plain_gpt import PlainGPT
from support.processes import run_ranks
from support.shapes import batch, gpt, recipe_for
from support.stock import Layout

from mup_megatron.architectures.cost import parameter_count, training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.proxy import Search, choose_proxy
from mup_megatron.architectures.registry import architecture_of, model_file, shapes_of
from mup_megatron.errors import InputError
from mup_megatron.live.compare import Remedies, parameter_problems
from mup_megatron.megatron.arguments.convert import flags, model_from_flags
from mup_megatron.theory import Plan, Property, Role

LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "kv_lora_rank": 12,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "kv_channels": None,
    "position_embedding_type": "none",
}
COMPRESSED = {**LATENT, "q_lora_rank": 16, "qk_layernorm": True}
YARN = {"rotary_scaling_factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0}
MODELS: dict[str, dict[str, Any]] = {
    "queries at once": LATENT,
    "compressed queries": {**LATENT, "q_lora_rank": 16},
    "norms on latents": COMPRESSED,
    "YaRN, RMSNorm, gated, untied, no biases": {
        **COMPRESSED,
        **YARN,
        "normalization": "RMSNorm",
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "add_bias_linear": False,
    },
    "ordinary rotary embeddings, absolute positions": {
        **COMPRESSED,
        "rope_type": "rope",
        "position_embedding_type": "learned_absolute",
    },
    "multi-token prediction": {"mtp_num_layers": 2, "position_embedding_type": "rope"},
    "both, untied, RMSNorm": {
        **COMPRESSED,
        **YARN,
        "mtp_num_layers": 1,
        "normalization": "RMSNorm",
        "untie_embeddings_and_output_weights": True,
    },
}
LAYOUTS = {"TP1": Layout(), "TP2": Layout(tp=2), "PP2": Layout(pp=2)}


# ---- against the live model ----------------------------------------------------------------------------------------


def saved_shapes(models: list[ModelFile], layout: Layout) -> list[dict[str, tuple[int, ...]]]:
    """In a rank: name → shape of what it would save, which no code of the package has a part in."""
    found = []
    for model in models:
        _, _, chunks = planned.built(model, layout)
        found.append({key: shape for key, shape, _, _ in planned.pieces(chunks)})
    return found


def _stated(model: ModelFile, layout: Layout) -> dict[str, tuple[int, ...]]:
    """As in a checkpoint, where the layers of a GPT's stack are one tensor and a gated layer is in two parts."""
    stated = {}
    for tensor in shapes_of(model, model)[1].tensors:
        shape = tensor.shape
        if tensor.padded_to is not None:
            shape = (model.padded_vocab_size(layout.tp), *shape[1:])
        name, layers = re.subn(r"^decoder\.layers\.\d+\.", "decoder.layers.", tensor.name)
        stated[name] = (model.num_layers, *shape) if layers else shape
    return stated


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_are_those_of_the_live_model(layout: str) -> None:
    how, models = LAYOUTS[layout], [gpt(**changes) for changes in MODELS.values()]
    # Megatron cannot save tied embeddings with multi-token prediction on several stages.
    models = [model for model in models if not (how.pp > 1 and model.tied and model.mtp_num_layers)]
    ranks = run_ranks(saved_shapes, how.world_size, models, how)
    for index, model in enumerate(models):
        live = {name: shape for rank in ranks for name, shape in rank[index].items()}
        mapped = {} if model.multi_latent_attention else _NAMES_OF_TE
        stated = {}
        for name, shape in _stated(model, how).items():
            for own, saved in mapped.items():
                name = name.replace(own, saved)
            stated[name] = shape
        assert live == stated


_NAMES_OF_TE = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
"""Those that Megatron's local layers of ordinary attention have in checkpoints."""


def logits_and_losses(models: dict[str, ModelFile]) -> dict[str, Any]:
    """In a rank: each model's logits, and gradients of its loss, by Megatron-Core and by the plain model."""
    found = {}
    for case, model in models.items():
        ones = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), 1.0)
        plain = PlainGPT(model)
        torch.manual_seed(0)
        weights = {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in plain.named_parameters()}
        exact.load(plain, weights)
        run = megatron_gpt(constant(recipe_for(model, **ones).plan(model)), model, weights)
        tokens, labels = batch(model, 0)
        with torch.no_grad():
            both = (logits(run.chunks[0], tokens), plain(tokens))
        plain.loss({"tokens": tokens, "labels": labels}).backward()
        found[case] = (both, _gradients(run, tokens, labels), {n: p.grad for n, p in plain.named_parameters()})
    return found


def _gradients(run: Any, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    from mup_megatron.megatron.names import named_parameters

    [model] = run.chunks
    model.zero_grad_buffer()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    model(tokens, positions, None, labels=labels, loss_mask=torch.ones(labels.shape)).mean().backward()
    return {name: p.main_grad.clone() for name, p in named_parameters([model], tied=False)}


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    [found] = run_ranks(logits_and_losses, 1, {case: gpt(1, **changes) for case, changes in MODELS.items()})
    return found


@pytest.mark.parametrize("case", MODELS)
def test_the_plain_model_is_megatrons(case: str, compared: dict[str, Any]) -> None:
    """Logits in double precision; gradients through Megatron's loss, which goes through single precision."""
    (megatron, plain), gradients, expected = compared[case]
    assert megatron.dtype == torch.float64
    torch.testing.assert_close(megatron, plain, rtol=0, atol=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient.double(), expected[name], rtol=1e-3, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


# ---- what each tensor gets -----------------------------------------------------------------------------------------


def _plan(base: dict[str, Any], target: dict[str, Any], **tuned: Any) -> Plan:
    return recipe_for(gpt(1, **base), **tuned).plan(gpt(4, **target))


@pytest.mark.parametrize("grows", [False, True])
def test_a_latent_is_a_bottleneck_inside_the_model_at_every_rank(grows: bool) -> None:
    """Down projections are hidden where the rank is fixed; up projections have the ratio of the rank, which is 1."""
    r = 4.0 if grows else 1.0
    ranks = {"q_lora_rank": round(16 * r), "kv_lora_rank": round(12 * r), "qk_pos_emb_head_dim": round(4 * r)}
    plan = _plan(COMPRESSED, {**COMPRESSED, **ranks}, init_method_std=0.05, lr=0.01, adam_eps=1e-8, weight_decay=0.1)
    name = "decoder.layers.0.self_attention"
    heads_out = {"q": 4 * plan.head_size / 10, "kv": 4.0}
    for latent in ("q", "kv"):
        down, up = plan[f"{name}.linear_{latent}_down_proj.weight"], plan[f"{name}.linear_{latent}_up_proj.weight"]
        assert (down.role, up.role) == (Role.HIDDEN, Role.HIDDEN)
        assert (down.width_ratio, up.width_ratio) == (4.0, r)
        for entry, r_in, r_out in ((down, 4.0, r), (up, r, heads_out[latent])):
            assert entry.init_std == pytest.approx(0.05 / math.sqrt(r_in))
            assert entry.lr == pytest.approx(0.01 / r_in)
            assert entry.eps == pytest.approx(1e-8 / r_out)
            assert entry.weight_decay == pytest.approx(0.1 * r_in)
            assert entry.multiplier == 1.0
        for part in ("weight", "bias"):
            gain = plan[f"{name}.{latent}_layernorm.{part}"]
            assert (gain.lr, gain.eps) == (0.01, pytest.approx(1e-8 / r)), "a scalar where the rank is fixed"
            assert gain.weight_decay == 0.0
    out = plan[f"{name}.linear_proj.weight"]
    assert out.is_residual
    assert (out.shape, out.width_ratio) == ((128, 16 * 8), 4.0)


def test_the_head_of_values_is_a_size_of_its_own() -> None:
    """linear_proj reads heads of v_head_dim, whatever the size of queries and keys."""
    plan = _plan(LATENT, {**LATENT, "v_head_dim": 24})
    assert plan["decoder.layers.0.self_attention.linear_proj.weight"].width_ratio == 12.0
    assert plan["decoder.layers.0.self_attention.linear_q_proj.weight"].width_ratio == 4.0


def test_the_softmax_scale_is_of_both_parts_of_a_head_on_top_of_yarns_own_factor() -> None:
    yarn = (0.1 * math.log(40.0) + 1.0) ** 2
    for more, factor in (({}, 1.0), (YARN, yarn)):
        base = {**LATENT, **more}
        same = _plan(base, base, attention_multiplier=1.5)
        assert same.head_size == 10
        assert same.softmax_scale == pytest.approx(1.5 * factor / math.sqrt(10))
        wider = _plan(base, {**base, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8}, attention_multiplier=1.5)
        assert wider.softmax_scale == pytest.approx(1.5 * factor * math.sqrt(10) / 20)
    with pytest.raises(InputError, match=r"rotary_scaling_factor is 1\.0 in the recipe's base but 40\.0 in the target"):
        _plan({**LATENT, **YARN, "rotary_scaling_factor": 1.0}, {**LATENT, **YARN})


def test_sgd_has_no_rule_for_a_latent_of_fixed_rank() -> None:
    with pytest.raises(InputError, match=r"linear_q_down_proj\.weight: a bottleneck, whose output keeps its size 16"):
        recipe_for(gpt(1, **COMPRESSED), optimizer="sgd").plan(gpt(4, **COMPRESSED))
    growing = {**COMPRESSED, "q_lora_rank": 64, "kv_lora_rank": 48}
    assert recipe_for(gpt(1, **COMPRESSED), optimizer="sgd").plan(gpt(4, **growing)).entries
    assert recipe_for(gpt(1, **COMPRESSED), optimizer="sgd").plan(gpt(1, **COMPRESSED)).entries
    assert recipe_for(gpt(1, **COMPRESSED), optimizer="sgd", rule="standard").plan(gpt(4, **COMPRESSED)).entries


def test_multi_token_prediction_joins_two_widths_and_has_the_depth_of_the_stack() -> None:
    own = {"mtp_num_layers": 2, "position_embedding_type": "rope"}
    plan = _plan(own, {**own, "num_layers": 6}, init_method_std=0.05, lr=0.01)
    joined = plan["mtp.layers.1.eh_proj.weight"]
    assert (joined.role, joined.shape, joined.width_ratio) == (Role.HIDDEN, (128, 256), 4.0)
    assert joined.init_std == 0.025
    written = plan["mtp.layers.1.transformer_layer.mlp.linear_fc2.weight"]
    assert written.init_std == pytest.approx(0.05 / math.sqrt(2 * 6 * 4.0)), "as Megatron draws it"
    assert plan.depth == 12
    with pytest.raises(InputError, match="mtp_num_layers is 2 in the recipe's base but 1 in the target"):
        _plan(own, {**own, "mtp_num_layers": 1})
    with pytest.raises(InputError, match="Tune a base with the target's kinds of layers"):
        _plan(own, {"position_embedding_type": "rope"})


def test_transformer_engine_fuses_the_norms_of_latents_into_what_follows() -> None:
    names = {t.name for t in shapes_of(*[gpt(1, **COMPRESSED, transformer_impl="transformer_engine")] * 2)[1].tensors}
    name = "decoder.layers.0."
    assert {
        f"{name}input_layernorm.weight",
        f"{name}self_attention.linear_q_up_proj.layer_norm_weight",
        f"{name}self_attention.linear_kv_up_proj.layer_norm_weight",
        f"{name}mlp.linear_fc1.layer_norm_weight",
    } <= names


def test_the_second_norm_of_direct_queries_is_one_that_only_some_versions_of_megatron_have() -> None:
    model = gpt(1, **LATENT, qk_layernorm=True, transformer_impl="transformer_engine")
    optional = [t.name for t in shapes_of(model, model)[1].tensors if Property.OPTIONAL in t.properties]
    norms = [f"decoder.layers.{layer}.self_attention.linear_q_proj.layer_norm_" for layer in range(model.num_layers)]
    assert optional == [name + kind for name in norms for kind in ("weight", "bias")]
    plan = recipe_for(model).plan(model)
    all_of_them = {entry.name: entry.shape for entry in plan.entries}
    without = {name: shape for name, shape in all_of_them.items() if name not in optional}
    remedies = Remedies("unknown", "missing", "shape")
    assert parameter_problems(all_of_them, plan, remedies) == []
    assert parameter_problems(without, plan, remedies) == []
    assert len(parameter_problems(dict(list(without.items())[1:]), plan, remedies)) == 1
    some = {name: shape for name, shape in all_of_them.items() if name != optional[0]}
    assert len(parameter_problems(some, plan, remedies)) == 1, "all layers have it, or none"


def test_local_layers_cannot_norm_direct_queries() -> None:
    model = gpt(1, **LATENT, qk_layernorm=True)
    problem = architecture_of(model).local_problem(model, on_cpu=True)
    assert problem is not None
    assert "qk_layernorm without q_lora_rank" in problem


# ---- cost, proxies, model files ------------------------------------------------------------------------------------


def test_flops_are_six_for_each_weight_and_the_scores() -> None:
    model = gpt(
        1, **COMPRESSED, add_bias_linear=False, normalization="RMSNorm", untie_embeddings_and_output_weights=True
    )
    norms = (2 * 2 + 1) * 32 + 2 * (16 + 12)
    weights = parameter_count(model) - norms - 48 * 32
    scores = 2 * 6 * 12 * 4 * (10 + 8)
    assert training_flops(model).total == 6 * weights + scores
    further = gpt(1, mtp_num_layers=1, position_embedding_type="rope", untie_embeddings_and_output_weights=True)
    plain = gpt(1, position_embedding_type="rope", untie_embeddings_and_output_weights=True)
    one_layer = (training_flops(plain).total - 6 * 32 * 48) / 2
    more = training_flops(further).total - training_flops(plain).total
    assert more == one_layer + 6 * 32 * (64 + 48)


def test_a_proxy_keeps_ranks_and_head_sizes() -> None:
    target = gpt(32, **COMPRESSED, mtp_num_layers=1, vocab_size=512).model_copy(
        update={"num_attention_heads": 64, "q_lora_rank": 96, "qk_head_dim": 32, "qk_pos_emb_head_dim": 16}
    )
    proxy = choose_proxy(target, Search(trials=1, trial_tokens=1.0, target_tokens=100.0), width=256).model
    assert (proxy.hidden_size, proxy.num_attention_heads) == (256, 16)
    kept = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "mtp_num_layers")
    assert all(getattr(proxy, key) == getattr(target, key) for key in kept)
    assert proxy.kv_channels is None


SIZES = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "seq_length": 16}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"q_lora_rank": 8}, "q_lora_rank: without multi_latent_attention Megatron does not read it"),
        ({"mtp_loss_scaling_factor": 0.3}, "mtp_loss_scaling_factor: without mtp_num_layers"),
        ({"multi_latent_attention": True, "qk_pos_emb_head_dim": 3}, "qk_pos_emb_head_dim 3 is odd"),
        (
            {"multi_latent_attention": True, "group_query_attention": True},
            "group_query_attention: latent attention has",
        ),
        (
            {"multi_latent_attention": True, "kv_channels": 32},
            "kv_channels: with multi_latent_attention Megatron does not read it",
        ),
        (
            {"multi_latent_attention": True, "num_query_groups": 2},
            "num_query_groups: with multi_latent_attention Megatron does not read it",
        ),
        ({"rope_type": "yarn"}, "rope_type yarn: only with multi_latent_attention"),
        (
            {"mtp_num_layers": 1},
            "mtp_num_layers: Megatron has multi-token prediction with position_embedding_type rope",
        ),
        (
            {"multi_latent_attention": True, "hybrid_layer_pattern": "*-"},
            "multi_latent_attention: hybrid_layer_pattern has no layer +",
        ),
        (
            {"mtp_num_layers": 1, "position_embedding_type": "rope", "hybrid_layer_pattern": "*-"},
            "mtp_num_layers: hybrid_layer_pattern says these layers, behind '/', and has none",
        ),
    ],
)
def test_what_is_no_such_model_is_refused(content: dict[str, Any], said: str) -> None:
    sizes = {
        key: value for key, value in SIZES.items() if not ("hybrid_layer_pattern" in content and key == "num_layers")
    }
    with pytest.raises(InputError) as raised:
        model_file({**sizes, **content}, source="file")
    assert said in str(raised.value)
    assert all(len(line) <= 300 for line in str(raised.value).splitlines())


def test_what_a_line_says_is_read_and_written() -> None:
    line = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 100 --seq-length 16 --kv-channels 16 "
        "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
        "--v-head-dim 8 --rotary-scaling-factor 40 --mscale-all-dim 1.0 --qk-layernorm --mtp-num-layers 1 "
        "--position-embedding-type rope"
    )
    model = model_from_flags(line.split(), source="line")
    assert model.head_size == 12
    assert (model.q_lora_rank, model.v_head_dim, model.mtp_num_layers, model.kv_channels) == (24, 8, 1, None)
    assert model.stock_softmax_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(12))
    assert model_from_flags(flags(model), source="line") == model
    # What Megatron reads with them alone is nothing without them.
    plain = line.replace("--multi-latent-attention", "").replace("--mtp-num-layers 1", "--mtp-loss-scaling-factor 0.3")
    without = model_from_flags(plain.split(), source="line")
    assert (without.q_lora_rank, without.rotary_scaling_factor, without.mtp_loss_scaling_factor) == (None, 1.0, 0.1)
