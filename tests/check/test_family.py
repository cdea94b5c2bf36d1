"""Which models are trained for a target, and with which values."""

from typing import Any

import pytest

from mup_megatron.check.family import FLOOR, at_width, models_for, stressed, widths_for
from mup_megatron.errors import InputError
from mup_megatron.models.model_file import ModelFile
from mup_megatron.recipe import Hyperparameters, Parametrization, Recipe

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 256,
    "vocab_size": 50257,
    "seq_length": 1024,
}


def recipe(optimizer: str = "adam", hyperparameters: dict[str, Any] | None = None, **base: Any) -> Recipe:
    return Recipe(
        base=ModelFile(**{**BASE, **base}),
        hyperparameters=Hyperparameters(**{"lr": 0.004, **(hyperparameters or {})}),
        parametrization=Parametrization(optimizer=optimizer),
    )


def target(**changes: Any) -> ModelFile:
    return ModelFile(**{**BASE, "hidden_size": 512, "num_attention_heads": 32, "ffn_hidden_size": 2048, **changes})


def test_head_size_ratios_and_depth_are_the_targets() -> None:
    large = target(num_layers=7, ffn_hidden_size=1536)
    for width, model in models_for(large, recipe(), widths_for(large, recipe(), 4)).items():
        assert model.hidden_size == width
        assert model.head_size == large.head_size == 16
        assert model.ffn_size == 3 * width
        assert model.num_layers == 7


def test_widths_double_from_the_smallest_that_keeps_whole_heads() -> None:
    assert widths_for(target(), recipe(), 4) == [32, 64, 128, 256]
    assert widths_for(target(num_attention_heads=4), recipe(), 3) == [128, 256, 512]
    grouped = target(group_query_attention=True, num_query_groups=4)
    assert widths_for(grouped, recipe(group_query_attention=True, num_query_groups=2), 2) == [128, 256]


def test_what_base_and_target_share_stays_fixed() -> None:
    fixed = target(ffn_hidden_size=256)
    assert {model.ffn_size for model in models_for(fixed, recipe(), [32, 64, 128]).values()} == {256}
    few = target(group_query_attention=True, num_query_groups=2)
    models = models_for(few, recipe(group_query_attention=True, num_query_groups=2), [32, 64, 128])
    assert {model.query_groups for model in models.values()} == {2}


def test_heads_per_group_stay_where_groups_grow() -> None:
    model = at_width(
        target(group_query_attention=True, num_query_groups=8),
        recipe(group_query_attention=True, num_query_groups=1),
        128,
    )
    assert (model.num_attention_heads, model.query_groups) == (8, 2)


def test_a_width_that_cannot_be_built_says_what_would_fit() -> None:
    with pytest.raises(InputError, match=r"--widths 40.*multiple of 16"):
        at_width(target(), recipe(), 40)


def test_stress_makes_mistakes_visible_and_keeps_what_is_transferred() -> None:
    tuned = recipe(hyperparameters={"output_multiplier": 3.0, "min_lr": 0.0, "weight_decay": 0.1})
    stress = stressed(tuned, steps=8, eps=1e-4)
    h = stress.hyperparameters
    assert (h.lr, h.adam_eps) == (0.004, 1e-4)
    assert h.min_lr == pytest.approx(FLOOR * h.lr)
    assert h.lr * h.weight_decay * 8 > 0.5
    assert (stress.base, stress.per_parameter, stress.parametrization) == (
        tuned.base,
        tuned.per_parameter,
        tuned.parametrization,
    )
    assert (h.output_multiplier, h.init_method_std) == (3.0, tuned.hyperparameters.init_method_std)


def test_a_learning_rate_that_moves_nothing_is_raised_and_a_larger_floor_stays() -> None:
    tuned = recipe(hyperparameters={"lr": 1e-6, "min_lr": 5e-7})
    h = stressed(tuned, steps=8).hyperparameters
    assert h.lr == pytest.approx(0.02 / 8)
    assert h.min_lr == pytest.approx(h.lr / 2)


def test_sgds_learning_rate_is_left_alone() -> None:
    tuned = recipe("sgd", {"lr": 0.5})
    assert stressed(tuned, steps=8).hyperparameters.lr == 0.5
