"""A launch line with Megatron-Core's own μP as a recipe: equal on the line's model, but for what is said to differ.

What native μP does is read from live Megatron-Core models.
"""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from support import planned, stock
from support.processes import run_ranks
from support.stock import Layout

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.convert import values_from_flags
from mup_megatron.megatron.arguments.native import Difference, Native, NativeRecipe, recipe_from_native
from mup_megatron.megatron.versions import core_version

MODEL = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 16 --kv-channels 8 --ffn-hidden-size 256 --seq-length 12 "
    "--vocab-size 48 --make-vocab-size-divisible-by 16 --transformer-impl local --lr 1e-3 --min-lr 1e-4 "
    "--weight-decay 0.1 --adam-eps 1e-8"
)
MUP = "--use-mup --mup-base-hidden-size 32"


def carried(more: str = "", mup: str = MUP) -> NativeRecipe:
    return recipe_from_native(f"{MODEL} {mup} {more}".split(), source="line")


def found(native: NativeRecipe, quantity: str) -> list[Difference]:
    return [difference for difference in native.differences if difference.quantity == quantity]


# ---- native's numbers are native's -----------------------------------------------------------------------------------

LINES = {
    "base head size": "--mup-base-head-dim 8",
    "longer heads": "--mup-base-head-dim 4 --num-attention-heads 16",
    "no base head size": "",
    "power": "--mup-attn-scale-power 0.5 --mup-base-head-dim 2",
    "factors": "--mup-embedding-mult 3 --mup-output-mult 2",
    "embedding std": "--embedding-init-method-std 0.1 --untie-embeddings-and-output-weights",
    "decoupled": "--decoupled-lr 0.01 --decoupled-min-lr 0.001 --untie-embeddings-and-output-weights",
    "decoupled, tied, no floor": "--decoupled-lr 0.01",
    "sgd": "--optimizer sgd --untie-embeddings-and-output-weights",
    "sgd, decoupled": "--optimizer sgd --decoupled-lr 0.01",
    "off": "--mup-base-hidden-size 128",
    "a hybrid model": "--hybrid-layer-pattern *-*--* --mup-base-head-dim 8 --untie-embeddings-and-output-weights",
}
_CONFIG = "mup_base_hidden_size mup_base_head_dim mup_embedding_mult mup_output_mult mup_attn_scale_power".split()


def _live(model: ModelFile, values: dict[str, Any]) -> dict[str, Any]:
    """What a live model and optimizer have under --use-mup."""
    from megatron.core.optimizer import get_mup_config_overrides, get_standard_config_overrides

    from mup_megatron.megatron.model import softmax_scales
    from mup_megatron.megatron.optimizer import live_values

    changes = {key: values[key] for key in (*_CONFIG, "embedding_init_method_std", "init_method_std")}
    sizes, config, chunks = planned.built(model, Layout(), config_changes={"use_mup": True, **changes})

    def overrides(_chunks: list[Any], optimizer: Any) -> dict[Any, Any]:
        optimizer.decoupled_lr, optimizer.decoupled_min_lr = values["decoupled_lr"], values["decoupled_min_lr"]
        own = get_mup_config_overrides(optimizer, config.mup_width_mult, optimizer.optimizer)
        return {**get_standard_config_overrides(optimizer), **own}

    training = replace(
        stock.Training(),
        **{key: values[key] for key in "optimizer lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps".split()},
    )
    run = stock.finish(sizes, Layout(), training, config, chunks, overrides)
    module = run.chunks[0].module
    return {
        "std": {name: float(parameter.detach().std()) for name, parameter in module.named_parameters()},
        "groups": live_values(run.optimizer, run.chunks, tied=model.tied),
        "softmax_scale": next(iter(softmax_scales(run.chunks[0]).values())),
        "output": config.mup_output_mult,
    }


def _all_live() -> dict[str, dict[str, Any]]:
    live = {}
    for name, line in LINES.items():
        words = f"{MODEL} {MUP} {line}".split()
        live[name] = _live(recipe_from_native(words, source=name).model, values_from_flags(words, source=name))
    return live


@pytest.fixture(scope="module")
def live() -> dict[str, dict[str, Any]]:
    if core_version() < (0, 17, 0):
        pytest.skip("megatron-core 0.16 has no μP of its own")
    return run_ranks(_all_live, 1)[0]


@pytest.mark.parametrize("line", LINES)
def test_the_native_side_is_what_live_megatron_has(live: dict[str, dict[str, Any]], line: str) -> None:
    words = f"{MODEL} {MUP} {LINES[line]}".split()
    carried_over = recipe_from_native(words, source=line)
    native = Native(carried_over.model, values_from_flags(words, source=line))
    plan = carried_over.recipe.plan(carried_over.model)
    assert native.softmax_scale == pytest.approx(live[line]["softmax_scale"], rel=1e-12)
    assert native.output_multiplier == pytest.approx(live[line]["output"], rel=1e-12)
    for entry in plan.entries:
        expected, group = native.of(entry), live[line]["groups"][entry.name]
        assert (expected.lr, expected.min_lr) == pytest.approx((group.max_lr, group.min_lr), rel=1e-12), entry.name
        assert expected.eps is None or expected.eps == pytest.approx(group.eps, rel=1e-12), entry.name
        assert expected.weight_decay == group.weight_decay, entry.name
        if expected.init_std is not None:
            # The smallest draw, 12 × 128 positions, has a sampling error of 2 %.
            assert expected.init_std == pytest.approx(live[line]["std"][entry.name], rel=0.06), entry.name


@pytest.mark.parametrize("line", LINES)
def test_every_number_is_natives_or_said_to_differ(line: str) -> None:
    words = f"{MODEL} {MUP} {LINES[line]}".split()
    carried_over = recipe_from_native(words, source=line)
    native = Native(carried_over.model, values_from_flags(words, source=line))
    plan = carried_over.recipe.plan(carried_over.model)
    said = {(d.quantity, where): (d.native, d.recipe) for d in carried_over.differences for where in d.where}
    assert plan.softmax_scale == pytest.approx(native.softmax_scale, rel=1e-12)
    assert plan.output_multiplier == pytest.approx(native.output_multiplier, rel=1e-12)
    for entry in plan.entries:
        for quantity in ("init_std", "lr", "min_lr", "eps", "weight_decay"):
            numbers = (getattr(native.of(entry), quantity), getattr(entry, quantity))
            if None in numbers:
                assert numbers == (None, None), (entry.name, quantity)
                continue
            expected = said.get((quantity, re.sub(r"\.\d+\.", ".*.", entry.name)), numbers[:1] * 2)
            assert numbers == pytest.approx(expected, rel=1e-9), (entry.name, quantity)


# ---- the recipe ------------------------------------------------------------------------------------------------------


def test_the_base_is_the_model_at_the_base_width() -> None:
    native = carried("--mup-base-head-dim 8")
    base = native.recipe.base
    assert (base.hidden_size, base.ffn_size, base.num_attention_heads, base.head_size) == (32, 64, 4, 8)
    assert (base.num_layers, base.vocab_size) == (2, 48)
    assert native.recipe.hyperparameters.attention_multiplier == 1.0
    assert native.recipe.provenance["mup_base_hidden_size"] == 32


def test_the_heads_of_a_state_space_are_narrower_at_the_base() -> None:
    """One head has its size, its states and its share of the ratio, as an attention head does."""
    pattern = "--hybrid-layer-pattern M*-M --mamba-head-dim 16 --mamba-num-heads 24 --mamba-num-groups 2 --num-layers 4"
    native = carried(pattern)
    assert (native.recipe.base.value_of("mamba_num_heads"), native.recipe.base.value_of("mamba_num_groups")) == (6, 2)
    plan = native.recipe.plan(native.model)
    assert plan["decoder.layers.0.mixer.out_proj.weight"].width_ratio == 4
    # All that differs is the convolution, whose kernel does not grow.
    assert {each.where for each in found(native, "lr")} == {("decoder.layers.*.mixer.conv1d.weight",)}


def test_heads_grow_where_the_base_has_smaller_ones() -> None:
    native = carried("--mup-base-head-dim 4 --group-query-attention --num-query-groups 4")
    base = native.recipe.base
    assert (base.num_attention_heads, base.head_size, base.query_groups) == (8, 4, 2)
    assert native.recipe.hyperparameters.attention_multiplier == 1.0
    assert native.recipe.plan(native.model).softmax_scale == math.sqrt(4) / 8


def test_without_a_base_head_size_attention_keeps_natives_scale() -> None:
    native = carried()
    assert native.recipe.hyperparameters.attention_multiplier == pytest.approx(1 / math.sqrt(8), rel=1e-12)
    assert native.recipe.plan(native.model).softmax_scale == pytest.approx(1 / 8, rel=1e-12)
    assert any("--mup-base-head-dim is missing" in note and "0.353553" in note for note in native.notes)


def test_a_base_head_size_that_does_not_fit_is_made_up_for() -> None:
    native = carried("--mup-base-head-dim 5")
    assert native.recipe.base.head_size == 8
    assert native.recipe.plan(native.model).softmax_scale == pytest.approx(math.sqrt(5) / 8, rel=1e-12)
    assert any(note.startswith("--mup-base-head-dim 5 does not divide") for note in native.notes)


def test_factors() -> None:
    hyperparameters = carried("--mup-embedding-mult 3 --mup-output-mult 2").recipe.hyperparameters
    assert hyperparameters.embedding_multiplier == 3.0
    assert hyperparameters.output_multiplier == 8.0  # over the ratio 4: 2, as natively
    assert carried().recipe.hyperparameters.output_multiplier == 1.0


def test_hyperparameters_come_from_the_line_and_megatrons_defaults() -> None:
    h = carried("--init-method-std 0.03 --adam-beta2 0.95 --clip-grad 0.5").recipe.hyperparameters
    assert (h.lr, h.min_lr, h.weight_decay, h.init_method_std, h.adam_beta2) == (1e-3, 1e-4, 0.1, 0.03, 0.95)
    assert (h.adam_beta1, h.adam_eps, h.clip_grad) == (0.9, 1e-8, 0.5)
    assert carried("--optimizer sgd --sgd-momentum 0.8").recipe.hyperparameters.sgd_momentum == 0.8


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ("linear", 0.0, 1.0)),
        ("--lr-decay-style cosine --lr-warmup-fraction 0.01", ("cosine", 0.01, 1.0)),
        ("--train-iters 1000 --lr-warmup-iters 20", ("linear", 0.02, 1.0)),
        ("--train-iters 1000 --lr-decay-iters 800 --lr-warmup-fraction 0.1", ("linear", 0.08, 0.8)),
        ("--train-samples 1000 --lr-decay-samples 500 --lr-warmup-samples 20", ("linear", 0.02, 0.5)),
        ("--train-iters 1000 --lr-decay-iters 2000", ("linear", 0.0, 2.0)),
        # A short run of a long schedule, as functional tests have it: within its warm-up all the time.
        ("--train-iters 50 --lr-decay-iters 320000 --lr-warmup-fraction 0.01", ("linear", 64.0, 6400.0)),
    ],
)
def test_the_schedule_in_fractions_of_the_run(line: str, expected: tuple[str, float, float]) -> None:
    native = carried(line)
    s = native.recipe.schedule
    assert s.lr_decay_style == expected[0]
    assert (s.lr_warmup_fraction, s.lr_decay_fraction) == pytest.approx(expected[1:], rel=1e-12)


def test_the_final_decay_of_wsd() -> None:
    s = carried("--lr-decay-style WSD --lr-wsd-decay-iters 50 --lr-wsd-decay-style linear --train-iters 200").recipe
    assert (s.schedule.lr_wsd_decay_fraction, s.schedule.lr_wsd_decay_style) == (0.25, "linear")


# ---- differences -----------------------------------------------------------------------------------------------------


def test_eps_differs_for_all_but_hidden_weights() -> None:
    native = carried("--mup-base-head-dim 8 --untie-embeddings-and-output-weights")
    assert {difference.quantity for difference in native.differences} == {"eps"}
    by_role = {difference.role: difference for difference in native.differences}
    assert set(by_role) == {"input", "output"}
    assert (by_role["input"].native, by_role["input"].recipe) == (1e-8, 2.5e-9)
    assert "embedding.word_embeddings.weight" in by_role["input"].where
    assert "decoder.layers.*.mlp.linear_fc1.bias" in by_role["input"].where
    assert by_role["output"].where == ("output_layer.weight",)
    assert str(by_role["output"]) == (
        "eps of output parameters (output_layer.weight): 1e-08 natively, 2.5e-09 with the recipe. Native μP scales eps "
        "of hidden weights only; the gradients of these shrink with width as well."
    )


def test_a_side_that_cannot_be_divided_has_another_ratio() -> None:
    native = carried("--mup-base-head-dim 8 --ffn-hidden-size 250")
    assert native.recipe.base.ffn_size == 62
    fc2 = "decoder.layers.*.mlp.linear_fc2.weight"
    for quantity, expected in {
        "lr": (1e-3 / 4, 1e-3 * 62 / 250),
        "init_std": (0.02 / 4, 0.02 / math.sqrt(4 * 250 / 62)),
    }.items():
        (difference,) = found(native, quantity)
        assert difference.where == (fc2,)
        assert (difference.native, difference.recipe) == pytest.approx(expected, rel=1e-9)
    assert any(note.startswith("the base's ffn_hidden_size would be 62.5") for note in native.notes)


def test_a_warm_up_from_above_zero() -> None:
    (difference,) = found(carried("--lr-warmup-init 5e-5"), "first learning rate")
    assert (difference.native, difference.recipe) == (5e-5, 0.0)


def test_sgd_keeps_learning_rates_and_scales_weight_decay() -> None:
    native = carried("--optimizer sgd --mup-base-head-dim 8")
    assert {difference.quantity for difference in native.differences} == {"weight_decay"}
    embedding = next(d for d in native.differences if "embedding.word_embeddings.weight" in d.where)
    assert (embedding.native, embedding.recipe) == (0.1, 0.025)


def test_what_belongs_to_single_tensors_becomes_per_parameter() -> None:
    native = carried("--decoupled-lr 0.01 --embedding-init-method-std 0.1 --untie-embeddings-and-output-weights")
    plan = native.recipe.plan(native.model)
    for entry in plan.entries:
        if entry.is_embedding or entry.is_readout:
            assert entry.init_std == pytest.approx(0.1), entry.name
    assert plan["embedding.word_embeddings.weight"].lr == plan["output_layer.weight"].lr == pytest.approx(0.01)
    assert plan["embedding.position_embeddings.weight"].lr == 1e-3
    floors = {where: d for d in found(native, "min_lr") for where in d.where}
    assert set(floors) == {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert (floors["output_layer.weight"].native, floors["output_layer.weight"].recipe) == pytest.approx((1e-4, 1e-3))
    assert any(note.startswith("--decoupled-lr became lr_mult") for note in native.notes)


def test_weight_decay_that_changes_over_the_run() -> None:
    native = carried("--weight-decay-incr-style linear --start-weight-decay 0.01 --end-weight-decay 0.1")
    (difference,) = found(native, "start weight decay")
    assert (difference.native, difference.recipe) == (0.01, 0.1)
    assert found(native, "end weight decay") == []


def test_without_a_base_native_is_off_and_the_note_says_so() -> None:
    native = carried(mup="--use-mup --mup-base-head-dim 8")
    assert native.recipe.base.hidden_size == 128
    assert native.differences == ()
    assert any("--mup-base-hidden-size is missing" in note for note in native.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (MODEL, "--use-mup is missing"),
        (f"{MODEL} {MUP} --optimizer muon", "--optimizer muon beside --use-mup: Megatron's own μP does not scale"),
        (f"{MODEL} {MUP} --optimizer soap", "--optimizer soap: a recipe knows adam, sgd, muon and lion"),
        (f"{MODEL.replace('--lr 1e-3', '')} {MUP}", "--lr is missing"),
        (f"{MODEL} {MUP} --num-experts 8 --moe-use-upcycling", "--moe-use-upcycling: experts that are copies"),
        (f"{MODEL} {MUP} --multi-latent-attention", "--multi-latent-attention beside --use-mup"),
        (f"{MODEL} {MUP} --mup-base-head-dim -1", "--mup-base-head-dim -1: must be positive"),
        (f"{MODEL} {MUP} --mup-embedding-mult -3", "--mup-embedding-mult -3: must be positive"),
        (f"{MODEL} {MUP} --decoupled-lr -2", "--decoupled-lr -2: must be positive"),
        (f"{MODEL} {MUP} --lr 0 --decoupled-lr 1", "--lr 0: must be positive"),
        (f"{MODEL} {MUP} --embedding-init-method-std 0", "--embedding-init-method-std 0: must be positive"),
        (f"{MODEL} {MUP} --lr-warmup-iters 20", "--lr-warmup-iters 20: a recipe counts in fractions of the run"),
        (f"{MODEL} {MUP} --lr-decay-style WSD --train-iters 10", "--lr-wsd-decay-iters is missing"),
        (f"{MODEL} {MUP} --min-lr 1", "--min-lr 1 is above --lr 0.001. Lower it."),
        (f"{MODEL} {MUP} --adam-beta1 2", "--adam-beta1: should be less than 1, found 2.0"),
        (
            f"{MODEL} {MUP} --train-iters 50 --lr-decay-iters 40 --lr-warmup-iters 60",
            "--lr-warmup-iters 60 does not end before --lr-decay-iters 40, which Megatron refuses",
        ),
        (
            f"{MODEL} {MUP} --train-iters 50 --lr-warmup-iters 50",
            "--lr-warmup-iters 50 does not end before --train-iters 50, which Megatron refuses",
        ),
        (f"{MODEL} {MUP} --lr-warmup-fraction 1.2", "--lr-warmup-fraction 1.2 is no part of the run"),
        (f"{MODEL} {MUP} --train-iters 50 --lr-warmup-samples 10", "--lr-warmup-samples 10 beside --train-iters 50"),
        (
            f"{MODEL} {MUP} --train-iters 50 --lr-warmup-iters 1 --lr-warmup-fraction 0.1",
            "--lr-warmup-fraction 0.1 beside --lr-warmup-iters 1",
        ),
        (
            f"{MODEL} {MUP} --train-iters 50 --lr-decay-style WSD --lr-wsd-decay-iters 60",
            "--lr-wsd-decay-iters 60 is longer than --train-iters 50",
        ),
        (
            f"{MODEL} {MUP} --train-iters 50 --lr-decay-style inverse-square-root",
            "--lr-decay-style inverse-square-root is measured from the end of the warm-up",
        ),
        (f"{MODEL} {MUP} --train-iters 1 --lr-decay-iters 2000000", "--lr-decay-iters 2000000 is too long for"),
        (f"{MODEL} {MUP} --train-iters 0", "--train-iters 0 is below 1"),
    ],
)
def test_what_no_recipe_can_be_made_of(words: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        recipe_from_native(words.split(), source="line")
    assert said in str(raised.value)


def test_parsed_arguments_are_as_good_as_words() -> None:
    values = values_from_flags(f"{MODEL} {MUP}".split(), source="line")
    assert recipe_from_native(values, source="line") == carried()
