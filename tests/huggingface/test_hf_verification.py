"""What attention computes, held against the plan, and factors of width that only the code has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support.hf_families import config, recipe_at
from support.hf_models import ATTENTION, with_class, with_heads_growing
from transformers import PretrainedConfig

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, plan_for, verification
from mup_megatron.huggingface.plan import _factory
from mup_megatron.modules.apply import set_attention_scale
from mup_megatron.modules.forward import Factor, Forward
from mup_megatron.modules.shapes import MetaModule

COMMON: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2}
DENSE = {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}


def deepseek(version: str, nope: int, *, heads: int = 4, **changes: Any) -> PretrainedConfig:
    """Latent attention whose queries have two parts, one of them without positions."""
    own = {"hidden_size": 16 * heads, "intermediate_size": 32 * heads, "num_attention_heads": heads}
    own |= {"num_key_value_heads": heads, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16}
    own |= {"qk_nope_head_dim": nope, "qk_rope_head_dim": 8, "architectures": [f"{version}ForCausalLM"]}
    made: PretrainedConfig = getattr(transformers, f"{version}Config")(**COMMON | DENSE | own | changes)
    return made


def in_use(target: PretrainedConfig, base: PretrainedConfig, **hyperparameters: float) -> list[float]:
    """What the softmaxes of a live model multiply their logits by, after a plan was applied."""
    model_class = getattr(transformers, (target.architectures or [""])[0])
    plan = plan_for(target, recipe_at(base, hyperparameters=hyperparameters))
    live = model_class(target).eval()
    apply_plan(live, plan)
    seen: list[float] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, scale: float | None = None, **rest: Any) -> Any:
        seen.append(args[0].shape[-1] ** -0.5 if scale is None else scale)
        return fused(*args, scale=scale, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        live(input_ids=torch.arange(8)[None])
    return seen


@pytest.mark.parametrize("version", ["DeepseekV2", "DeepseekV3"])
def test_latent_attention_uses_the_plans_scale(version: str) -> None:
    """Queries of 24 in the base and of 72 in the target: √24/72, and not 1/√72."""
    found = in_use(deepseek(version, 64), deepseek(version, 16))
    assert found == pytest.approx([24**0.5 / 72] * 2)
    assert in_use(deepseek(version, 16, heads=8), deepseek(version, 16)) == pytest.approx([24**-0.5] * 2)
    assert in_use(deepseek(version, 16, heads=8), deepseek(version, 16), attention_multiplier=2.0) == pytest.approx(
        [2 * 24**-0.5] * 2
    )


def test_yarns_part_of_the_scale_is_the_targets() -> None:
    own = {"max_position_embeddings": 128, "rope_parameters": YARN | {"rope_theta": 10000.0}}
    stretched = deepseek("DeepseekV3", 16, **own)
    plain = in_use(stretched, stretched)
    assert plain[0] > 24**-0.5
    found = in_use(deepseek("DeepseekV3", 64, **own), deepseek("DeepseekV3", 16))
    assert found == pytest.approx([scale * 24 / 72 for scale in plain])


@pytest.mark.parametrize("family", ATTENTION)
def test_what_is_seen_on_the_meta_device_follows_the_attribute(family: str) -> None:
    own = with_class(family, with_heads_growing(family, 64))
    model_class = getattr(transformers, (own.architectures or [""])[0])
    built = MetaModule.of(_factory(model_class, own))
    plan = plan_for(own, recipe_at(own, hyperparameters={"attention_multiplier": 3.0}))
    before = [softmax.scale for softmax in verification.forward_of(built).softmaxes]
    set_attention_scale(built.module, plan)
    after = [softmax.scale for softmax in verification.forward_of(built).softmaxes]
    assert before
    assert after == pytest.approx([3.0 * scale for scale in before if scale is not None])


@pytest.mark.parametrize("alpha", [1.0, pytest.param(2.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ATTENTION)
def test_standard_parametrization_keeps_the_librarys_scale_where_heads_grow(family: str, alpha: float) -> None:
    base, target = (with_class(family, with_heads_growing(family, width)) for width in (64, 128))
    standard = {"hyperparameters": {"attention_multiplier": alpha}, "parametrization": {"rule": "standard"}}
    stock = plan_for(target, recipe_at(target))
    assert plan_for(target, recipe_at(base, **standard)).softmax_scale == pytest.approx(alpha * stock.softmax_scale)


def test_a_scale_that_is_not_the_one_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model that has a `scaling` and computes with something else."""
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward

    def own_scale(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept, self.scaling = self.scaling, self.head_dim**-0.5
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.scaling = kept

    monkeypatch.setattr(attention, "forward", own_scale)
    base, target = (with_class("llama", with_heads_growing("llama", width)) for width in (64, 128))
    with pytest.raises(
        InputError, match=r"model\.layers\.0\.self_attn: its attention would multiply .* 0\.1768.* 0\.125"
    ):
        plan_for(target, recipe_at(base))
    assert plan_for(with_class("llama", config("llama", 128)), recipe_at(config("llama", 64))).entries


def test_a_factor_that_follows_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an embedding it is taken back, as CTRL's √width; anywhere else there is no place that could do so."""

    def ctrl(width: int) -> PretrainedConfig:
        return transformers.CTRLConfig(
            vocab_size=64, n_layer=1, n_embd=width, dff=2 * width, n_head=width // 16, n_positions=32,
            architectures=["CTRLLMHeadModel"],
        )  # fmt: skip

    found = plan_for(ctrl(64), recipe_at(ctrl(32)))["transformer.w.weight"]
    assert (found.multiplier, found.stock_multiplier) == (1.0, pytest.approx(2**0.5))

    layer = transformers.models.ctrl.modeling_ctrl.EncoderLayer
    forward = layer.forward

    def scaled(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, x * x.shape[-1] ** 0.5, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", scaled)
    with pytest.raises(InputError, match=r"× 5\.65685 in the recipe's base and × 8 in the target") as raised:
        plan_for(ctrl(64), recipe_at(ctrl(32)))
    assert len(str(raised.value)) <= 300


def test_the_readouts_own_scale_is_read_off_the_forward_pass() -> None:
    base, target = (with_class("t5", config("t5", width)) for width in (32, 128))
    assert plan_for(target, recipe_at(base)).stock_readout_ratio == pytest.approx(0.5)
    for own in (base, target):
        own.scale_decoder_outputs = False
    assert plan_for(target, recipe_at(base)).stock_readout_ratio == 1.0


def test_a_classifier_that_looks_at_values_is_seen_without_its_head() -> None:
    def bart(width: int) -> PretrainedConfig:
        heads = {f"{side}_attention_heads": width // 16 for side in ("encoder", "decoder")}
        ffn = {f"{side}_ffn_dim": 2 * width for side in ("encoder", "decoder")}
        return transformers.BartConfig(
            d_model=width, vocab_size=64, encoder_layers=1, decoder_layers=1, max_position_embeddings=32,
            **heads, **ffn, architectures=["BartForSequenceClassification"],
        )  # fmt: skip

    assert plan_for(bart(64), recipe_at(bart(32))).softmax_scale == 0.25


def test_an_attention_without_a_softmax_is_refused_and_one_that_is_not_called_is_not() -> None:
    def yoso(width: int) -> PretrainedConfig:
        return transformers.YosoConfig(
            hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 16, num_hidden_layers=1,
            vocab_size=64, architectures=["YosoForMaskedLM"],
        )  # fmt: skip

    def decoder(width: int) -> PretrainedConfig:
        return transformers.MBartConfig(
            d_model=width, decoder_ffn_dim=2 * width, decoder_attention_heads=width // 16, decoder_layers=1,
            vocab_size=64, scale_embedding=False, architectures=["MBartForCausalLM"],
        )  # fmt: skip

    with pytest.raises(InputError, match=r"yoso\.encoder\.layer\.0\.attention\.self: no softmax was seen"):
        plan_for(yoso(64), recipe_at(yoso(32)))
    assert plan_for(decoder(64), recipe_at(decoder(32))).softmax_scale == 0.25


def test_a_model_that_cannot_be_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("on purpose, at some length: " + "x" * 500)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fails)
    with pytest.raises(InputError, match="model type llama: its attention could not be looked at") as raised:
        plan_for(with_class("llama", config("llama", 64)), recipe_at(config("llama", 32)))
    assert len(str(raised.value)) <= 300


# ---- factors in code -------------------------------------------------------------------------------------------------


def passed(*factors: tuple[str, float | None]) -> Forward:
    """A forward pass whose modules multiply by these numbers, in this order."""
    found = tuple(Factor(where, "mul", number) for where, number in factors)
    return Forward((), found, None, frozenset(), {}, {})


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ([("b", 3.0), ("a", 2.0), ("a", 0.5)], None),
        ([("a", 2.0), ("a", 0.25), ("b", 3.0)], r"a: its code has a factor that follows width, × 0\.5 in .* × 0\.25"),
        ([("b", 4.0), ("a", 2.0), ("a", 0.5)], "b: its code has a factor that follows width"),
        ([("a", 2.0), ("b", 3.0), ("b", 3.0)], "its forward pass does other things at the target's width"),
        ([("a", 2.0), ("a", 0.5)], "its forward pass does other things at the target's width"),
    ],
)
def test_each_factor_is_compared_with_that_of_the_same_place(
    target: list[tuple[str, float | None]], said: str | None
) -> None:
    """Also behind the first place where two passes differ in their order."""
    base = passed(("a", 2.0), ("a", 0.5), ("b", 3.0))
    if said is None:
        verification.require_no_hidden_factor(base, passed(*target), torch.nn.Identity())
        return
    with pytest.raises(InputError, match=said):
        verification.require_no_hidden_factor(base, passed(*target), torch.nn.Identity())


FACTORS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "a number": lambda x, h: x * h**0.5,
    "a tensor of one": lambda x, h: x * torch.tensor([h**0.5]),
    "a whole row of them": lambda x, h: x * torch.full((x.shape[-1],), h**0.5),
    "in its own place": lambda x, h: x * x.new_tensor(h**0.5),
    "alpha of a sum": lambda x, h: torch.add(x * 0, x, alpha=h**0.5),
    "a weighted mean": lambda x, h: torch.lerp(x * 0, x, h**0.5),
    "value of a product": lambda x, h: torch.addcmul(x * 0, x, torch.ones_like(x), value=h**0.5),
    "what is not known": lambda x, h: x * (torch.tensor([1.0, float(h)]).to(x.device).sum() ** 0.5),
}
KNOWN = ("a number", "a tensor of one", "a whole row of them", "in its own place")


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("module", ["model.layers.1.mlp", "model.norm"])
def test_a_factor_of_width_in_code_is_seen_however_it_is_written(name: str, module: str) -> None:
    """Behind the final norm one that is known is a part of the readout's multiplier; elsewhere it is refused."""

    class LlamaForCausalLM(transformers.LlamaForCausalLM):
        def __init__(self, settings: transformers.LlamaConfig) -> None:
            super().__init__(settings)
            h = settings.hidden_size
            self.get_submodule(module).register_forward_hook(lambda _, __, output: FACTORS[name](output, h))

    target = LlamaForCausalLM(config("llama", 64))
    recipe = recipe_at(config("llama", 32))
    if module == "model.norm" and name in KNOWN:
        assert plan_for(target, recipe).stock_readout_ratio == pytest.approx(2**0.5)
        return
    with pytest.raises(InputError, match=r"a factor that (may follow|follows) width"):
        plan_for(target, recipe)
