"""What a user can do wrong with Hugging Face models: a sentence that names key and remedy, before anything changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support.hf_families import POSITIONS, VOCABULARY, config, recipe_at
from support.hf_models import built, with_class, with_heads_growing
from torch import nn
from transformers import PretrainedConfig

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, configs, plan_for
from mup_megatron.modules import module_base, plan_for_module
from mup_megatron.modules.attention import attention_of
from mup_megatron.recipe import Recipe, recipe


def _refused(make: Callable[[], object], *words: str) -> str:
    with pytest.raises(InputError) as raised:
        make()
    message = str(raised.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert message.rstrip().endswith((".", "?")), message
    assert "  " not in message, message
    return message


def _llama(width: int = 64, **changes: Any) -> PretrainedConfig:
    return with_class("llama", config("llama", width, **changes))


def _recipe(**base: Any) -> Recipe:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "hidden_size": 32, "intermediate_size": 96}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    content = {"model_type": "llama", **sizes, **layers}
    return recipe({"base": content | base, "hyperparameters": {"lr": 0.01}}, source="r.yaml")


def test_the_recipe_of_these_tests_is_accepted() -> None:
    assert len(plan_for(_llama(), _recipe()).entries) == 21


# ---- another architecture ------------------------------------------------------------------------------------------


def test_another_model_type() -> None:
    target = with_class("gpt2", config("gpt2", 64))
    _refused(lambda: plan_for(target, _recipe()), "model_type is llama", "but gpt2 in the target")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 65),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("mlp_bias", True),
    ],
)
def test_a_key_that_is_no_width(key: str, value: object) -> None:
    _refused(lambda: plan_for(_llama(**{key: value}), _recipe()), f"{key} is ", f"but {value} in the target", "base")


def test_another_number_of_classes() -> None:
    base, target = config("vit", 32), with_class("vit", config("vit", 64, num_labels=11))
    _refused(lambda: plan_for(target, recipe_at(base)), "num_labels is 10", "11")


def test_another_number_of_patches() -> None:
    base, target = config("vit", 32), with_class("vit", config("vit", 64, image_size=32))
    _refused(
        lambda: plan_for(target, recipe_at(base)), "vit.embeddings.position_embeddings", "17", "65", "Give the base"
    )


def test_another_number_of_positions() -> None:
    base, target = config("gpt2", 32), with_class("gpt2", config("gpt2", 64, n_positions=16))
    _refused(lambda: plan_for(target, recipe_at(base)), "transformer.wpe.weight", "32", "16")
    assert plan_for(_llama(max_position_embeddings=16), _recipe()).entries  # rotary positions have no table


def test_other_stages() -> None:
    target = with_class("resnet", config("resnet", 64, hidden_sizes=[64, 128, 256], depths=[1, 1, 1]))
    _refused(lambda: plan_for(target, recipe_at(config("resnet", 32))), "depths has 2 stages", "3 in the target")
    fewer = with_class("resnet", config("resnet", 64, hidden_sizes=[64], depths=[1]))
    _refused(lambda: plan_for(fewer, recipe_at(config("resnet", 32))), "depths has 2 stages", "1 in the target")


def test_base_and_target_exchanged() -> None:
    _refused(lambda: plan_for(_llama(32), _recipe(hidden_size=64, num_attention_heads=4)), "exchanged?")


def test_a_base_with_more_parameters() -> None:
    _refused(lambda: plan_for(_llama(64), _recipe(intermediate_size=4000)), "parameters", "exchanged?")


# ---- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("hiden_size", "'hidden_size'"),
        ("num_atention_heads", "'num_attention_heads'"),
        ("n_embd_", ""),
        ("zzz", "LlamaConfig"),
    ],
)
def test_an_unknown_key(key: str, hint: str) -> None:
    _refused(lambda: plan_for(_llama(), _recipe(**{key: 4})), f"base.{key}: unknown key of model type llama", hint)


def test_an_unknown_model_type() -> None:
    _refused(lambda: plan_for(_llama(), _recipe(model_type="lama")), "base.model_type: 'lama'")


def test_an_impossible_base() -> None:
    _refused(lambda: plan_for(_llama(), _recipe(num_attention_heads=3)), "3")
    _refused(lambda: plan_for(_llama(), _recipe(hidden_size="wide")), "hidden_size")


def test_no_architectures() -> None:
    target = config("llama", 64)
    _refused(lambda: plan_for(target, _recipe()), "architectures: ", "GPT2LMHeadModel")
    assert plan_for(target, _recipe(architectures=["LlamaForCausalLM"])) is not None


@pytest.mark.parametrize("name", ["LlamaForCausalLMs", "AutoConfig", "LlamaConfig", "Trainer"])
def test_architectures_that_are_none(name: str) -> None:
    target = config("llama", 64)
    target.architectures = [name]
    _refused(lambda: plan_for(target, _recipe()), f"architectures: {name} is no model class")


def test_an_override_that_matches_nothing() -> None:
    own = recipe_at(config("llama", 32), per_parameter=[{"match": "transformer.*", "lr_mult": 2.0}])
    _refused(lambda: plan_for(_llama(), own), "per_parameter[0] 'transformer.*' matches no parameter")


# ---- models that have no plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"vocab_size": 128}, ("text_config.vocab_size is 64", "but 128")),
        ({"hidden_act": "relu"}, ("text_config.hidden_act",)),
        ({"model_type": "mistral"}, ("text_config.model_type is llama", "mistral")),
    ],
)
def test_a_key_of_a_configuration_within_a_configuration_is_named(keys: dict[str, Any], words: tuple[str, ...]) -> None:
    def llava(**own: Any) -> PretrainedConfig:
        text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, **own}
        return transformers.LlavaConfig(text_config=text, architectures=["LlavaForConditionalGeneration"])

    message = _refused(lambda: plan_for(llava(**keys), recipe_at(llava())), *words)
    assert len(message) <= 300


def test_a_long_list_is_not_shown() -> None:
    def qwen(kinds: list[str]) -> PretrainedConfig:
        return transformers.DeepseekV4Config(mlp_layer_types=kinds, num_hidden_layers=len(kinds))

    message = _refused(
        lambda: configs.require_comparable(qwen(["hash_moe"] * 12), qwen(["hash_moe"] * 11 + ["moe"])),
        "mlp_layer_types is a list of 12",
    )
    assert len(message) <= 300


def test_more_groups_of_a_convolution_are_another_architecture() -> None:
    def squeeze(width: int, groups: int) -> PretrainedConfig:
        return transformers.SqueezeBertConfig(
            hidden_size=width, embedding_size=width, num_attention_heads=width // 16, intermediate_size=2 * width,
            num_hidden_layers=1, vocab_size=64, output_groups=groups, architectures=["SqueezeBertForMaskedLM"],
        )  # fmt: skip

    _refused(lambda: plan_for(squeeze(128, 8), recipe_at(squeeze(64, 4))), "output_groups is 4", "8 in the target")
    found = plan_for(squeeze(128, 4), recipe_at(squeeze(64, 4)))
    entry = found["transformer.encoder.layers.0.output.conv1d.weight"]
    assert (entry.fan_in, entry.fan_out, entry.width_ratio) == (64, 128, 2.0)


def test_bart_may_scale_its_embedding_or_not() -> None:
    def bart(width: int, scale: bool) -> PretrainedConfig:
        own = {"encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64, "max_position_embeddings": 32}
        heads = {f"{side}_attention_heads": width // 16 for side in ("encoder", "decoder")}
        ffn = {f"{side}_ffn_dim": 2 * width for side in ("encoder", "decoder")}
        return transformers.BartConfig(
            d_model=width, scale_embedding=scale, **own, **heads, **ffn, architectures=["BartForConditionalGeneration"]
        )

    scaled = plan_for(bart(64, True), recipe_at(bart(32, True)))["model.shared.weight"]
    assert (scaled.multiplier, scaled.stock_multiplier) == (1.0, pytest.approx(2**0.5))
    assert plan_for(bart(64, False), recipe_at(bart(32, False))).tied


_DEBERTA = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
HIDDEN_SCALES: dict[str, tuple[str, dict[str, int]]] = {
    "DebertaV2Config": ("DebertaV2ForMaskedLM", _DEBERTA),
    "BloomConfig": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 1, "n_head": 4}),
}


@pytest.mark.parametrize("kind", HIDDEN_SCALES)
def test_attention_that_hides_its_scale_must_not_have_larger_heads(kind: str) -> None:
    architecture, own = HIDDEN_SCALES[kind]

    def at(ratio: int, heads: int) -> PretrainedConfig:
        head_key = next(key for key in ("num_attention_heads", "n_head") if key in own)
        return getattr(transformers, kind)(
            **own | {"vocab_size": 64, "hidden_size": 64 * ratio, head_key: heads}, architectures=[architecture]
        )

    _refused(lambda: plan_for(at(2, 4), recipe_at(at(1, 4))), "head", "scale")
    assert plan_for(at(2, 8), recipe_at(at(1, 4))).entries


def test_heads_of_a_model_that_has_none() -> None:
    def fnet(width: int, **own: int) -> PretrainedConfig:
        return transformers.FNetConfig(
            hidden_size=width, intermediate_size=width, num_hidden_layers=1, vocab_size=64, **own,
            architectures=["FNetForMaskedLM"],
        )  # fmt: skip

    _refused(lambda: plan_for(fnet(64, num_attention_heads=4), recipe_at(fnet(32))), "num_attention_heads", "fnet")


class DrawnOtherwise(transformers.LlamaForCausalLM):
    """One whose weights have a mean."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            module.weight.exponential_()


def test_a_draw_of_a_librarys_matrix_that_is_not_understood() -> None:
    config = _llama()
    with torch.device("meta"):
        model = DrawnOtherwise(config)
    _refused(lambda: plan_for(model, recipe_at(config)), "is not understood", "choose another model")


def test_two_kinds_of_attention_in_one_configuration() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"vision": nn.Module(), "text": nn.Module()})
    for name, size in (("vision", 72), ("text", 128)):
        model[name].attn = type("OwnAttention", (nn.Module,), {"head_dim": size})()
    _refused(lambda: attention_of(model), "128 in text.attn", "72 in vision.attn", "heads of one size")


# ---- the wrong kind of recipe --------------------------------------------------------------------------------------


def _megatron() -> Recipe:
    model = ModelFile(num_layers=1, hidden_size=32, num_attention_heads=2, seq_length=8, vocab_size=64)
    return recipe({"base": model.model_dump(mode="json"), "hyperparameters": {"lr": 0.01}}, source="r.yaml")


def _of_module() -> Recipe:
    base = module_base(lambda: nn.Linear(4, 8), lambda: nn.Linear(4, 16))
    return recipe({"base": base.model_dump(mode="json"), "hyperparameters": {"lr": 0.01}}, source="r.yaml")


@pytest.mark.parametrize("make", [_megatron, _of_module])
def test_a_recipe_for_another_library(make: Callable[[], Recipe]) -> None:
    _refused(lambda: plan_for(_llama(), make()), "not a Hugging Face configuration")


def test_a_hugging_face_recipe_for_another_library() -> None:
    target = _megatron().base
    assert isinstance(target, ModelFile)
    _refused(lambda: _recipe().plan(target), "Hugging Face configuration", "Megatron-Core")
    _refused(lambda: plan_for_module(lambda: nn.Linear(4, 8), _recipe()), "not a torch module")


# ---- applying ------------------------------------------------------------------------------------------------------


def test_a_plan_is_applied_once() -> None:
    model = built("llama", _llama())
    plan = plan_for(model, _recipe())
    apply_plan(model, plan)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    _refused(lambda: apply_plan(model, plan), "applied to this model already")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_plan_for_another_model() -> None:
    plan = plan_for(_llama(), _recipe())
    with pytest.raises(InputError, match=r"the model's shape is \(64, 128\), the plan's \(64, 64\)"):
        apply_plan(built("llama", _llama(128)), plan)
    with pytest.raises(InputError, match=r"model\.layers\.2\..*the plan has not"):
        apply_plan(built("llama", _llama(n=3)), plan)
    with pytest.raises(InputError, match=r"model\.layers\.1\..*the model has not"):
        apply_plan(built("llama", _llama(n=1)), plan)


def test_attention_that_cannot_be_told_is_refused_before_anything_changes() -> None:
    target = with_class("gpt2", with_heads_growing("gpt2", 128))
    model = built("gpt2", target)
    plan = plan_for(model, recipe_at(with_heads_growing("gpt2", 64)))
    for block in model.transformer.h:
        del block.attn.scaling
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    _refused(lambda: apply_plan(model, plan), "GPT2Attention has no scale to set")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_attentions_of_which_only_some_can_be_told_are_refused() -> None:
    """BigBirdPegasus: its decoder has a scale, the block-sparse attention of its encoder has none to set."""
    own = transformers.BigBirdPegasusConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        scale_embedding=False, architectures=["BigBirdPegasusForConditionalGeneration"],
    )  # fmt: skip
    _refused(lambda: plan_for(own, recipe_at(own, hyperparameters={"attention_multiplier": 2.0})), "no scale to set")
