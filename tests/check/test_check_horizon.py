"""Verdicts on a recipe whose values are moved to another batch and length: right, moved twice, and moved in part."""

from pathlib import Path

import pytest
from support.processes import run_ranks
from support.shapes import gpt, recipe_for

from mup_megatron.check.measure.levels import Level
from mup_megatron.check.mutants import MUTANTS
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.recipe import Horizon, Training
from mup_megatron.training.options import TrainingOptions

UNTIED = {"untie_embeddings_and_output_weights": True}
MISTAKES = ("horizon-twice", "horizon-decay-only")
RECIPE = recipe_for(gpt(1, **UNTIED)).model_copy(
    update={
        "training": Training(train_iters=100, global_batch_size=8, seq_length=16),
        "horizon": Horizon(rule="steps", tokens=16 * 100 * 8 * 16, batch=32),
    }
)


def _verdict(mistake: str | None, references: Path, seed: int) -> tuple[str, list[str]]:
    """In a rank."""
    found = check_megatron(
        gpt(4, **UNTIED),
        RECIPE,
        level=Level.QUICK,
        seeds=2,
        first_seed=seed,
        layout=TrainingOptions(train_iters=1, global_batch_size=1),
        mutant=None if mistake is None else MUTANTS[mistake],
        references=references,
    )
    return found.outcome.value, [cause.name for cause in found.causes]


@pytest.mark.parametrize("mistake", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in MISTAKES)])
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (11, 21, 31, 41))])
def test_a_horizon_is_followed_and_mistakes_in_it_are_named(mistake: str | None, seed: int, references: Path) -> None:
    [(outcome, causes)] = run_ranks(_verdict, 1, mistake, references, seed)
    assert outcome == ("pass" if mistake is None else "fail")
    assert causes[:1] == ([] if mistake is None else [mistake])
