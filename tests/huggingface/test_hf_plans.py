"""Plans of Hugging Face models, written out by hand where microsoft/mup has no say: eps, sides that stay, depth, names.

What mup does say is in `test_hf_oracle.py`.
"""

import functools
import re
from typing import Any

import pytest
import torch
import transformers
from support.hf_families import FAMILIES, config, recipe_at
from support.hf_models import ATTENTION, built, with_class, with_heads_growing
from transformers import PretrainedConfig

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, plan_for
from mup_megatron.recipe import load_recipe, save_recipe
from mup_megatron.theory import Plan, Property, Role

BASE, WIDTH = 32, 128
HYPERPARAMETERS = {"lr": 0.01, "adam_eps": 1e-6, "weight_decay": 0.1}


def plan(
    family: str, base: PretrainedConfig | None = None, target: PretrainedConfig | None = None, **content: Any
) -> Plan:
    """By default four times as wide as the base and one layer deeper."""
    own = content.pop("hyperparameters", {})
    recipe = recipe_at(base or config(family, BASE), hyperparameters=HYPERPARAMETERS | own, **content)
    return plan_for(with_class(family, target or _deep(family, WIDTH)), recipe)


@functools.cache
def plan_of(family: str) -> Plan:
    """The plan of all defaults, made once: several tests look at it."""
    return plan(family)


def _deep(family: str, width: int, **changes: Any) -> PretrainedConfig:
    return config(family, width, **{"n": 2 if family == "resnet" else 3} | changes)


def _roles(found: Plan) -> dict[str, Role]:
    return {re.sub(r"\.\d+(?=\.|$)", ".*", entry.name): entry.role for entry in found.entries}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_the_model_has_an_entry(family: str) -> None:
    found, model = plan_of(family), built(family, _deep(family, WIDTH))
    assert [(e.name, e.shape) for e in found.entries] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_configuration_give_one_plan(family: str) -> None:
    recipe = recipe_at(config(family, BASE), hyperparameters=HYPERPARAMETERS)
    assert plan_for(built(family, _deep(family, WIDTH)), recipe) == plan_of(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_librarys_draw_is_that_of_a_live_model(family: str) -> None:
    own = config(family, WIDTH)
    found = plan(family, base=own, target=config(family, WIDTH))
    for name, parameter in built(family, own).named_parameters():
        entry = found[name]
        weight = parameter.detach().double()
        if entry.init_std is None:
            assert weight.unique().tolist() == [entry.init_value], name
            continue
        assert entry.init_std == entry.library_std, name
        error = 5 / (2 * weight.numel()) ** 0.5 + 1e-3
        assert entry.library_std == pytest.approx(weight.square().mean().sqrt().item(), rel=error), name
        assert weight.mean().abs() < 5 * entry.library_std / weight.numel() ** 0.5, name


@pytest.mark.parametrize("family", ["llama", "bert", "opt"])
def test_a_row_for_padding_does_not_count(family: str) -> None:
    own = {"pad_token_id": 1}
    found = plan(family, base=config(family, BASE, **own), target=config(family, WIDTH, **own))
    assert found.entries[0].library_std == 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tuned_std_is_in_proportion_to_the_librarys(family: str) -> None:
    before, after = plan_of(family), plan(family, hyperparameters={"init_method_std": 0.05})
    for one, other in zip(before.entries, after.entries, strict=True):
        assert other.library_std == one.library_std
        assert (other.init_std is None) == (one.init_std is None)
        if one.init_std is not None:
            assert other.init_std == pytest.approx(2.5 * one.init_std, rel=1e-12)


def test_the_tuned_std_is_relative_to_the_configurations_own() -> None:
    base, target = (config("llama", w, initializer_range=0.04) for w in (BASE, WIDTH))
    found = plan("llama", base, target, hyperparameters={"init_method_std": 0.04})
    assert found["lm_head.weight"].init_std == 0.04
    # The base decides: what the target says of its own draws is what is multiplied.
    other = plan(
        "llama", base, config("llama", WIDTH, initializer_range=0.1), hyperparameters={"init_method_std": 0.04}
    )
    assert (other["lm_head.weight"].init_std, other["lm_head.weight"].library_std) == (0.04, 0.1)


# ---- eps -----------------------------------------------------------------------------------------------------------

EPS = {Role.INPUT: 1e-6 / 4, Role.HIDDEN: 1e-6 / 4, Role.OUTPUT: 1e-6 / 4, Role.SCALAR: 1e-6}


@pytest.mark.parametrize("family", FAMILIES)
def test_eps_falls_with_the_gradient(family: str) -> None:
    found = plan_of(family)
    assert {role for role, eps in ((e.role, e.eps) for e in found.entries) if eps != EPS[role]} == set()


# ---- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_more_changes_nothing_but_depth(family: str) -> None:
    shallow, deep = plan(family, target=config(family, WIDTH)), plan_of(family)
    assert len(deep.entries) > len(shallow.entries)
    for entry in shallow.entries:
        other = deep[entry.name]
        assert (other.lr, other.weight_decay, other.eps, other.width_ratio, other.multiplier) == (
            entry.lr, entry.weight_decay, entry.eps, entry.width_ratio, entry.multiplier
        )  # fmt: skip
        if not (family == "gpt2" and entry.name.endswith("c_proj.weight")):
            assert other.init_std == entry.init_std


def test_gpt2_scales_what_writes_into_the_residual_with_the_targets_depth() -> None:
    name = "transformer.h.0.mlp.c_proj.weight"
    for layers in (1, 2, 5):
        found = plan("gpt2", target=config("gpt2", WIDTH, n=layers))[name]
        assert found.init_std == pytest.approx(0.02 / (2 * layers) ** 0.5 / 2, rel=1e-12)
        assert found.library_std == pytest.approx(0.02 / (2 * layers) ** 0.5, rel=1e-12)


# ---- sides that stay -----------------------------------------------------------------------------------------------

FFN = {
    "gpt2": ("n_inner", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"),
    "llama": ("intermediate_size", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
    "bert": ("intermediate_size", "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"),
    "opt": ("ffn_dim", "model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"),
    "t5": ("d_ff", "encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0.layer.1.DenseReluDense.wo"),
}


@pytest.mark.parametrize("family", FFN)
def test_an_ffn_that_stays_is_hidden_all_the_same(family: str) -> None:
    key, fc1, fc2 = FFN[family][0], *(f"{name}.weight" for name in FFN[family][1:])
    found = plan(family, config(family, BASE, **{key: 96}), config(family, WIDTH, **{key: 96}))
    into, out = found[fc1], found[fc2]
    assert (into.role, out.role) == (Role.HIDDEN, Role.HIDDEN)
    # fc1 sums over four times as much and has as many outputs as before; fc2 the other way round.
    assert (into.width_ratio, into.lr, into.weight_decay, into.eps) == (4.0, 0.0025, 0.4, 1e-6)
    assert (out.width_ratio, out.lr, out.weight_decay, out.eps) == (1.0, 0.01, 0.1, 2.5e-7)
    assert (
        out.init_std == plan(family, config(family, BASE, **{key: 96}), config(family, BASE, **{key: 96}))[fc2].init_std
    )


def test_heads_of_keys_that_stay() -> None:
    base = config("llama", BASE, num_key_value_heads=1)
    found = plan("llama", base, config("llama", WIDTH, num_key_value_heads=1))
    q, k, v, o = (found[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkvo")
    assert {x.role for x in (q, k, v, o)} == {Role.HIDDEN}
    assert {x.multiplier for x in (q, k, v, o)} == {1.0}
    assert {x.lr for x in (q, k, v, o)} == {0.0025}
    # Their outputs are as many as before, so their gradients as large.
    assert [x.eps for x in (q, k, v, o)] == [2.5e-7, 1e-6, 1e-6, 2.5e-7]


# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_keeps_its_scale_where_heads_grow_in_number(family: str) -> None:
    found = plan_of(family)
    size = 32 if family == "qwen3" else 16
    assert found.head_size == size
    assert found.softmax_scale == (1.0 if family == "t5" else size**-0.5)
    assert not found.changes_softmax_scale


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_is_one_over_d_where_heads_grow_in_size(family: str) -> None:
    base, target = with_heads_growing(family, 64), with_heads_growing(family, 256)
    found = plan(family, base, target, hyperparameters={"attention_multiplier": 1.5})
    assert found.head_size == 64
    # At the base √16 or, in T5, nothing; from there on as 1/d.
    assert found.softmax_scale == pytest.approx(1.5 * (0.25 if family == "t5" else 4**-1 * 0.25), rel=1e-12)
    assert found.changes_softmax_scale


def test_norms_of_queries_grow_with_heads_alone() -> None:
    gain = "model.layers.0.self_attn.q_norm.weight"
    vector = {Property.VECTOR, Property.GAIN}
    fixed = plan_of("qwen3")[gain]
    assert (fixed.role, set(fixed.properties), fixed.eps) == (Role.SCALAR, vector, 1e-6)
    growing = plan("qwen3", with_heads_growing("qwen3", 64), with_heads_growing("qwen3", 256))[gain]
    assert (growing.role, set(growing.properties), growing.eps) == (Role.INPUT, vector, 2.5e-7)


def test_layers_with_a_scale_of_their_own_are_allowed() -> None:
    own = {"scale_attn_by_inverse_layer_idx": True}
    found = plan("gpt2", with_heads_growing("gpt2", 64, **own), with_heads_growing("gpt2", 256, **own))
    assert found.softmax_scale == pytest.approx(4 / 64, rel=1e-12)


# ---- readouts ------------------------------------------------------------------------------------------------------

TIED = {"gpt2": True, "gpt_neox": False, "llama": False, "mistral": False, "qwen2": False, "qwen3": False, "bert": True,
        "opt": True, "t5": True}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TIED)
def test_readouts_tied_and_untied(family: str, tied: bool) -> None:
    own = {"tie_word_embeddings": tied}
    found = plan(
        family,
        config(family, BASE, **own),
        config(family, WIDTH, **own),
        hyperparameters={"output_multiplier": 3.0, "embedding_multiplier": 5.0},
    )
    assert found.readout is not None
    # T5 is always tied here; what it takes from the key is whether it scales the readout, as its release 1.1 does not.
    embedding = tied or family == "t5"
    assert found.tied is embedding
    assert found[found.readout].properties == {Property.EMBEDDING if embedding else Property.READOUT}
    assert found.output_multiplier == 0.75
    assert found[found.readout].multiplier == (5.0 if embedding else 0.75)
    assert found.embedding_multiplier == 5.0
    # Of T5's own 1/√d_model at a tied readout, four times as wide.
    assert found.stock_readout_ratio == pytest.approx(0.5 if family == "t5" and tied else 1.0, rel=1e-12)


def test_a_tied_table_starts_as_its_embedding_and_not_as_its_readout_draws_it() -> None:
    """ModernBERT draws the two with stds of their own, and ties afterwards."""

    def modern(width: int) -> PretrainedConfig:
        return transformers.ModernBertConfig(
            hidden_size=width, intermediate_size=width, num_attention_heads=width // 16, num_hidden_layers=2,
            vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
            architectures=["ModernBertForMaskedLM"],
        )  # fmt: skip

    name = "model.embeddings.tok_embeddings.weight"
    torch.manual_seed(0)
    model = transformers.ModernBertForMaskedLM(modern(128))
    live = model.get_parameter(name).square().mean().sqrt().item()
    found = plan_for(model, recipe_at(modern(64), hyperparameters={"init_method_std": 0.03}))
    assert found.tied
    assert found[name].library_std == pytest.approx(live, rel=0.03)
    apply_plan(model, found)
    assert model.get_parameter(name).std().item() == pytest.approx(1.5 * live, rel=0.03)


def test_tied_by_default_where_the_library_ties() -> None:
    assert {family: plan_of(family).tied for family in TIED} == TIED


def test_berts_two_readouts_and_what_lies_before_them() -> None:
    roles = _roles(plan_of("bert"))
    assert roles["cls.seq_relationship.weight"] is Role.OUTPUT
    assert roles["cls.predictions.bias"] is Role.SCALAR
    assert roles["cls.predictions.transform.dense.weight"] is Role.HIDDEN
    assert roles["bert.pooler.dense.weight"] is Role.HIDDEN


def test_a_readouts_own_factor_is_not_the_other_readouts() -> None:
    own = [{"match": "cls.seq_relationship.weight", "multiplier": 7.0}]
    found = plan("bert", per_parameter=own)
    assert found["cls.seq_relationship.weight"].multiplier == 7.0 / 4
    assert found.output_multiplier == 0.25


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_multiplier_of_what_a_model_has_not_is_refused(family: str) -> None:
    with pytest.raises(InputError, match=r"embedding_multiplier is 2, and the model has no embedding .* Set it to 1\."):
        plan(family, hyperparameters={"embedding_multiplier": 2.0})


def test_a_table_of_relative_positions_grows_with_heads() -> None:
    table = plan_of("t5")["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert (table.role, set(table.properties), table.fan_in, table.fan_out) == (Role.INPUT, set(), 32, 8)
    assert (table.lr, table.weight_decay, table.multiplier, table.eps) == (0.01, 0.1, 1.0, 2.5e-7)
    sized = plan("t5", with_heads_growing("t5", 64), with_heads_growing("t5", 256))
    assert sized[table.name].role is Role.SCALAR


def test_patches_and_tables_that_are_added() -> None:
    found = plan_of("vit")
    patches = found["vit.embeddings.patch_embeddings.projection.weight"]
    assert (patches.role, set(patches.properties), patches.fan_in, patches.fan_out) == (
        Role.INPUT,
        set(),
        3 * 4 * 4,
        128,
    )
    for name in ("vit.embeddings.cls_token", "vit.embeddings.position_embeddings"):
        assert (found[name].role, found[name].lr, found[name].init_std) == (Role.INPUT, 0.01, 0.02)


# ---- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_file_gives_the_same_plan(family: str, tmp_path: Any) -> None:
    own: dict[str, Any] = {"tie_word_embeddings": False} if family == "t5" else {}
    recipe = recipe_at(config(family, BASE, **own), hyperparameters=HYPERPARAMETERS)
    save_recipe(recipe, tmp_path / "a.recipe.yaml")
    again = load_recipe(tmp_path / "a.recipe.yaml")
    assert again.fingerprint == recipe.fingerprint
    target = with_class(family, config(family, WIDTH, **own))
    found = plan_for(target, again)
    assert found == plan_for(target, recipe)
    assert found.fingerprint == recipe.fingerprint


def test_a_plan_leaves_torch_and_the_configuration_alone() -> None:
    target = with_class("llama", config("llama", WIDTH))
    before = target.to_dict()
    generator = torch.random.get_rng_state()
    plan("llama", target=target)
    assert target.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_another_dtype_of_the_target_is_no_other_plan() -> None:
    recipe = recipe_at(config("llama", BASE))
    half = with_class("llama", config("llama", WIDTH, dtype="bfloat16"))
    assert plan_for(half, recipe) == plan_for(with_class("llama", config("llama", WIDTH)), recipe)


def test_other_numbers_of_queries_for_each_key_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="mup_megatron"):
        plan("llama", target=with_class("llama", config("llama", WIDTH)))
        assert "query heads" not in caplog.text
        own = config("llama", BASE)
        groups = own.num_key_value_heads
        plan("llama", target=with_class("llama", config("llama", WIDTH, num_key_value_heads=groups)))
    assert "query heads for each key/value head: 2 at the base, 8 here" in caplog.text
