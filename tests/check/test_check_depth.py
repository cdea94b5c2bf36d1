"""Verdicts on targets deeper than their base, by a rule of depth: right ones, and its mistakes on live models."""

from pathlib import Path

import pytest
from support.processes import run_ranks

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.mutants import MUTANTS
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.recipe import Depth, Hyperparameters, Parametrization, Recipe

BASE = ModelFile(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    vocab_size=100,
    seq_length=16,
    transformer_impl="local",
    untie_embeddings_and_output_weights=True,
)
TARGET = BASE.model_copy(update={"hidden_size": 256, "num_layers": 16, "num_attention_heads": 16})


def checked(alpha: float, references: Path, mutant: str | None = None) -> tuple[str, list[str]]:
    """In a rank: the outcome, and the names of causes."""
    recipe = Recipe(
        base=BASE,
        hyperparameters=Hyperparameters(lr=0.003, residual_multiplier=0.8),
        parametrization=Parametrization(depth=Depth(alpha=alpha)),
    )
    wrong = None if mutant is None else MUTANTS[mutant]
    found = check_megatron(
        TARGET, recipe, widths=(32, 64, 128), seeds=2, mutant=wrong, references=references, processes=1
    )
    return found.outcome.value, [cause.name for cause in found.causes]


@pytest.mark.parametrize("alpha", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_right_deeper_target_passes(alpha: float, references: Path) -> None:
    assert run_ranks(checked, 1, alpha, references)[0] == ("pass", [])


@pytest.mark.parametrize(
    ("mutant", "alpha"),
    [
        ("branch-multiplier-lost", 1.0),
        pytest.param("depth-twice-in-init", 1.0, marks=pytest.mark.slow),
        pytest.param("depth-rates-of-vectors", 0.5, marks=pytest.mark.slow),
    ],
)
def test_a_mistake_about_depth_is_named(mutant: str, alpha: float, references: Path) -> None:
    outcome, causes = run_ranks(checked, 1, alpha, references, mutant)[0]
    assert outcome == "fail"
    assert causes[0] in MUTANTS[mutant].cause
