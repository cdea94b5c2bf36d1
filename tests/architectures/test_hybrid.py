"""Hybrid models: what is stated of them against the live model, their proxies, and how a GPT's recipe meets them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import LATENT as SMALL_LATENT
from support.shapes import MAMBA, gpt, hybrid, recipe_for
from support.stock import Layout

from mup_megatron.architectures.hybrid import HYBRID, HybridFile, require_release
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.pattern import Pattern
from mup_megatron.architectures.proxy import Search, choose_proxy
from mup_megatron.architectures.registry import architecture_of, load_model_file, model_file, shapes_of
from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import PerParameter

Shapes = dict[str, tuple[int, ...]]
FURTHER: dict[str, Any] = {
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,  # Megatron cannot save tied ones on several stages
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 16, "add_bias_linear": False}
LATENT: dict[str, Any] = {**SMALL_LATENT, "kv_channels": None}

MODELS: dict[str, HybridFile] = {
    "as a GPT": hybrid(gpt()),
    "another order": hybrid(gpt(), "-**-"),
    "untied, gated, RMSNorm, rotary, no biases": hybrid(
        gpt(
            untie_embeddings_and_output_weights=True,
            swiglu=True,
            normalization="RMSNorm",
            position_embedding_type="rope",
            add_bias_linear=False,
        ),
        "*--*",
    ),
    "grouped queries, own head size": hybrid(
        gpt(kv_channels=6, num_attention_heads=4, group_query_attention=True, num_query_groups=2)
    ),
    "Mamba": hybrid(gpt(), "*-M-", **MAMBA),
    "Mamba, own heads, RMSNorm, untied": hybrid(
        gpt(normalization="RMSNorm", untie_embeddings_and_output_weights=True), "MM*M", **MAMBA, mamba_num_heads=6
    ),
    "multi-token prediction": hybrid(gpt(**FURTHER), "*-*-/*-/*-"),
    "multi-token prediction of kinds that the stack has not": hybrid(
        gpt(**FURTHER, normalization="RMSNorm"), "**/M-E", **MAMBA, **EXPERTS
    ),
    "latent attention": hybrid(gpt(**LATENT), "+-+-"),
    "latent attention with all else": hybrid(
        gpt(**FURTHER | LATENT, swiglu=True), "+ME-/+-", **MAMBA, **EXPERTS | {"q_lora_rank": None}
    ),
}


def _is_known(model: HybridFile) -> bool:
    """Whether the installed release has all of its pattern."""
    try:
        require_release(model.hybrid_layer_pattern, core_version()[:2])
    except InputError:
        return False
    return True


LAYOUTS: dict[str, tuple[Layout, bool]] = {
    "TP1": (Layout(), False),
    "TP2": (Layout(tp=2), False),
    "PP2, split evenly": (Layout(pp=2), False),
    "PP2, as the pattern says": (Layout(pp=2), True),
    "EP2": (Layout(dp=2, ep=2), False),
}


def _parted(model: HybridFile) -> HybridFile:
    """The same with stages of one layer and of three."""
    pattern = replace(model.pattern, stages=(model.letters[:1], model.letters[1:]))
    return model.model_copy(update={"hybrid_layer_pattern": str(pattern)})


def live_shapes(models: list[HybridFile], layout: Layout) -> list[Shapes]:
    """In a rank: global name → global shape of what it would save, which no code of the package has a part in."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from mup_megatron.megatron.builders import build_chunk

    found = []
    for model in models:
        stock.init_parallel(layout)
        fields = architecture_of(model).config(model)
        config = stock.transformer_config(planned.sizes_of(model, layout.tp), layout, **fields)
        shapes: Shapes = {}
        for entry in nested_values(build_chunk(model, config, None).sharded_state_dict()):
            # The two halves of a gated layer are saved apart, and the rows of a Mamba layer under names of their own.
            parts = list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
            own = {part.key: tuple(part.global_shape) for part in parts if isinstance(part, ShardedTensor)}
            if len(own) > 1:
                [rest] = {shape[1:] for shape in own.values()}
                own = {entry.key: (sum(shape[0] for shape in own.values()), *rest)}
            shapes |= own
        found.append(shapes)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_are_those_of_the_live_model(layout: str) -> None:
    how, parted = LAYOUTS[layout]
    if parted and core_version() < (0, 17, 0):
        pytest.skip("megatron-core 0.16 splits evenly")
    known = [model for model in MODELS.values() if _is_known(model) and (how.ep == 1 or model.num_experts)]
    models = [_parted(model) if parted else model for model in known]
    ranks = run_ranks(live_shapes, how.world_size, models, how)
    for index, model in enumerate(models):
        live = {name: shape for rank in ranks for name, shape in rank[index].items()}
        _, stated = shapes_of(model, model)
        expected: Shapes = {}
        for tensor in stated.tensors:
            shape = tensor.shape
            if tensor.padded_to is not None:
                shape = (model.padded_vocab_size(how.tp), *shape[1:])
            # All experts of a layer are saved as one tensor.
            name, one_of_many = re.subn(r"\.local_experts\.\d+\.", ".experts.", tensor.name)
            expected[name] = (model.num_experts or 0, *shape) if one_of_many else shape
        assert live == expected


AS_GPTS: dict[str, tuple[dict[str, Any], str]] = {
    "attention": ({}, "*-*-"),
    "multi-token prediction": ({"mtp_num_layers": 2, "position_embedding_type": "rope"}, "*-*-/*-/*-"),
    "latent attention with experts": (
        {**LATENT, **EXPERTS, "moe_layer_freq": [0, 1], "mtp_num_layers": 1},
        "+-+E/+E",
    ),
}
"""Keys of a GPT → the pattern that is equal to it."""


def _as_hybrid(model: ModelFile, pattern: str) -> HybridFile:
    return hybrid(model, pattern, moe_layer_freq=1)


@pytest.mark.parametrize("kind", AS_GPTS)
def test_a_gpts_recipe_gives_each_parameter_what_it_gives_the_gpts(kind: str) -> None:
    """And the reverse; a pattern of `per_parameter` means the names of the base."""
    changes, pattern = AS_GPTS[kind]
    base, target = gpt(**changes), gpt(4, **changes)
    plans = [
        recipe_for(tuned).plan(model)
        for tuned in (base, _as_hybrid(base, pattern))
        for model in (target, _as_hybrid(target, pattern))
    ]
    for plan in plans:
        assert sum(stack.depth for stack in plan.stacks.values()) == 4
        assert [_without_name(entry) for entry in plan.entries] == [_without_name(entry) for entry in plans[0].entries]


def _without_name(entry: Any) -> tuple[Any, ...]:
    return (entry.role, entry.shape, entry.init_std, entry.multiplier, entry.lr, entry.eps, entry.weight_decay)


def live_runs(kind: str) -> list[list[float]]:
    """In a rank: losses of a target with its plan, as a GPT and as the equal hybrid model, from the same weights."""
    changes, pattern = AS_GPTS[kind]
    tuned, target = recipe_for(gpt(**changes), lr=0.01), gpt(4, **changes)
    found: list[list[float]] = []
    weights: list[torch.Tensor] = []

    def alike(chunks: list[Any]) -> None:
        """Their parameters are the same, in the same order but for those of experts."""
        own = [parameter.detach() for parameter in chunks[0].parameters()]
        weights[:] = weights or [parameter.clone() for parameter in own]
        for parameter, value in zip(own, weights, strict=True):
            parameter.copy_(value)

    for model in (target, _as_hybrid(target, pattern)):
        run = planned.prepare(tuned, model, Layout(), edit=alike, initialize=False)
        found.append(stock.train(run, 5))
    return found


@pytest.mark.parametrize("kind", ["multi-token prediction", "latent attention with experts"])
def test_as_either_of_them_it_learns_the_same(kind: str) -> None:
    """Megatron's own GPT says what multi-token prediction and latent attention of a pattern compute."""
    try:
        require_release(AS_GPTS[kind][1], core_version()[:2])
    except InputError:
        pytest.skip("megatron-core 0.16 has no such pattern")
    [[as_gpt, as_hybrid]] = run_ranks(live_runs, 1, kind)
    assert as_hybrid == pytest.approx(as_gpt, abs=1e-6)
    assert as_gpt[-1] < as_gpt[0] - 0.05


@pytest.mark.parametrize("pattern", ["*-*", "-*-*", "**--"])
def test_a_gpts_recipe_is_none_for_another_pattern(pattern: str) -> None:
    with pytest.raises(InputError, match="base is a GPT and the target a hybrid model, which are not one model"):
        recipe_for(gpt()).plan(hybrid(gpt(4), pattern))


# ---- proxies ---------------------------------------------------------------------------------------------------------


def _proxy(pattern: str, *, trials: int) -> ModelFile:
    target = hybrid(gpt(32, vocab_size=512, position_embedding_type="none"), pattern)
    return choose_proxy(target, Search(trials=trials, trial_tokens=1.0, target_tokens=100.0), width=64).model


@pytest.mark.parametrize(
    ("pattern", "trials", "letters"),
    [
        ("*-**--" * 4, 1, "*-**--" * 4),
        ("*-**--" * 4, 10**6, "*-**--" * 2),
        ("*-" * 16, 10**6, "*-" * 4),
        ("*-|*-|*-|*-|*-|*-", 10**6, "*-" * 4),
        ("*-|*-|*-|*-|*-|*-/-*/-*", 10**6, "*-" * 4),
        ("*--", 10**6, "*--"),
    ],
)
def test_a_proxy_has_whole_periods_and_no_fewer_branches_than_four_layers_of_a_gpt(
    pattern: str, trials: int, letters: str
) -> None:
    proxy = _proxy(pattern, trials=trials)
    assert isinstance(proxy, HybridFile)
    assert (proxy.letters, proxy.num_layers) == (letters, len(letters))
    assert proxy.pattern.further == Pattern.of(pattern).further


@pytest.mark.parametrize(("width", "heads", "groups"), [(256, 8, 8), (512, 16, 8), (128, 4, 4)])
def test_a_proxy_of_nemotron_h_keeps_what_belongs_to_a_head(width: int, heads: int, groups: int) -> None:
    target = load_model_file(Path(__file__).parents[2] / "configs" / "models" / "nemotron_h_8b.yaml")
    search = Search(trials=20, trial_tokens=1e9, target_tokens=1e13)
    found = choose_proxy(target, search, width=width)
    proxy = model_file(found.model.model_dump(mode="json"), source="proxy")
    assert isinstance(proxy, HybridFile)
    assert (proxy.mamba_num_heads, proxy.mamba_num_groups, proxy.letters[:6]) == (heads, groups, "M-M-M-")
    assert (proxy.mamba_head_dim, proxy.mamba_state_dim) == (64, 128)
    assert any("mamba_num_groups 4, in the target 8" in note for note in found.notes) is (groups == 4)
    assert recipe_for(proxy).plan(target)["decoder.layers.0.mixer.out_proj.weight"].width_ratio == 4096 / width


def test_sizes_of_layers_that_only_predict_further_tokens_follow_the_width() -> None:
    sizes = {size.key for size in HYBRID.sizes(MODELS["multi-token prediction of kinds that the stack has not"])}
    assert {"mamba_num_heads", "moe_ffn_hidden_size", "ffn_hidden_size"} <= sizes


def test_a_state_that_grows_is_remarked() -> None:
    base, target = (hybrid(gpt(), "*-M-", **MAMBA | {"mamba_state_dim": size}) for size in (8, 16))
    [said] = HYBRID.remarks(base, target)
    assert said.startswith("Base and target differ in mamba_state_dim 8 → 16.")
    assert not HYBRID.remarks(base, base)


# ---- model files -----------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "seq_length": 16}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"hybrid_layer_pattern": "M*", "mamba_head_dim": 48}, "mamba_head_dim 48 does not divide 2·hidden_size 128"),
        ({"hybrid_layer_pattern": "M*"}, "mamba_num_groups 8 does not divide the 2 heads of a Mamba layer"),
        (
            {"hybrid_layer_pattern": "*-", "mamba_state_dim": 16},
            "mamba_state_dim: hybrid_layer_pattern has no layer M, which reads it",
        ),
        ({"hybrid_layer_pattern": "*E"}, "num_experts belongs to layers E of hybrid_layer_pattern"),
        ({"hybrid_layer_pattern": "*-", "num_experts": 4}, "num_experts belongs to layers E of hybrid_layer_pattern"),
        ({"hybrid_layer_pattern": "*G"}, "'G' is a layer of gated delta net"),
        ({"hybrid_layer_pattern": "*D"}, "'D' is a layer of sparse attention"),
        ({"hybrid_layer_pattern": "*-/*D"}, "'D' is a layer of sparse attention"),
        ({"hybrid_layer_pattern": "+-/*-"}, "a model of Megatron's has '*' or '+', not both"),
        ({"hybrid_layer_pattern": "+-", "multi_latent_attention": False}, "hybrid_layer_pattern has a layer +"),
        ({"hybrid_layer_pattern": "*-", "multi_latent_attention": True}, "hybrid_layer_pattern has no layer +"),
        ({"hybrid_layer_pattern": "*-", "kv_lora_rank": 8}, "without multi_latent_attention Megatron does not read it"),
        ({"hybrid_layer_pattern": "+-", "qk_layernorm": True}, "attention has no norms of queries and keys"),
        ({"hybrid_layer_pattern": "*-", "mtp_num_layers": 1}, "says these layers, behind '/', and has none"),
        (
            {"hybrid_layer_pattern": "*-/*-", "mtp_num_layers": 2, "position_embedding_type": "none"},
            "mtp_num_layers 2, and hybrid_layer_pattern has 1",
        ),
        ({"hybrid_layer_pattern": "*-/*-/-*"}, "all layers of multi-token prediction have to be alike"),
        ({"hybrid_layer_pattern": "*-/*|-"}, "a '|' behind a '/'"),
        ({"hybrid_layer_pattern": "*-/"}, "no layer behind a '/'"),
        ({"hybrid_layer_pattern": "/*-"}, "a pipeline stage has no layer"),
        ({"hybrid_layer_pattern": "*x"}, "'x' is no letter of a layer"),
        ({"hybrid_layer_pattern": "*||-"}, "a pipeline stage has no layer"),
        ({"hybrid_layer_pattern": "*-", "num_layers": 3}, "num_layers 3, and hybrid_layer_pattern has 2"),
        ({"hybrid_layer_pattern": "*-", "architecture": "gpt"}, "gpt has no hybrid_layer_pattern"),
        ({"architecture": "hybrid"}, "hybrid_layer_pattern"),
    ],
)
def test_what_is_no_hybrid_model_is_refused(content: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as raised:
        model_file({**SIZES, **content}, source="file")
    assert said in str(raised.value)
    assert all(len(line) <= 300 for line in str(raised.value).splitlines())


# ---- patterns of other orders --------------------------------------------------------------------------------------


def test_a_layers_number_that_means_another_kind_at_the_base_is_refused() -> None:
    """Layer 1 of the base is an MLP, and that of the target attention."""
    pattern = PerParameter(match="decoder.layers.1.*", lr_mult=2.0)
    own = recipe_for(hybrid(gpt(), "*-")).model_copy(update={"per_parameter": (pattern,)})
    with pytest.raises(InputError, match=r"'decoder.layers.1.\*': it does not match the same at the base"):
        own.plan(hybrid(gpt(), "**--"))
    assert own.plan(hybrid(gpt(), "*-*-")).entries


@pytest.mark.parametrize(
    ("base", "target", "said"),
    [
        ("*-/*-", "*-*-/-*", r"behind '/' the recipe's base has \*- and the target -\*\. Tune a base"),
        ("*-/*-", "*-*-/*-/*-", "mtp_num_layers is 1 in the recipe's base but 2 in the target"),
        ("*-", "*-*-/*-", "mtp_num_layers is None in the recipe's base but 1 in the target"),
    ],
)
def test_a_base_that_predicts_otherwise_is_refused(base: str, target: str, said: str) -> None:
    """The stack may be deeper; what predicts further tokens may not."""
    own = {"position_embedding_type": "rope"}
    with pytest.raises(InputError, match=said):
        recipe_for(hybrid(gpt(**own), base)).plan(hybrid(gpt(4, **own), target))
    deeper = f"*-*-*-/{base.partition('/')[2]}".rstrip("/")
    assert recipe_for(hybrid(gpt(**own), base)).plan(hybrid(gpt(4, **own), deeper)).depth == 6


def test_a_base_without_a_kind_of_layer_or_with_one_more_is_refused() -> None:
    for base, target in (("*-", "*"), ("-", "*-")):
        with pytest.raises(InputError, match="Tune a base with the target's kinds of layers"):
            recipe_for(hybrid(gpt(), base)).plan(hybrid(gpt(), target))
