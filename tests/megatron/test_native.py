"""The plug-in against Megatron-Core's own μP (`use_mup`, 0.17 and later): equal where that is right; where not, how.

Every native value is read from a live model and optimizer. docs/native-mup.md lists the differences.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout, Run, Training

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import Recipe

pytestmark = pytest.mark.skipif(core_version() < (0, 17, 0), reason="megatron-core 0.16 has no μP of its own")

STEPS = 8
_UNTIED: dict[str, Any] = {
    "untie_embeddings_and_output_weights": True,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
}


def _both(narrow: dict[str, Any], wide: dict[str, Any]) -> tuple[ModelFile, ModelFile]:
    return gpt(**{"vocab_size": 64, **narrow}), gpt(4, **{"vocab_size": 64, **narrow, **wide})


PROPORTIONAL: dict[str, tuple[ModelFile, ModelFile]] = {
    "tied, fixed head size": _both({}, {}),
    "untied, gated": _both(_UNTIED, {}),
    "grouped queries": _both(
        {"group_query_attention": True, "num_query_groups": 2}, {"num_query_groups": 8, "group_query_attention": True}
    ),
    "longer heads": _both({}, {"kv_channels": 16, "num_attention_heads": 8}),
}
"""Base and target whose every width grows by the same factor 4."""


@dataclass(frozen=True)
class Observed:
    """What a live model and its live optimizer have and do."""

    weights: dict[str, torch.Tensor]
    live: dict[str, dict[str, Any]]
    softmax_scale: set[float]
    logits_factor: float
    """Logits over what readout and the final hidden state give without a multiplier."""
    embedding_factor: float
    losses: list[float]


def _observed(run: Run) -> Observed:
    from mup_megatron.megatron.model import softmax_scales
    from mup_megatron.megatron.optimizer import live_values

    model = run.chunks[0].module
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    live = live_values(run.optimizer, run.chunks, tied=run.sizes.tied)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, position: int | None = None) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            seen[name] = (out if position is None else out[position]).detach().clone()

        return hook

    handles = [
        model.embedding.register_forward_hook(keep("embedded")),
        model.decoder.final_layernorm.register_forward_hook(keep("hidden")),
    ]
    tokens, _ = stock.batch(run.sizes, run.training, 0)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, None).transpose(0, 1)
        head = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
        plain = torch.matmul(seen["hidden"], head.t())
        table = weights["embedding.word_embeddings.weight"][tokens].transpose(0, 1)
        if "embedding.position_embeddings.weight" in weights:
            table = table + weights["embedding.position_embeddings.weight"][:, None, :]
    for handle in handles:
        handle.remove()
    return Observed(
        weights=weights,
        live={name: asdict(values) for name, values in live.items()},
        softmax_scale=set(softmax_scales(run.chunks[0]).values()),
        logits_factor=_factor(logits, plain),
        embedding_factor=_factor(seen["embedded"], table),
        losses=stock.train(run, STEPS),
    )


def _factor(scaled: torch.Tensor, plain: torch.Tensor) -> float:
    """The number that one is of the other."""
    factor = float((scaled * plain).sum() / (plain * plain).sum())
    assert torch.allclose(scaled, factor * plain, rtol=1e-3, atol=1e-5)
    return factor


def _native(base: ModelFile, target: ModelFile, training: Training, changes: dict[str, Any]) -> Run:
    """A run as Megatron-LM sets it up under --use-mup, with the overrides on top of its standard ones."""
    from megatron.core.optimizer import get_mup_config_overrides, get_standard_config_overrides

    settings = {"use_mup": True, "mup_base_hidden_size": base.hidden_size, "mup_base_head_dim": base.head_size}
    sizes, config, chunks = planned.built(target, Layout(), config_changes={**settings, **changes})

    def overrides(_chunks: list[Any], optimizer: Any) -> dict[Any, Any]:
        own = get_mup_config_overrides(optimizer, config.mup_width_mult, optimizer.optimizer)
        return {**get_standard_config_overrides(optimizer), **own}

    return stock.finish(sizes, Layout(), training, config, chunks, overrides)


def _ours_and_native(
    recipe: Recipe, target: ModelFile, training: Training, changes: dict[str, Any] | None = None
) -> tuple[Observed, Observed]:
    ours = planned.prepare(recipe, target, Layout(), training=training)
    return _observed(ours), _observed(_native(recipe.base, target, training, changes or {}))


def _compared(
    recipe: Recipe, target: ModelFile, native_settings: dict[str, Any] | None = None
) -> tuple[Observed, Observed]:
    """(ours, native), with a learning rate above 0 from the first step."""
    training = replace(planned.training_of(recipe), warmup_steps=0)
    return run_ranks(_ours_and_native, 1, recipe, target, training, native_settings)[0]


# ---- where native μP is right --------------------------------------------------------------------------------------


def _proportional() -> dict[str, tuple[Observed, Observed]]:
    found = {}
    for name, (base, target) in PROPORTIONAL.items():
        # An eps that no gradient notices, and weight decay without compensation: native μP has neither right.
        recipe = planned.recipe(base, adam_eps=1e-20, weight_decay_exponent=0.0)
        training = replace(planned.training_of(recipe), warmup_steps=0)
        found[name] = _ours_and_native(recipe, target, training)
    return found


@pytest.fixture(scope="module")
def proportional() -> dict[str, tuple[Observed, Observed]]:
    return run_ranks(_proportional, 1)[0]


@pytest.mark.parametrize("shape", PROPORTIONAL)
def test_initial_weights_are_native(proportional: dict[str, tuple[Observed, Observed]], shape: str) -> None:
    """The same draw with the same std, tensor by tensor."""
    ours, native = proportional[shape]
    assert ours.weights.keys() == native.weights.keys()
    for name, weight in ours.weights.items():
        assert torch.allclose(weight, native.weights[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize("shape", PROPORTIONAL)
def test_learning_rates_and_floors_are_native(proportional: dict[str, tuple[Observed, Observed]], shape: str) -> None:
    ours, native = proportional[shape]
    assert len({values["max_lr"] for values in native.live.values()}) == 2
    for name, values in ours.live.items():
        for key in ("max_lr", "min_lr", "weight_decay"):
            assert values[key] == pytest.approx(native.live[name][key], rel=1e-12), (name, key)


@pytest.mark.parametrize("shape", PROPORTIONAL)
def test_multipliers_and_attention_scale_are_native(
    proportional: dict[str, tuple[Observed, Observed]], shape: str
) -> None:
    ours, native = proportional[shape]
    assert ours.logits_factor == pytest.approx(native.logits_factor, rel=1e-5) == pytest.approx(0.25, rel=1e-5)
    assert ours.embedding_factor == pytest.approx(native.embedding_factor, rel=1e-5)
    assert [*ours.softmax_scale] == pytest.approx([*native.softmax_scale], rel=1e-12)


@pytest.mark.parametrize("shape", PROPORTIONAL)
def test_losses_are_native_where_eps_does_not_matter(
    proportional: dict[str, tuple[Observed, Observed]], shape: str
) -> None:
    ours, native = proportional[shape]
    assert ours.losses == pytest.approx(native.losses, abs=1e-5)
    assert max(native.losses) - min(native.losses) > 1e-2


def test_sgd_is_native_in_learning_rates() -> None:
    base, target = PROPORTIONAL["untied, gated"]
    ours, native = _compared(planned.recipe(base, optimizer="sgd", lr=0.1, min_lr=0.01), target)
    assert {values["max_lr"] for values in native.live.values()} == {0.1, 0.4}
    for name, values in ours.live.items():
        assert values["max_lr"] == pytest.approx(native.live[name]["max_lr"], rel=1e-12), name
        assert values["min_lr"] == pytest.approx(native.live[name]["min_lr"], rel=1e-12), name


# ---- where it is not -----------------------------------------------------------------------------------------------

FC1, FC2 = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight"
PROJ, WORDS, GAIN = (
    "decoder.layers.0.self_attention.linear_proj.weight",
    "embedding.word_embeddings.weight",
    "decoder.layers.0.input_layernorm.weight",
)


def _std(observed: Observed, name: str) -> float:
    return float(observed.weights[name].std())


def test_native_has_one_ratio_for_all_widths() -> None:
    """ffn and heads × head size stay, hidden grows by 4: native divides what has a fixed fan_in by 4 as well."""
    base, target = _both({}, {"ffn_hidden_size": 64, "num_attention_heads": 4})
    recipe = planned.recipe(base)
    ours, native = _compared(recipe, target)
    residual = base.init_method_std / math.sqrt(2 * target.num_layers)
    for name in (FC2, PROJ):
        assert ours.live[name]["max_lr"] == 1e-3
        assert native.live[name]["max_lr"] == 2.5e-4
        assert _std(ours, name) == pytest.approx(residual, rel=0.05)
        assert _std(native, name) == pytest.approx(residual / 2, rel=0.05)
    # fc1's fan_in grows and its fan_out does not: its gradient, and so eps, stays.
    assert ours.live[FC1]["max_lr"] == native.live[FC1]["max_lr"] == 2.5e-4
    assert ours.live[FC1]["eps"] == 1e-8
    assert native.live[FC1]["eps"] == 2.5e-9


def test_native_scales_eps_of_hidden_weights_only() -> None:
    base, target = PROPORTIONAL["untied, gated"]
    ours, native = _compared(planned.recipe(base, adam_eps=1e-4), target)
    for name in (WORDS, GAIN, "output_layer.weight"):
        assert ours.live[name]["eps"] == 2.5e-5
        assert native.live[name]["eps"] == 1e-4
    assert ours.live[FC1]["eps"] == native.live[FC1]["eps"] == 2.5e-5
    assert max(abs(a - b) for a, b in zip(ours.losses, native.losses, strict=True)) > 1e-4


def test_native_does_not_compensate_weight_decay() -> None:
    """So η·λ, which sets AdamW's averaging time, falls with width for hidden weights."""
    base, target = PROPORTIONAL["tied, fixed head size"]
    ours, native = _compared(planned.recipe(base), target)

    def decay_per_step(observed: Observed) -> float:
        return float(observed.live[FC1]["max_lr"] * observed.live[FC1]["weight_decay"])

    assert decay_per_step(ours) == pytest.approx(1e-3 * 0.1)
    assert decay_per_step(native) == pytest.approx(1e-3 * 0.1 / 4)


def test_native_sgd_does_not_scale_weight_decay() -> None:
    base, target = PROPORTIONAL["untied, gated"]
    ours, native = _compared(planned.recipe(base, optimizer="sgd", lr=0.1, min_lr=0.01), target)
    for name in (WORDS, "output_layer.weight"):
        assert ours.live[name]["max_lr"] * ours.live[name]["weight_decay"] == pytest.approx(0.1 * 0.1)
        assert native.live[name]["max_lr"] * native.live[name]["weight_decay"] == pytest.approx(0.4 * 0.1)


def test_native_output_multiplier_takes_the_place_of_the_width_factor() -> None:
    base, target = PROPORTIONAL["tied, fixed head size"]
    ours, native = _compared(planned.recipe(base, output_multiplier=2.0), target, {"mup_output_mult": 2.0})
    assert ours.logits_factor == pytest.approx(2.0 / 4, rel=1e-5)
    assert native.logits_factor == pytest.approx(2.0, rel=1e-5)


def test_native_embedding_multiplier_is_ours() -> None:
    base, target = PROPORTIONAL["tied, fixed head size"]
    ours, native = _compared(planned.recipe(base, embedding_multiplier=3.0), target, {"mup_embedding_mult": 3.0})
    assert ours.embedding_factor == pytest.approx(native.embedding_factor, rel=1e-5) == pytest.approx(3.0, rel=1e-5)


def test_native_base_is_not_standard_unless_its_head_size_is_given() -> None:
    base, _ = PROPORTIONAL["tied, fixed head size"]
    ours, native = _compared(planned.recipe(base), base, {"mup_base_head_dim": None})
    assert [*ours.softmax_scale] == pytest.approx([1 / math.sqrt(8)])
    assert [*native.softmax_scale] == pytest.approx([1 / 8])


def test_native_embedding_std_is_the_heads_too() -> None:
    base, target = PROPORTIONAL["untied, gated"]
    _, native = _compared(planned.recipe(base), target, {"embedding_init_method_std": 0.1})
    assert _std(native, "output_layer.weight") == pytest.approx(0.1, rel=0.05)


def _first_rates(init_lr: float) -> dict[str, dict[str, Any]]:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mup_megatron.megatron.optimizer import live_values

    base, target = PROPORTIONAL["tied, fixed head size"]
    training = planned.training_of(planned.recipe(base))
    run = _native(base, target, training, {})
    OptimizerParamScheduler(
        run.optimizer, init_lr, training.lr, training.min_lr, 4, 20, "linear", 0.1, 0.1, 20, "constant"
    )
    return {name: asdict(v) for name, v in live_values(run.optimizer, run.chunks, tied=True).items()}


def test_native_warm_up_starts_every_group_alike() -> None:
    live = run_ranks(_first_rates, 1, 5e-4)[0]
    assert live[WORDS]["lr"] == 0.5 * live[WORDS]["max_lr"]
    assert live[FC1]["lr"] == 2 * live[FC1]["max_lr"]


def _silent_settings() -> tuple[list[str], float, float, float]:
    """Warnings, and the width factor without a base, with one given by hand, and with a base."""
    sizes = planned.sizes_of(gpt(4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        configs = [
            stock.transformer_config(sizes, Layout(), use_mup=True, **settings)
            for settings in ({}, {"mup_width_mult": 7.0}, {"mup_base_hidden_size": 32})
        ]
    said = [str(w.message) for w in caught if "mup" in str(w.message).lower()]
    return said, *(config.mup_width_mult for config in configs)


def test_native_without_a_base_is_off_and_says_nothing() -> None:
    assert run_ranks(_silent_settings, 1)[0] == ([], 1.0, 1.0, 4.0)


def _latent_attention() -> tuple[float, set[float]]:
    """The configuration's scale, and the one that latent attention gives to its core.

    The core only keeps what it is given: Megatron's own CPU-only one cannot be built into latent attention.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import MLATransformerConfig

    from mup_megatron.megatron import cpu

    class Core(torch.nn.Module):
        def __init__(self, *, softmax_scale: float, **_: Any) -> None:
            super().__init__()
            self.softmax_scale = softmax_scale

    stock.init_parallel(Layout())
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=128,
        num_attention_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_head_dim=32,
        qk_pos_emb_head_dim=8,
        v_head_dim=32,
        use_mup=True,
        mup_base_hidden_size=32,
        mup_base_head_dim=8,
        **cpu.transformer_config_overrides(),
    )
    spec = get_gpt_layer_local_spec(multi_latent_attention=True)
    spec.submodules.self_attention.submodules.core_attention = Core
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=12)
    return config.softmax_scale, {layer.self_attention.core_attention.softmax_scale for layer in model.decoder.layers}


def test_native_attention_scale_does_not_reach_latent_attention() -> None:
    of_config, in_effect = run_ranks(_latent_attention, 1)[0]
    assert of_config == pytest.approx(math.sqrt(8) / 32)
    assert [*in_effect] == pytest.approx([1 / math.sqrt(32 + 8)])


def _router() -> tuple[float, float, float]:
    """(std, peak learning rate, base's learning rate) of a router."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_mup_config_overrides

    sizes = planned.sizes_of(gpt(4, num_layers=1))
    stock.init_parallel(Layout())
    config = stock.transformer_config(
        sizes,
        Layout(),
        use_mup=True,
        mup_base_hidden_size=32,
        num_moe_experts=64,
        add_bias_linear=False,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
    )
    model = GPTModel(config, get_gpt_layer_local_spec(num_experts=64), sizes.vocab_size, sizes.seq_length)
    router = model.decoder.layers[0].mlp.router.weight
    overrides = get_mup_config_overrides(OptimizerConfig(lr=1e-3, min_lr=0.0), config.mup_width_mult)
    name = "decoder.layers.0.mlp.router.weight"
    (own,) = (values for key, values in overrides.items() if key.matches(router, name))
    return float(router.std()), own["max_lr"], 1e-3


def test_native_treats_a_router_as_hidden() -> None:
    """Its fan_out, the number of experts, does not grow: it is an output weight."""
    std, lr, base_lr = run_ranks(_router, 1)[0]
    assert std == pytest.approx(0.02 / 2, rel=0.05)
    assert lr == base_lr / 4


def _logits_of_encoders() -> tuple[float, float]:
    """The configuration's readout factor, and what BERT's logits are of those of its own head."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    sizes = planned.sizes_of(gpt(4, num_layers=1))
    stock.init_parallel(Layout())
    config = stock.transformer_config(sizes, Layout(), use_mup=True, mup_base_hidden_size=32)
    model = BertModel(
        config,
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=sizes.vocab_size,
        max_sequence_length=sizes.seq_length,
        share_embeddings_and_output_weights=False,
        add_binary_head=False,
    )
    raw: list[torch.Tensor] = []
    model.output_layer.register_forward_hook(lambda _module, _args, out: raw.append(out[0].detach().clone()))
    tokens, _ = stock.batch(sizes, Training(), 0)
    logits, _ = model(tokens, torch.ones_like(tokens))
    return config.mup_output_mult, _factor(logits.detach(), raw[0].transpose(0, 1))


def test_native_leaves_the_logits_of_bert_alone() -> None:
    of_config, in_effect = run_ranks(_logits_of_encoders, 1)[0]
    assert of_config == 0.25
    assert in_effect == pytest.approx(1.0)


def _decoding_scale() -> tuple[float | None, float | None]:
    """What a decoder that bypasses core attention finds as the layer's scale: native, ours."""
    base, target = PROPORTIONAL["longer heads"]
    recipe = planned.recipe(base)
    native = _native(base, target, planned.training_of(recipe), {})
    ours = planned.prepare(recipe, target, Layout())
    return tuple(
        getattr(run.chunks[0].module.decoder.layers[0].self_attention, "softmax_scale", None) for run in (native, ours)
    )


def test_native_attention_scale_is_not_where_dynamic_inference_looks_for_it() -> None:
    """`Attention.flash_decode_and_prefill` takes the layer's `softmax_scale`, and 1/√d where there is none."""
    native, ours = run_ranks(_decoding_scale, 1)[0]
    assert native is None
    assert ours == pytest.approx(math.sqrt(8) / 16)
