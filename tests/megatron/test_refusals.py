"""What the adapter cannot do right it refuses, in words and before it changes anything; corrected, it trains."""

import importlib
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout

from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import Recipe

BASE = gpt(vocab_size=64)
WIDE = gpt(4, vocab_size=64)
TUNED = planned.recipe(BASE)
LONGER_HEADS = gpt(4, vocab_size=64, kv_channels=16, num_attention_heads=8)
"""Another head size than the base's, so another attention scale than Megatron's."""


# ---- layers of a user's own ----------------------------------------------------------------------------------------


def _local_spec() -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec()


def _own_attention() -> Any:
    """Layers whose attention computes 1/√d by itself."""

    class Attention(torch.nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()

        def forward(self, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
            heads_first = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            mixed = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
            return mixed.permute(2, 0, 1, 3).flatten(2)

    spec = _local_spec()
    spec.submodules.self_attention.submodules.core_attention = Attention
    return spec


def _learned_temperature() -> Any:
    """Layers whose attention has a parameter that no GPTModel has."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Attention(DotProductAttention):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.temperature = torch.nn.Parameter(torch.ones(1))

        def forward(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            return super().forward(query * self.temperature, *args, **kwargs)

    spec = _local_spec()
    spec.submodules.self_attention.submodules.core_attention = Attention
    return spec


def _fused_norms() -> Any:
    """Layers with their norms inside the linear layers that follow, named as Transformer Engine names them."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp

    class LayerNormLinear(ColumnParallelLinear):
        def __init__(self, size: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(size, *args, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(size))
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(size))

        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            normed = torch.nn.functional.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias)
            return super().forward(normed, *args, **kwargs)

    spec = _local_spec()
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.self_attention.submodules.linear_qkv = LayerNormLinear
    mlp = layer.mlp.submodules if hasattr(layer.mlp, "submodules") else layer.mlp.keywords["submodules"]
    mlp.linear_fc1 = LayerNormLinear
    layer.sharded_state_dict_keys_map = {}
    return spec


# ---- mistakes ------------------------------------------------------------------------------------------------------


def _rename_attention(chunks: list[Any]) -> None:
    for layer in chunks[0].decoder.layers:
        layer.self_attention.add_module("inner", layer.self_attention._modules.pop("core_attention"))


def _apply_once(chunks: list[Any]) -> None:
    from mup_megatron.megatron.model import apply_plan

    apply_plan(chunks, TUNED.plan(WIDE))


def _load_weights(chunks: list[Any]) -> None:
    """Weights from elsewhere, as from a checkpoint: from a model that was initialised."""
    sizes = planned.sizes_of(WIDE)
    initialised = stock.build_chunks(sizes, Layout(), stock.transformer_config(sizes, Layout()))
    chunks[0].load_state_dict(initialised[0].state_dict())


def _decouple_lr(config: Any) -> None:
    config.decoupled_lr = 0.1


def _couple_weight_decay(config: Any) -> None:
    config.decoupled_weight_decay = False


def _decay_qk_norms(config: Any) -> None:
    config.apply_wd_to_qk_layernorm = True


def _fused(**own: float) -> tuple[Recipe, Any]:
    """A recipe with a tensor's own factors, and a target whose norms are fused."""
    per_parameter = [{"match": "*.linear_fc1.weight", **own}] if own else []
    return planned.recipe(BASE, per_parameter=per_parameter), WIDE.model_copy(
        update={"transformer_impl": "transformer_engine"}
    )


@dataclass(frozen=True)
class Mistake:
    """`wrong` and `right` are arguments of `planned.prepare`; `said` are words that the refusal has to contain."""

    wrong: dict[str, Any]
    said: tuple[str, ...]
    right: dict[str, Any] = field(default_factory=dict)
    recipes: tuple[Recipe, Recipe] = (TUNED, TUNED)
    targets: tuple[Any, Any] = (WIDE, WIDE)


MODEL: dict[str, Mistake] = {
    "an attention that ignores the scale": Mistake(
        wrong={"layer_spec": _own_attention},
        targets=(LONGER_HEADS, WIDE),
        said=("decoder.layers.0.self_attention.core_attention", "softmax_scale", "attention_multiplier 1"),
        # The remedy: where the scale is Megatron's own, the same attention is welcome.
        right={"layer_spec": _own_attention},
    ),
    "decoding that ignores the scale": Mistake(
        wrong={"config_changes": {"flash_decode": True}},
        targets=(LONGER_HEADS, WIDE),
        said=("flash_decode", "attention_multiplier 1"),
        right={"config_changes": {"flash_decode": True}},
    ),
    "weights in FP8": Mistake(
        wrong={"config_changes": {"fp8": "hybrid", "fp8_param": True}}, said=("fp8_param", "drop")
    ),
    "weights in FP4": Mistake(wrong={"config_changes": {"fp4": "e2m1", "fp4_param": True}}, said=("fp4_param", "drop")),
    "a layer with a parameter of its own": Mistake(
        wrong={"layer_spec": _learned_temperature},
        said=("decoder.layers.1.self_attention.core_attention.temperature", "the plan has not"),
    ),
    "biases that the model file lacks": Mistake(
        wrong={"model": WIDE},
        targets=(WIDE.model_copy(update={"add_bias_linear": False}), WIDE),
        recipes=(planned.recipe(BASE.model_copy(update={"add_bias_linear": False})), TUNED),
        said=("decoder.layers.1.mlp.linear_fc2.bias", "the plan has not"),
    ),
    "biases that only the model file has": Mistake(
        wrong={"model": WIDE.model_copy(update={"add_bias_linear": False})},
        said=("decoder.layers.0.self_attention.linear_qkv.bias", "the model has not", "model file"),
    ),
    "one layer too many": Mistake(
        wrong={"model": WIDE.model_copy(update={"num_layers": 3})},
        said=("decoder.layers.2.mlp.linear_fc1.weight", "the plan has not"),
    ),
    "one layer too few": Mistake(
        wrong={"model": WIDE.model_copy(update={"num_layers": 1})},
        said=("decoder.layers.1.mlp.linear_fc1.weight", "the model has not"),
    ),
    "another ffn": Mistake(
        wrong={"model": WIDE.model_copy(update={"ffn_hidden_size": 128})},
        said=("decoder.layers.0.mlp.linear_fc1.weight", "(128, 128)", "(256, 128)"),
    ),
    "a smaller vocabulary": Mistake(
        wrong={"model": WIDE.model_copy(update={"vocab_size": 48})},
        said=("embedding.word_embeddings.weight", "(48, 128)", "(64, 128)"),
    ),
    "a larger vocabulary": Mistake(
        wrong={"model": WIDE.model_copy(update={"vocab_size": 320})},
        said=("embedding.word_embeddings.weight", "(320, 128)", "(64, 128)"),
    ),
    "a custom initialiser": Mistake(
        wrong={"config_changes": {"init_method": torch.nn.init.xavier_uniform_}},
        said=("init_method", "xavier", "Drop"),
    ),
    "a custom initialiser of residual outputs": Mistake(
        wrong={"config_changes": {"output_layer_init_method": torch.nn.init.zeros_}},
        said=("output_layer_init_method", "Drop"),
    ),
    "no initialisation": Mistake(
        wrong={"config_changes": {"perform_initialization": False}},
        said=("perform_initialization", "initialize=False"),
        # The remedy: weights from elsewhere.
        right={"config_changes": {"perform_initialization": False}, "initialize": False, "edit": _load_weights},
    ),
    "an attention that is called otherwise": Mistake(
        wrong={"edit": _rename_attention},
        targets=(LONGER_HEADS, WIDE),
        said=("decoder.layers.0.self_attention.core_attention", "attention logits", "the model has no such module"),
    ),
    "a plan applied twice": Mistake(wrong={"edit": _apply_once}, said=("applied to this model already",)),
    "a multiplier on a layer with a fused norm": Mistake(
        wrong={"layer_spec": _fused_norms},
        recipes=(_fused(multiplier=2.0)[0], _fused(init_mult=2.0, lr_mult=2.0)[0]),
        targets=(_fused()[1], _fused()[1]),
        said=("decoder.layers.0.mlp.linear_fc1.weight", "fused", "init_mult and lr_mult"),
        right={"layer_spec": _fused_norms},
    ),
}
if core_version() >= (0, 17, 0):
    MODEL["Megatron's own μP"] = Mistake(
        wrong={"config_changes": {"use_mup": True, "mup_base_hidden_size": 32}}, said=("use_mup", "drop --use-mup")
    )

TRAINING = planned.training_of(TUNED)
OPTIMIZER: dict[str, Mistake] = {
    "another learning rate": Mistake({"training": replace(TRAINING, lr=2e-3)}, said=("lr: ", "0.002", "0.001")),
    "another floor": Mistake({"training": replace(TRAINING, min_lr=0.0)}, said=("min_lr", "0.0", "0.0001")),
    "another weight decay": Mistake({"training": replace(TRAINING, weight_decay=0.2)}, said=("weight_decay", "0.2")),
    "another eps": Mistake({"training": replace(TRAINING, adam_eps=1e-5)}, said=("adam_eps", "1e-05", "1e-08")),
    "another optimizer": Mistake(
        {"training": replace(TRAINING, optimizer="sgd")}, said=("optimizer", "'sgd'", "'adam'")
    ),
    "a decoupled learning rate": Mistake({"edit_optimizer": _decouple_lr}, said=("decoupled_lr", "per_parameter")),
    "coupled weight decay": Mistake({"edit_optimizer": _couple_weight_decay}, said=("decoupled_weight_decay", "True")),
    "weight decay of q/k norms": Mistake({"edit_optimizer": _decay_qk_norms}, said=("apply_wd_to_qk_layernorm", "off")),
}


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    message: str | None
    """The refusal."""
    untouched: bool
    """Whether the refused model is as it was built."""
    losses: list[float]
    """Of the corrected twin."""


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # What was never initialised may be NaN.
    return one.view(torch.int32).equal(other.view(torch.int32))


class _Watch:
    """Remembers a model as it was built."""

    def __init__(self, further: planned.Edit | None) -> None:
        self.further = further

    def __call__(self, chunks: list[Any]) -> None:
        if self.further is not None:
            self.further(chunks)
        self.models = list(chunks)
        self.before = self._state()

    def _state(self) -> Any:
        return [
            (
                {name: p.detach().clone() for name, p in model.named_parameters()},
                sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
                model.config.softmax_scale,
            )
            for model in self.models
        ]

    @property
    def untouched(self) -> bool:
        return all(
            (hooks, scale) == (hooks_now, scale_now) and all(_same_bits(w, now[n]) for n, w in weights.items())
            for (weights, hooks, scale), (now, hooks_now, scale_now) in zip(self.before, self._state(), strict=True)
        )


def _verdict(mistake: Mistake) -> Verdict:
    watch = _Watch(mistake.wrong.get("edit"))
    message = None
    try:
        planned.prepare(mistake.recipes[0], mistake.targets[0], Layout(), **{**mistake.wrong, "edit": watch})
    except InputError as error:
        message = str(error)
    run = planned.prepare(mistake.recipes[1], mistake.targets[1], Layout(), **mistake.right)
    return Verdict(message, watch.untouched, stock.train(run, 4))


def _verdicts(names: list[str]) -> dict[str, Verdict]:
    return {name: _verdict({**MODEL, **OPTIMIZER}[name]) for name in names}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    return run_ranks(_verdicts, 1, [*MODEL, *OPTIMIZER])[0]


@pytest.mark.parametrize("name", [*MODEL, *OPTIMIZER])
def test_mistake_is_refused_in_words(verdicts: dict[str, Verdict], name: str) -> None:
    message = verdicts[name].message
    assert message is not None, "not refused"
    for words in ({**MODEL, **OPTIMIZER})[name].said:
        assert words in message


@pytest.mark.parametrize("name", MODEL)
def test_nothing_is_changed_before_a_refusal(verdicts: dict[str, Verdict], name: str) -> None:
    assert verdicts[name].untouched


@pytest.mark.parametrize("name", [*MODEL, *OPTIMIZER])
def test_corrected_twin_trains(verdicts: dict[str, Verdict], name: str) -> None:
    losses = verdicts[name].losses
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


# ---- fused norms ---------------------------------------------------------------------------------------------------


def _plain_and_fused() -> list[list[float]]:
    recipe, target = _fused()
    plain = planned.prepare(recipe, WIDE, Layout(), same_weights=True)
    fused = planned.prepare(recipe, target, Layout(), same_weights=True, layer_spec=_fused_norms)
    return [stock.train(run, 4) for run in (plain, fused)]


def test_fused_norms_get_what_plain_ones_get() -> None:
    """The names of the plan for `transformer_engine` are those of a live model whose norms are fused."""
    plain, fused = run_ranks(_plain_and_fused, 1)[0]
    assert fused == pytest.approx(plain, abs=1e-6)


# ---- the schedule --------------------------------------------------------------------------------------------------


def _warmed_up_from(init_lr: float) -> tuple[str | None, float, list[float]]:
    """The refusal, a wide layer's first learning rate over its peak, and losses."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mup_megatron.megatron.guard import schedule_problems
    from mup_megatron.megatron.optimizer import live_values

    run = planned.prepare(TUNED, WIDE, Layout())
    run.scheduler = OptimizerParamScheduler(
        run.optimizer, init_lr, TRAINING.lr, TRAINING.min_lr, 4, 20, "linear", 0.1, 0.1, 20, "constant"
    )
    first = live_values(run.optimizer, run.chunks, tied=True)["decoder.layers.0.mlp.linear_fc1.weight"]
    problems = schedule_problems(TUNED.plan(WIDE), run.scheduler, run.optimizer)
    refused = [str(problem) for problem in problems if problem.quantity == "lr_warmup_init"]
    if refused:
        return refused[0], first.lr / first.max_lr, []
    return None, first.lr / first.max_lr, stock.train(run, 3)


def _on_the_meta_device() -> str:
    from mup_megatron.megatron.model import apply_plan

    _, _, chunks = planned.built(WIDE, Layout())
    chunks[0].to_empty(device="meta")
    with pytest.raises(InputError) as refused:
        apply_plan(chunks, TUNED.plan(WIDE))
    apply_plan(chunks, TUNED.plan(WIDE), initialize=False)
    return str(refused.value)


def test_weights_that_are_yet_to_be_drawn_are_refused_unless_they_are_loaded() -> None:
    assert "meta device" in run_ranks(_on_the_meta_device, 1)[0]


def test_warm_up_that_starts_every_group_alike_is_refused() -> None:
    message, share, _ = run_ranks(_warmed_up_from, 1, 5e-4)[0]
    assert share == 2.0, "a wide layer starts above its own peak: what the refusal is for"
    assert message is not None
    assert "lr_warmup_init" in message
    assert "0.0005" in message
    message, share, losses = run_ranks(_warmed_up_from, 1, 0.0)[0]
    assert (message, share) == (None, 0.0)
    assert all(math.isfinite(loss) for loss in losses)


# ---- several ranks -------------------------------------------------------------------------------------------------


def _extra_parameter(chunks: list[Any]) -> None:
    chunks[0].register_parameter("own", torch.nn.Parameter(torch.ones(3)))


def _xavier(chunks: list[Any]) -> None:
    chunks[0].config.init_method = torch.nn.init.xavier_uniform_


def _fp8(chunks: list[Any]) -> None:
    chunks[0].config.fp8_param = True


ON_ONE_RANK = {"own: the model has": _extra_parameter, "init_method: ": _xavier, "fp8_param: ": _fp8}


def _wrong_on_rank_1() -> tuple[list[tuple[str | None, bool]], list[float]]:
    found = []
    layout = Layout(tp=2)
    for edit in ON_ONE_RANK.values():
        watch = _Watch(edit if torch.distributed.get_rank() == 1 else None)
        message = None
        try:
            planned.prepare(TUNED, WIDE, layout, edit=watch)
        except InputError as error:
            message = str(error)
        found.append((message, watch.untouched))
    return found, stock.train(planned.prepare(TUNED, WIDE, layout), 4)


def test_what_is_wrong_on_one_rank_is_raised_on_all() -> None:
    """A rank that went on alone would wait for the others for ever, with a model that is changed by half."""
    (first, first_losses), (second, second_losses) = run_ranks(_wrong_on_rank_1, 2)
    for words, (message, untouched), (other_message, other_untouched) in zip(ON_ONE_RANK, first, second, strict=True):
        assert message is not None
        assert re.match(words, message)
        assert other_message == message
        assert untouched
        assert other_untouched
    assert first_losses == second_losses
    assert first_losses[-1] < first_losses[0]


# ---- models that are no GPT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        ("megatron.core.models.bert.bert_model", "BertModel", "a BERT"),
        ("megatron.core.models.T5.t5_model", "T5Model", "a T5"),
        ("megatron.core.models.mamba", "MambaModel", "a hybrid model"),
    ],
)
def test_other_models_are_called_what_they_are(module: str, name: str, what: str) -> None:
    """Some of them have a decoder as a GPT has. From 0.18 on MambaModel is another name of HybridModel."""
    from mup_megatron.megatron.model import apply_plan

    kind = getattr(importlib.import_module(module), name)
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.decoder = torch.nn.Identity()
    with pytest.raises(InputError) as raised:
        apply_plan([model], TUNED.plan(WIDE))
    assert re.search(rf"the model is a (Hybrid|{name})\w*, {what}, and the plan is for a GPT", str(raised.value))
    assert "model file" not in str(raised.value)
