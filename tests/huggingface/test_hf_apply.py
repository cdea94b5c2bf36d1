"""What a plan makes of a live Hugging Face model: initial weights, multipliers, and the scale that attention uses.

Each is seen in what the model computes, never in an attribute or a hook.
"""

import copy
import functools
import math
from typing import Any

import pytest
import torch
from support import hf_attention
from support.hf_families import FAMILIES, config, recipe_at
from support.hf_models import ATTENTION, CAUSAL, batch, built, loss_of, with_heads_growing
from transformers import PretrainedConfig, PreTrainedModel

from mup_megatron.huggingface import apply_plan, plan_for
from mup_megatron.modules import Initialize, applied_plan
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

WIDTH = 128


def planned(
    family: str, target: PretrainedConfig, base: PretrainedConfig | None = None, **hyperparameters: float
) -> tuple[PreTrainedModel, Plan]:
    """A model in double precision with a plan applied, and the plan."""
    model = built(family, target, dtype=torch.float64).eval()
    plan = plan_for(model, recipe_at(base or config(family, 32), hyperparameters=hyperparameters))
    apply_plan(model, plan)
    return model, plan


@functools.cache
def plan_of_wider_draws(family: str) -> Plan:
    """Its weights do not start with the library's std, at no width."""
    recipe = recipe_at(config(family, 32), hyperparameters={"init_method_std": 0.05})
    return plan_for(built(family, config(family, WIDTH)), recipe)


def like(family: str, model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """A model without a plan that has a model's weights. Tied ones come apart where `changes` say so."""
    own = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(own, key, value)
    plain = built(family, own, dtype=torch.float64).eval()
    plain.load_state_dict(model.state_dict())
    return plain


# ---- initial weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_librarys_own_draw_with_the_plans_std(family: str) -> None:
    target, plan = config(family, WIDTH), plan_of_wider_draws(family)
    model = built(family, target, dtype=torch.float64)
    apply_plan(model, plan)
    changed = 0
    for (name, now), before in zip(
        model.named_parameters(), built(family, target, dtype=torch.float64).parameters(), strict=True
    ):
        entry = plan[name]
        if entry.init_std is None:
            assert torch.equal(now, before), name
            continue
        assert entry.library_std is not None
        torch.testing.assert_close(now, before * (entry.init_std / entry.library_std), rtol=1e-12, atol=0)
        error = 5 / (2 * now.numel()) ** 0.5 + 1e-3
        assert now.square().mean().sqrt().item() == pytest.approx(entry.init_std, rel=error), name
        changed += not torch.equal(now, before)
    assert changed


def test_the_plan_that_was_applied_is_known() -> None:
    model, plan = planned("gpt2", config("gpt2", WIDTH))
    assert applied_plan(model) is plan
    assert applied_plan(like("gpt2", model)) is None


def test_a_tied_table_is_scaled_once() -> None:
    model, _ = planned("gpt2", config("gpt2", WIDTH), init_method_std=0.05)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.05)


# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_uses_the_plans_scale(family: str) -> None:
    """In each back end."""
    model, plan = planned(
        family, with_heads_growing(family, 256), with_heads_growing(family, 64), attention_multiplier=1.5
    )
    if family == "t5":  # its logits are too large for the logarithm of a softmax
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):
                parameter.data.mul_(0.02)
    assert plan.softmax_scale == pytest.approx(1.5 * (16 / 64 if family == "t5" else math.sqrt(16) / 64), rel=1e-12)
    plain = like(family, model)
    if family == "t5":  # its positions are no part of the product
        for name, parameter in (*model.named_parameters(), *plain.named_parameters()):
            if "relative_attention_bias" in name:
                torch.nn.init.zeros_(parameter)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch(family, size=2).items()}
    of_stock = 1.0 if family == "t5" else 64**-0.5
    # T5 has no flash attention: its positions are added to the logits.
    for back_end in ("eager", "sdpa") if family == "t5" else ("eager", "sdpa", hf_attention.FLASH):
        with hf_attention.flash_on_any_device():
            for each in (model, plain):
                hf_attention.use(each, back_end)
            calls = hf_attention.calls(model, inputs)
            assert len(calls) == {"t5": 6}.get(family, 2), back_end
            for call in calls:
                ours, stock = (hf_attention.last_row(each, call, back_end) for each in (model, plain))
                # Eager attention has its softmax in single precision.
                rtol, atol = (1e-3, 1e-5) if back_end == "eager" else (1e-9, 1e-9)
                wanted = stock * (plan.softmax_scale / of_stock)
                torch.testing.assert_close(
                    ours, wanted, rtol=rtol, atol=atol, msg=lambda said, at=back_end: f"{at}: {said}"
                )
                assert ours.abs().max() > 1e-3, back_end


def test_layers_keep_a_scale_of_their_own() -> None:
    own = {"scale_attn_by_inverse_layer_idx": True}
    model, plan = planned("gpt2", with_heads_growing("gpt2", 256, **own), with_heads_growing("gpt2", 64, **own))
    scales = [block.attn.scaling for block in model.transformer.h]
    assert scales == pytest.approx([plan.softmax_scale, plan.softmax_scale / 2])


@pytest.mark.parametrize("family", [*CAUSAL, "t5"])
def test_generation_computes_what_training_computes(family: str) -> None:
    """Multipliers and scale act with a cache of keys and values too, one token at a time."""
    own = {"embedding_multiplier": 3.0, "output_multiplier": 2.0, "attention_multiplier": 1.5}
    model, _ = planned(family, with_heads_growing(family, 256), with_heads_growing(family, 64), **own)
    prompt = batch(family, size=2)["input_ids"][:, :5]
    made = model.generate(
        prompt,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    step_by_step = torch.stack(made.logits, dim=1)
    with torch.no_grad():
        if family == "t5":
            at_once = model(input_ids=prompt, decoder_input_ids=made.sequences[:, :-1]).logits
        else:
            at_once = model(made.sequences).logits[:, 4:-1]
    # The library hands generated logits over in single precision.
    torch.testing.assert_close(step_by_step.double(), at_once, rtol=1e-5, atol=1e-6)
    plain = like(family, model)
    with torch.no_grad():
        other = (
            plain(input_ids=prompt, decoder_input_ids=made.sequences[:, :-1])
            if family == "t5"
            else plain(made.sequences)
        ).logits
    assert (other[:, -at_once.shape[1] :] - at_once).abs().max() > 1e-2


# ---- multipliers ---------------------------------------------------------------------------------------------------

TABLES = {
    "gpt2": ("transformer.wte", "transformer.wpe"),
    "gpt_neox": ("gpt_neox.embed_in",),
    "llama": ("model.embed_tokens",),
    "mistral": ("model.embed_tokens",),
    "qwen2": ("model.embed_tokens",),
    "qwen3": ("model.embed_tokens",),
    "bert": tuple(f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")),
    "opt": ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    "t5": ("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    "vit": (),
    "resnet": (),
}
HEADS = {
    "bert": ("cls.predictions.decoder", "cls.seq_relationship"),
    "vit": ("classifier",),
    "resnet": ("classifier.1",),
}


def _untie(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    for name in names:
        module = model.get_submodule(name)
        module.weight = torch.nn.Parameter(module.weight.detach().clone())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_multipliers_act_on_weights_and_not_on_biases(family: str, tied: bool) -> None:
    ties = {} if family in ("vit", "resnet") else {"tie_word_embeddings": tied}
    own = {"output_multiplier": 2.0} | ({"embedding_multiplier": 3.0} if TABLES[family] else {})
    model, _ = planned(family, config(family, WIDTH, **ties), config(family, 32, **ties), **own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    plain = like(family, model)
    heads = HEADS.get(family, ("embed_out" if hasattr(model, "embed_out") else "lm_head",))
    _untie(plain, (*heads, *TABLES[family]))
    with torch.no_grad():
        for name in TABLES[family]:
            plain.get_submodule(name).weight.mul_(3.0)
        for name in heads:
            # Of T5's own 1/√d, what it is at the base is meant to stay.
            plain.get_submodule(name).weight.mul_(2.0 / 4 / (0.5 if family == "t5" and tied else 1.0))
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch(family).items()}
        ours, theirs = model(**inputs), plain(**inputs)
    keys = ("prediction_logits", "seq_relationship_logits") if family == "bert" else ("logits",)
    for key in keys:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-10, atol=1e-10)
        assert ours[key].abs().max() > 0.01


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit"])
def test_a_weights_own_multiplier_is_its_own(family: str) -> None:
    name = {
        "gpt2": "transformer.h.1.mlp.c_fc.weight",
        "llama": "model.layers.1.self_attn.v_proj.weight",
        "vit": "vit.embeddings.patch_embeddings.projection.weight",
    }[family]
    model = built(family, config(family, WIDTH), dtype=torch.float64).eval()
    recipe = recipe_at(config(family, WIDTH), per_parameter=[{"match": name, "multiplier": 3.0}])
    apply_plan(model, plan_for(model, recipe))
    plain = like(family, model)
    before = loss_of(plain, family)
    with torch.no_grad():
        plain.get_parameter(name).mul_(3.0)
    torch.testing.assert_close(loss_of(model, family), loss_of(plain, family), rtol=1e-12, atol=0)
    assert abs(loss_of(model, family) - before) > 1e-6


@pytest.mark.parametrize("family", ["vit"])
@pytest.mark.parametrize("name", ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"])
def test_a_multiplier_on_what_is_no_layer_is_refused(family: str, name: str) -> None:
    model = built(family, config(family, WIDTH))
    plan = plan_for(model, recipe_at(config(family, 32), per_parameter=[{"match": name, "multiplier": 3.0}]))
    with pytest.raises(ValueError, match=f"^{name}: .*multiplier"):
        apply_plan(model, plan)


def test_multipliers_survive_a_copy_and_half_precision() -> None:
    model, _ = planned("llama", config("llama", WIDTH), output_multiplier=2.0)
    loss = loss_of(model, "llama")
    assert torch.equal(loss_of(copy.deepcopy(model), "llama"), loss)
    half = loss_of(model.to(torch.bfloat16), "llama")
    assert half.float().item() == pytest.approx(loss.item(), rel=0.02)


def test_recomputation_gives_the_same_gradients() -> None:
    model, _ = planned("llama", config("llama", WIDTH), output_multiplier=2.0, embedding_multiplier=3.0)
    model.train()
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            # Older releases of transformers have the other name alone.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        loss_of(model, "llama").backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


# ---- weights that are not as drawn ---------------------------------------------------------------------------------


def test_loaded_weights_are_refused_and_can_be_kept() -> None:
    target = config("llama", WIDTH)
    model = built("llama", target)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    weights = copy.deepcopy(model.state_dict())
    plan = plan_for(model, _recipe("llama"))
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj\.weight .* not as the library draws"
    ) as raised:
        apply_plan(model, plan)
    assert '"keep"' in str(raised.value)
    assert "\n" not in str(raised.value)
    assert applied_plan(model) is None
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    apply_plan(model, plan, initialize=Initialize.KEEP)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    # What is no weight acts.
    plain = built("llama", target)
    plain.load_state_dict(weights)
    assert abs(loss_of(model, "llama") - loss_of(plain, "llama")) > 1e-3


@pytest.mark.parametrize("change", ["one tensor", "one step"])
def test_weights_that_were_changed_are_noticed(change: str) -> None:
    model = built("gpt2", config("gpt2", WIDTH))
    if change == "one tensor":
        torch.nn.init.normal_(model.transformer.h[1].mlp.c_fc.weight, std=0.021)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(3):
            loss_of(model, "gpt2").backward()
            optimizer.step()
    with pytest.raises(ValueError, match="not as the library draws it"):
        apply_plan(model, plan_for(model, _recipe("gpt2")))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_can_be_drawn_anew(family: str) -> None:
    model, plan = built(family, config(family, WIDTH)), plan_of_wider_draws(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(2)
    apply_plan(model, plan, initialize=Initialize.REDRAW)
    for name, parameter in model.named_parameters():
        entry = plan[name]
        if entry.init_std is None:
            assert parameter.unique().tolist() == [entry.init_value], name
        else:
            error = 5 / (2 * parameter.numel()) ** 0.5
            assert parameter.square().mean().sqrt().item() == pytest.approx(entry.init_std, rel=error), name


def _recipe(family: str) -> Recipe:
    return recipe_at(config(family, 32), hyperparameters={"output_multiplier": 2.0})
