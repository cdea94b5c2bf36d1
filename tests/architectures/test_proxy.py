"""The proxy of a target: what is kept, what is reduced, and that it is said."""

from pathlib import Path
from typing import Any

import pytest

from mup_megatron.architectures.cost import training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.proxy import Proxy, Search, choose_proxy
from mup_megatron.architectures.registry import architecture_of, load_model_file, model_file
from mup_megatron.errors import InputError
from mup_megatron.recipe import recipe

MODELS = Path(__file__).parents[2] / "configs" / "models"
GPT3 = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 50257, "seq_length": 2048}
# 70B: 64 heads of 128 in 8 groups, gated MLP of 28672, rotary, RMSNorm, no biases.
GROUPED = {
    "num_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "group_query_attention": True,
    "num_query_groups": 8, "ffn_hidden_size": 28672, "swiglu": True, "position_embedding_type": "rope",
    "normalization": "RMSNorm", "add_bias_linear": False, "untie_embeddings_and_output_weights": True,
    "vocab_size": 32000, "seq_length": 4096,
}  # fmt: skip
CHEAP = Search(trials=10, trial_tokens=1e6, target_tokens=1e12)
ARCHITECTURE = (
    "group_query_attention", "swiglu", "normalization", "qk_layernorm", "position_embedding_type", "add_bias_linear",
    "add_qkv_bias", "untie_embeddings_and_output_weights", "vocab_size", "seq_length", "transformer_impl",
)  # fmt: skip


def target(content: dict[str, Any], **changes: Any) -> ModelFile:
    return model_file({**content, **changes}, source="target.yaml")


def valid(proxy: Proxy) -> ModelFile:
    """The proxy's model, once it has been found to be one that a file may hold."""
    return model_file(proxy.model.model_dump(mode="json"), source="proxy.yaml")


@pytest.mark.parametrize("content", [GPT3, GROUPED], ids=["GPT-3", "grouped"])
def test_only_the_size_differs_and_the_target_takes_its_recipe(content: dict[str, Any]) -> None:
    model = target(content)
    proxy = valid(choose_proxy(model, CHEAP))
    for key in (*ARCHITECTURE, "head_size", "num_layers"):
        assert getattr(proxy, key) == getattr(model, key), key
    assert proxy.ffn_size / proxy.hidden_size == model.ffn_size / model.hidden_size
    assert proxy.hidden_size / proxy.num_attention_heads == model.hidden_size / model.num_attention_heads
    plan = recipe({"base": proxy.model_dump(), "hyperparameters": {"lr": 0.01}}, source="recipe").plan(model)
    matrices = {entry.width_ratio for entry in plan.entries if entry.name.startswith("decoder.layers.0.")} - {1.0}
    assert matrices == {model.hidden_size / proxy.hidden_size}


def test_gpt3s_proxy_is_the_papers() -> None:
    proxy = choose_proxy(target(GPT3), Search(trials=350, trial_tokens=4e9, target_tokens=300e9))
    model = valid(proxy)
    sizes = (model.num_layers, model.hidden_size, model.num_attention_heads, model.head_size, model.ffn_size)
    assert sizes == (32, 256, 2, 128, 1024)
    assert model.query_groups == 2
    assert proxy.notes == ()


@pytest.mark.parametrize(("width", "heads", "groups"), [(1024, 8, 1), (2048, 16, 2), (1400, 8, 1), (3100, 24, 3)])
def test_groups_stay_whole_where_the_width_allows(width: int, heads: int, groups: int) -> None:
    proxy = choose_proxy(target(GROUPED), CHEAP, width=width)
    model = valid(proxy)
    assert (model.num_attention_heads, model.num_query_groups) == (heads, groups)
    assert model.hidden_size == 128 * heads
    assert proxy.notes == ()


def test_a_width_of_less_than_a_group_is_used_and_said() -> None:
    proxy = choose_proxy(target(GROUPED), CHEAP, width=256)
    model = valid(proxy)
    assert (model.num_attention_heads, model.num_query_groups, model.hidden_size, model.head_size) == (2, 1, 256, 128)
    (note,) = proxy.notes
    assert note.startswith("2 heads share a key/value group, in the target 8")
    assert note.endswith("Width 1024 would keep the ratio.")


def test_a_head_wider_than_the_proxy_makes_it_one_head() -> None:
    proxy = valid(choose_proxy(target(GPT3, num_attention_heads=8), CHEAP, width=64))
    assert (proxy.num_attention_heads, proxy.head_size, proxy.hidden_size) == (1, 512, 512)


def test_head_sizes_of_their_own_are_kept() -> None:
    """kv_channels other than hidden / heads: the width for each head stays too."""
    proxy = valid(choose_proxy(target(GPT3, kv_channels=256), CHEAP))
    assert (proxy.num_attention_heads, proxy.head_size, proxy.hidden_size) == (2, 256, 256)


def test_an_ffn_that_cannot_keep_its_ratio_is_rounded_and_said() -> None:
    exact = choose_proxy(target(GPT3, ffn_hidden_size=11008, swiglu=True), CHEAP)
    assert (exact.model.ffn_size, exact.notes) == (688, ())
    rounded = choose_proxy(target(GPT3, ffn_hidden_size=11000, swiglu=True), CHEAP)
    assert valid(rounded).ffn_size == 688  # 687.5
    assert rounded.notes == ("ffn_hidden_size 688 is rounded; the target's ratio to hidden_size is 2.686.",)


def test_the_depth_is_what_the_budget_allows() -> None:
    model = target(GPT3)
    search = Search(trials=350, trial_tokens=4e9, target_tokens=300e9)
    full = search.fraction(choose_proxy(model, search, budget=1.0).model, model)
    depths = []
    for budget in (full * 1.0001, full * 0.9999, full / 2, 1e-9):
        proxy = choose_proxy(model, search, budget=budget)
        depth = valid(proxy).num_layers
        depths.append(depth)
        one_more = proxy.model.model_copy(update={"num_layers": depth + 1})
        assert depth == 32 or search.fraction(one_more, model) > budget
        assert depth == 4 or search.fraction(proxy.model, model) <= budget
        assert (depth < 32) == any(f"{depth} of the target's 32 layers, for the cost" in note for note in proxy.notes)
    assert depths[:2] == [32, 31]
    assert 4 < depths[2] < 16, "the readout does not get cheaper with depth"
    assert depths[3] == 4
    assert any("costs more than 0% of the target even at 4 layers: use fewer trials" in note for note in proxy.notes)


def test_a_shallow_target_keeps_its_depth() -> None:
    proxy = choose_proxy(target(GPT3, num_layers=2), Search(trials=10**6, trial_tokens=1e9, target_tokens=1e9))
    assert valid(proxy).num_layers == 2
    assert any("use fewer trials" in note for note in proxy.notes)


def test_the_cost_is_that_of_all_runs_beside_the_targets() -> None:
    model = target(GPT3)
    proxy = choose_proxy(model, CHEAP).model
    fraction = 10 * 1e6 * training_flops(proxy).total / (1e12 * training_flops(model).total)
    assert CHEAP.fraction(proxy, model) == pytest.approx(fraction, rel=1e-12)


def test_sizes_below_those_at_which_transfer_was_good_are_said() -> None:
    narrow = choose_proxy(target(GPT3), CHEAP, width=128)
    assert any(note.startswith("width 128 is below the 256") for note in narrow.notes)
    small_heads = choose_proxy(target(GPT3, num_attention_heads=256), CHEAP)
    assert any(note.startswith("head size 16 is below 32") for note in small_heads.notes)
    assert small_heads.model.head_size == 16


@pytest.mark.parametrize(("hidden", "width"), [(256, 256), (4096, 4096), (4096, 10**6)])
def test_a_target_that_is_not_wider_is_refused(hidden: int, width: int) -> None:
    with pytest.raises(InputError, match=rf"hidden_size {hidden}: the target is not wider.*or give a smaller"):
        choose_proxy(target(GPT3, hidden_size=hidden), CHEAP, width=width)


@pytest.mark.parametrize("path", sorted(MODELS.glob("gpt3_*b.yaml")), ids=lambda path: path.stem)
def test_every_gpt3_has_a_proxy(path: Path) -> None:
    model = load_model_file(path)
    proxy = choose_proxy(model, CHEAP)
    assert valid(proxy).head_size == model.head_size
    assert proxy.model.hidden_size == pytest.approx(256, rel=0.13)  # whole heads: the largest of them are 128 wide


EXPERTS = {
    **GROUPED, "num_experts": 128, "moe_router_topk": 8, "moe_ffn_hidden_size": 2048, "moe_layer_freq": "[0]*3+[1]*77",
    "moe_shared_expert_intermediate_size": 4096,
}  # fmt: skip


def test_experts_keep_their_number_and_their_size_for_each_channel() -> None:
    model = target(EXPERTS)
    proxy = choose_proxy(model, Search(trials=10**4, trial_tokens=1e9, target_tokens=1e12), width=1024)
    chosen = valid(proxy)
    assert (chosen.num_experts, chosen.moe_router_topk) == (128, 8)
    assert (chosen.expert_ffn_size, chosen.moe_shared_expert_intermediate_size) == (256, 512)
    assert chosen.num_layers < 80
    assert set(chosen.moe_layer_freq) == {0, 1}, "both kinds of layer"
    rounded = choose_proxy(target(EXPERTS, moe_ffn_hidden_size=1001), CHEAP, width=1024)
    assert "moe_ffn_hidden_size 125 is rounded; the target's ratio to hidden_size is 0.1222." in rounded.notes


def test_with_a_rule_of_depth_a_proxy_is_shallow_whatever_it_costs() -> None:
    model = target(GPT3)
    deep, shallow = (choose_proxy(model, CHEAP, depth_rule=rule) for rule in (False, True))
    assert (deep.model.num_layers, valid(shallow).num_layers) == (32, 4)
    costs = [f"{CHEAP.fraction(each.model, model):.2%}" for each in (shallow, deep)]
    assert any(
        f"the search costs {costs[0]} of the target's run in place of {costs[1]}" in note for note in shallow.notes
    )
    assert shallow.model.model_copy(update={"num_layers": 32}) == deep.model


OF_EXPERTS = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 1024, "swiglu": True}


@pytest.mark.parametrize(
    ("content", "changes"),
    [
        (GPT3 | OF_EXPERTS, {"moe_layer_freq": [0] * 3 + [1] * 29}),
        (GPT3 | OF_EXPERTS, {"moe_layer_freq": [0] * 16 + [1] * 16}),
        (GPT3, {"architecture": "t5", "num_layers": 24, "decoder_num_layers": 10}),
        ({k: v for k, v in GPT3.items() if k != "num_layers"}, {"hybrid_layer_pattern": "*-*-*" * 4}),
    ],
    ids=["experts behind three", "experts in the upper half", "T5", "a period of five"],
)
def test_a_shallower_proxy_is_the_target_thinned_at_once(content: dict[str, Any], changes: dict[str, Any]) -> None:
    """And not layer by layer, which would leave the first ones."""
    deep = target(content, **changes)
    for budget in (0.05, 1e-2, 1e-3, 1e-9):
        proxy = choose_proxy(deep, Search(trials=350, trial_tokens=1e9, target_tokens=3e11), budget=budget).model
        thinned = architecture_of(deep).with_depth(deep, proxy.num_layers)
        for key in ("num_layers", "moe_layer_freq", "hybrid_layer_pattern", "decoder_num_layers"):
            assert getattr(proxy, key, None) == getattr(thinned, key, None)


@pytest.mark.parametrize("freq", [2, [1, 0] * 16], ids=["every second", "listed"])
def test_a_proxys_multi_token_prediction_is_of_the_targets_kind(freq: object) -> None:
    """It is of the last layer's kind, and what was tuned with another does not transfer."""
    deep = target(GPT3 | OF_EXPERTS, moe_layer_freq=freq, mtp_num_layers=1, position_embedding_type="rope")
    for budget in (0.3, 0.2, 0.1, 0.05, 1e-2, 1e-9):
        proxy = choose_proxy(deep, Search(trials=350, trial_tokens=1e9, target_tokens=3e11), budget=budget).model
        tuned = recipe({"base": proxy.model_dump(), "hyperparameters": {"lr": 1e-3}}, source="r.yaml")
        assert tuned.plan(deep).entries
