"""Exported models, loaded by stock transformers, against the trained ones; and the mistakes that this shows."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.exported import KINDS, Trained, deviation, loaded, tokens, trained

from mup_megatron.architectures.names import READOUT_WEIGHT, WORD_EMBEDDINGS
from mup_megatron.architectures.plain.decoder import PlainDecoder
from mup_megatron.architectures.registry import shapes_of
from mup_megatron.errors import InputError
from mup_megatron.export.architectures import registry
from mup_megatron.export.architectures.granite import GRANITE
from mup_megatron.export.architectures.llama import LLAMA
from mup_megatron.export.export import Exported, export
from mup_megatron.export.folds import Fold, folded, folds
from mup_megatron.theory import Acts, Heads

EXACT = 1e-5
SEEN = 1e-2
GENERATED = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Trained, Exported]]:
    folder = tmp_path_factory.mktemp("exported")
    found = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        model = trained(kind)
        found[name] = model, export(model.source(), folder / str(number), architecture=kind.architecture)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_an_exported_model_is_the_trained_one(models: dict[str, tuple[Trained, Exported]], name: str) -> None:
    model, exported = models[name]
    for attention in ("eager", "sdpa"):
        assert deviation(model, loaded(exported.to, attention)) < EXACT, attention


@pytest.mark.parametrize("name", KINDS)
def test_it_generates_the_same_tokens_with_a_cache_and_without(
    models: dict[str, tuple[Trained, Exported]], name: str
) -> None:
    model, exported = models[name]
    stock, begun = loaded(exported.to, "sdpa"), tokens(model.model)[:, :4]
    greedy = begun
    with torch.no_grad():
        for _ in range(GENERATED):
            logits = model.live(greedy)[:, -1, : model.model.vocab_size]
            greedy = torch.cat([greedy, logits.argmax(-1, keepdim=True)], dim=1)
    for cached in (True, False):
        given = stock.generate(
            begun, attention_mask=torch.ones_like(begun), max_new_tokens=GENERATED, do_sample=False, use_cache=cached
        )
        assert torch.equal(given, greedy), cached


def test_the_weight_of_a_single_expert_is_left_as_it_is(tmp_path: Path) -> None:
    model = trained(dataclasses.replace(KINDS["deepseek_v3"], keys={**KINDS["deepseek_v3"].keys, "moe_router_topk": 1}))
    export(model.source(), tmp_path / "out")
    assert deviation(model, loaded(tmp_path / "out")) < EXACT


def test_weights_stay_as_they_were_where_the_configuration_has_the_multipliers(
    models: dict[str, tuple[Trained, Exported]],
) -> None:
    model, exported = models["granite"]
    assert {name.rpartition("linear_")[2] for name in exported.folded} == {"fc1.weight", "proj.weight"}
    assert exported.carried == pytest.approx(
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 1.6 / 8**0.5,
            "logits_scaling": 4 / 1.7,
            "residual_multiplier": 0.8 * 2 / 3,
        }
    )
    assert registry.choose(model.model, model.plan).name == "granite"


# ---- mistakes ------------------------------------------------------------------------------------------------------


def wrongly(model: Trained, to: Path, todo: Sequence[Fold], monkeypatch: pytest.MonkeyPatch) -> float:
    """The deviation of what is exported with these folds."""
    with monkeypatch.context() as patch:
        patch.setattr("mup_megatron.export.weights.folds_for", lambda target, *_: (target.carried(model.plan), todo))
        export(model.source(), to, architecture="llama" if model.model.swiglu else "gpt2")
    return deviation(model, loaded(to))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama tied", "llama with biases"])
def test_every_fold_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(KINDS[name])
    target = registry.targets()[KINDS[name].architecture]
    _, todo = registry.folds_for(target, model.model, model.plan)
    assert wrongly(model, tmp_path / "right", todo, monkeypatch) < EXACT
    first_layer = [each for each in todo if ".layers." not in each.tensor or ".layers.0." in each.tensor]
    for number, each in enumerate(first_layer):
        lost = [other for other in todo if other is not each]
        assert wrongly(model, tmp_path / f"lost {number}", lost, monkeypatch) > SEEN, each
        twice = [*todo, each]
        assert wrongly(model, tmp_path / f"twice {number}", twice, monkeypatch) > SEEN, each


def test_a_tied_head_that_is_folded_into_the_embedding_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(KINDS["llama tied"])
    _, todo = registry.folds_for(LLAMA, model.model, model.plan)
    wrong = [each for each in todo if "final_layernorm" not in each.tensor]
    wrong.append(Fold(WORD_EMBEDDINGS, model.plan.output_multiplier))
    assert wrongly(model, tmp_path / "out", wrong, monkeypatch) > SEEN


@pytest.mark.parametrize("name", ["gpt2", "llama with biases"])
def test_a_bias_that_is_forgotten_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(KINDS[name])
    _, todo = registry.folds_for(registry.targets()[KINDS[name].architecture], model.model, model.plan)
    biases = {each.tensor for each in todo if each.tensor.endswith(".bias")}
    for kind in ("linear_qkv", "linear_proj", "linear_fc2"):
        wrong = [each for each in todo if not (each.tensor in biases and f".{kind}." in each.tensor)]
        assert len(wrong) < len(todo)
        assert wrongly(model, tmp_path / kind, wrong, monkeypatch) > SEEN, kind


def test_attention_at_the_stock_scale_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(KINDS["llama"])
    _, todo = registry.folds_for(LLAMA, model.model, model.plan)
    wrong = [each for each in todo if each.rows is None]
    assert len(wrong) == len(todo) - model.model.num_layers
    assert wrongly(model, tmp_path / "out", wrong, monkeypatch) > SEEN


# ---- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("granite")])
def test_folded_weights_need_no_multiplier_in_double_precision(name: str) -> None:
    model = trained(KINDS[name])
    scale = model.plan.own_softmax_scale
    _, shape = shapes_of(model.model, model.model)
    todo = folds(model.plan, shape.tensors, carried=(), softmax_scale=scale)
    stock = PlainDecoder(model.model)
    weights = {
        key: folded(value, [each for each in todo if each.tensor == key])
        for key, value in model.live.state_dict().items()
    }
    if model.model.tied:
        weights[READOUT_WEIGHT] = weights[WORD_EMBEDDINGS]
    stock.load_state_dict(weights)
    given = tokens(model.model)
    with torch.no_grad():
        assert (stock(given) - model.live(given)).abs().max() < 1e-12


def test_attentions_of_several_scales_are_refused() -> None:
    model = trained(KINDS["llama"])
    places = list(model.plan.places)
    odd = next(number for number, place in enumerate(places) if place.acts is Acts.SCALE)
    places[odd] = dataclasses.replace(places[odd], heads=Heads(8), scale=0.5)
    plan = dataclasses.replace(model.plan, places=tuple(places))
    with pytest.raises(InputError, match="several softmax scales"):
        registry.folds_for(LLAMA, model.model, plan)
    with pytest.raises(InputError, match="several softmax scales"):
        registry.folds_for(GRANITE, model.model, plan)
