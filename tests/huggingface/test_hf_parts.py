"""State spaces, encoders, two stacks, and several models in one: small ones of the library, live.

Which tensors are hidden is asked of microsoft/mup; what it has no rule for (a start that is kept, heads of several
sizes, narrow weights between two parts) is written out.
"""

import copy
import functools
import logging
import math
from typing import Any

import mup
import pytest
import torch
import transformers
from support.hf_families import recipe_at
from support.hf_parts import MODELS, live, parts
from transformers import PretrainedConfig

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, plan_for
from mup_megatron.modules.attention import attentions_of
from mup_megatron.theory import Plan, PlanEntry, Property, Role

BASE, WIDTH = 32, 128
RATIO = WIDTH // BASE
ETA, EPS, LAMBDA = 0.01, 1e-6, 0.1


def planned(base: PretrainedConfig, target: PretrainedConfig, **hyperparameters: Any) -> Plan:
    std = next((own.initializer_range for own in (base, *_inner(base)) if hasattr(own, "initializer_range")), 0.02)
    own = {"lr": ETA, "adam_eps": EPS, "weight_decay": LAMBDA, "init_method_std": std} | hyperparameters
    return plan_for(target, recipe_at(base, hyperparameters=own))


def _inner(config: PretrainedConfig) -> list[PretrainedConfig]:
    return [own for own in vars(config).values() if isinstance(own, PretrainedConfig)]


@functools.cache
def plan_of(name: str) -> Plan:
    """The plan of a model as it is in `MODELS`, made once: several tests look at it."""
    return plan(name)


@functools.cache
def plan_at_base(name: str) -> Plan:
    """The plan of a base for itself."""
    return planned(parts(name, BASE), parts(name, BASE))


def plan(name: str, base: dict[str, Any] | None = None, target: dict[str, Any] | None = None, **own: Any) -> Plan:
    return planned(parts(name, BASE, **base or {}), parts(name, WIDTH, **target or {}), **own)


def ending(found: Plan, end: str) -> PlanEntry:
    return next(entry for entry in found.entries if entry.name.endswith(end))


def got(entry: PlanEntry) -> tuple[Any, ...]:
    return entry.role, entry.lr / ETA, entry.eps, entry.weight_decay, entry.multiplier


def near(role: Role, *numbers: float) -> tuple[Any, ...]:
    return (role, *(pytest.approx(number, rel=1e-12) for number in numbers))


HIDDEN = near(Role.HIDDEN, 1 / RATIO, EPS / RATIO, LAMBDA * RATIO, 1.0)
NARROW = near(Role.HIDDEN, 1 / RATIO, EPS, LAMBDA * RATIO, 1.0)
"""A bottleneck of one size at base and target."""
OUTPUT = near(Role.OUTPUT, 1.0, EPS / RATIO, LAMBDA, 1 / RATIO)
INPUT = near(Role.INPUT, 1.0, EPS / RATIO, LAMBDA, 1.0)
VECTOR = near(Role.INPUT, 1.0, EPS / RATIO, 0.0, 1.0)


# ---- every model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_has_each_parameter_and_its_draw_is_applied(name: str) -> None:
    found, model = plan_of(name), live(parts(name, WIDTH))
    assert [(e.name, e.shape) for e in found.entries] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    apply_plan(model, found)
    for entry, parameter in zip(found.entries, model.parameters(), strict=True):
        if entry.init_std is None:
            assert torch.equal(parameter, before[entry.name]), entry.name
        else:
            rms = parameter.detach().double().square().mean().sqrt().item()
            assert rms == pytest.approx(entry.init_std, rel=6 / (2 * parameter.numel()) ** 0.5 + 1e-3), entry.name


@pytest.mark.parametrize("name", MODELS)
def test_at_the_base_nothing_changes(name: str) -> None:
    config = parts(name, BASE)
    stock, ours = live(config), live(config)
    apply_plan(ours, plan_at_base(name))
    assert all(map(torch.equal, stock.parameters(), ours.parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())
    assert attentions_of(ours) == attentions_of(stock)


# Of the tensors of these a side stays that mup therefore takes for finite, inside the model.
BOTTLENECKS = {
    "clip": ("visual_projection.weight", "text_projection.weight"),
    "jamba": ("x_proj.weight", "dt_proj.weight"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_hidden_is_what_microsoft_mup_takes_for_it(name: str) -> None:
    found = plan_of(name)
    with torch.device("meta"):
        model, small, wider = (
            getattr(transformers, MODELS[name][0])(parts(name, width)) for width in (WIDTH, BASE, 3 * BASE)
        )
    mup.set_base_shapes(model, small, delta=wider, rescale_params=False, do_assert=False)
    for key, parameter in model.named_parameters():
        entry, shape = found[key], parameter.infshape
        if key.endswith((*BOTTLENECKS.get(name, ()), "A_log")):
            continue
        hidden = shape.ninf() == 2
        assert (entry.role is Role.HIDDEN) == hidden, key
        assert entry.lr / ETA == pytest.approx(1 / shape.width_mult() if hidden else 1.0), key


# ---- state spaces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "mamba2", "nemotron_h", "bamba", "falcon_h1", "jamba"])
def test_a_mixers_vectors_keep_their_start_and_its_convolution_is_no_matrix(name: str) -> None:
    found = plan_of(name)
    for end in ("A_log", "D"):
        entry = ending(found, f".{end}")
        assert got(entry) == VECTOR, end
        assert entry.init_std is None
    assert ending(found, ".A_log").init_value is None
    convolution = ending(found, "conv1d.weight")
    r_out = convolution.shape[0] / ending(plan_at_base(name), "conv1d.weight").shape[0]
    assert got(convolution) == near(Role.INPUT, 1.0, EPS / r_out, LAMBDA, 1.0)
    assert convolution.init_std == convolution.library_std
    assert got(ending(found, "out_proj.weight")) == HIDDEN
    assert ending(found, "in_proj.weight").role is Role.HIDDEN


def test_steps_of_a_fixed_rank_are_a_bottleneck_and_no_readout() -> None:
    found = plan_of("jamba")
    assert got(ending(found, "x_proj.weight")) == NARROW
    assert ending(found, "dt_proj.weight").width_ratio == 1.0
    growing = plan("jamba", target={"mamba_dt_rank": 16})
    assert ending(growing, "x_proj.weight").eps == pytest.approx(EPS / (32 / 20))
    assert ending(growing, "dt_proj.weight").width_ratio == RATIO


def test_a_feed_forward_part_of_a_fixed_size_is_a_bottleneck_whatever_its_key_is_called() -> None:
    sizes = {"n_layer": 2, "vocab_size": 64, "n_positions": 32, "architectures": ["CTRLLMHeadModel"]}
    base, target = (
        transformers.CTRLConfig(n_embd=width, n_head=width // 16, dff=48, **sizes) for width in (BASE, WIDTH)
    )
    found = planned(base, target)
    assert got(ending(found, "h.1.ffn.0.weight")) == NARROW
    assert ending(found, "h.1.ffn.0.weight").init_std == pytest.approx(0.02 / math.sqrt(RATIO))
    assert got(ending(found, "h.1.ffn.2.weight"))[1:] == INPUT[1:]


def test_a_state_that_grows_is_accepted_with_a_remark(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan("mamba2")
        assert "state_size" not in caplog.text
        plan("mamba2", target={"state_size": 32})
    assert "state_size differs" in caplog.text


# ---- fixed tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("whisper", "encoder.embed_positions.weight"),
        ("marian", "decoder.embed_positions.weight"),
        ("distilbert", "position_embeddings.weight"),
    ],
)
def test_sinusoids_are_neither_drawn_nor_multiplied(name: str, table: str) -> None:
    found, model = plan(name, init_method_std=0.05, embedding_multiplier=3.0), live(parts(name, WIDTH))
    entry = ending(found, table)
    before = model.get_parameter(entry.name).clone()
    assert (entry.init_std, entry.init_value, entry.multiplier) == (None, None, 1.0)
    apply_plan(model, found)
    assert torch.equal(model.get_parameter(entry.name), before)
    assert not model.get_submodule(entry.module)._forward_hooks


# ---- encoders and two stacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "end", "expected"),
    [
        ("roberta", "lm_head.dense.weight", HIDDEN),
        ("roberta", "token_type_embeddings.weight", INPUT),
        ("electra", "embeddings_project.weight", HIDDEN),
        ("electra", "discriminator_predictions.dense.weight", HIDDEN),
        ("electra", "dense_prediction.weight", OUTPUT),
        ("albert", "embedding_hidden_mapping_in.weight", HIDDEN),
        ("albert", "predictions.dense.weight", HIDDEN),
        ("albert", "pooler.weight", HIDDEN),
        ("albert", "sop_classifier.classifier.weight", OUTPUT),
        ("squeezebert", "attention.query.weight", HIDDEN),
        ("deberta-v2", "rel_embeddings.weight", INPUT),
        ("modernbert", "head.dense.weight", HIDDEN),
        ("bart", "encoder_attn.q_proj.weight", HIDDEN),
        ("bart", "encoder_attn.out_proj.weight", HIDDEN),
        ("whisper", "conv1.weight", INPUT),
        ("whisper", "conv2.weight", HIDDEN),
        ("clip", "patch_embedding.weight", INPUT),
        ("clip", "visual_projection.weight", NARROW),
        ("clip", "text_projection.weight", NARROW),
        ("gemma3", "mm_input_projection_weight", HIDDEN),
        ("llava", "multi_modal_projector.linear_1.weight", HIDDEN),
        ("qwen3_vl", "merger.linear_fc2.weight", HIDDEN),
    ],
)
def test_what_tensors_get(name: str, end: str, expected: Any) -> None:
    assert got(ending(plan_of(name), end)) == expected


def test_a_class_token_keeps_the_bases_std() -> None:
    entry = ending(plan_of("clip"), "class_embedding")
    assert got(entry) == VECTOR
    assert entry.init_std == pytest.approx((2 * BASE) ** -0.5)
    assert entry.library_std == pytest.approx((2 * WIDTH) ** -0.5)


def test_each_stack_has_a_depth_of_its_own() -> None:
    deeper = plan("bart", target={"encoder_layers": 3, "decoder_layers": 1})
    assert got(ending(deeper, "encoder.layers.2.fc1.weight")) == HIDDEN
    assert not [entry for entry in deeper.entries if "decoder.layers.1." in entry.name]


# ---- several models in one -----------------------------------------------------------------------------------------


def test_each_tower_has_the_ratios_of_its_own_widths() -> None:
    found = plan("clip", target={"vision_config": parts("clip", BASE).vision_config.to_dict()})
    assert ending(found, "text_model.encoder.layers.0.mlp.fc1.weight").width_ratio == RATIO
    assert ending(found, "vision_model.encoder.layers.0.mlp.fc1.weight").width_ratio == 1.0


def test_each_tower_has_the_scale_of_its_own_heads() -> None:
    # Heads of 16 → 64 in the text, of 8 → 8 in what looks at images.
    found = plan("llava", target={"text_config": {"num_attention_heads": 2, "num_key_value_heads": 1}})
    model = live(parts("llava", WIDTH, text_config={"num_attention_heads": 2, "num_key_value_heads": 1}))
    apply_plan(model, found)
    scales = {name: attention.scale for name, attention in attentions_of(model).items()}
    text, vision = ([s for name, s in scales.items() if part in name] for part in ("language_model", "vision_tower"))
    assert text == [pytest.approx(math.sqrt(16) / 64)] * 2
    assert vision == [pytest.approx(8**-0.5)] * 2


def test_a_key_that_the_type_does_not_have_is_passed_over() -> None:
    own = {"vision_config": {"vt_hidden_size": 1}}
    assert plan("qwen3_vl", target=own).entries == plan_of("qwen3_vl").entries


# ---- plan or refusal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base", "target", "words"),
    [
        ("squeezebert", {}, {"q_groups": 2}, "q_groups is 4"),
        ("mamba2", {}, {"conv_kernel": 8}, "conv_kernel is 4"),
        ("llava", {}, {"text_config": {"vocab_size": 128}}, "text_config.vocab_size is 64"),
        ("clip", {}, {"vision_config": {"patch_size": 4}}, "vision_config.patch_size is 8"),
        ("bart", {"scale_embedding": True}, {"scale_embedding": False}, "scale_embedding is True"),
        ("whisper", {}, {"num_mel_bins": 16}, "num_mel_bins is 8"),
    ],
)
def test_what_is_refused_names_its_key(name: str, base: dict[str, Any], target: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as raised:
        plan(name, base, target)
    message = str(raised.value)
    assert len(message) <= 300
    assert words in message, message


def test_embeddings_are_multiplied_as_at_the_base() -> None:
    scaled = {"scale_embedding": True}
    found = plan("bart", scaled, scaled)
    model, stock = live(parts("bart", WIDTH, **scaled)), live(parts("bart", WIDTH, **scaled))
    table = stock.get_encoder().embed_tokens
    apply_plan(model, found)
    with torch.no_grad():
        ours, theirs = (each(torch.arange(8)[None]) for each in (model.get_encoder().embed_tokens, table))
    torch.testing.assert_close(ours, theirs * RATIO**-0.5)


def test_properties_of_a_table_that_is_kept() -> None:
    assert Property.EMBEDDING not in ending(plan_of("whisper"), "encoder.embed_positions.weight").properties
    assert Property.EMBEDDING in ending(plan_of("whisper"), "decoder.embed_tokens.weight").properties
    assert copy.deepcopy(plan_of("whisper")) == plan_of("whisper")
