"""A check of a model with Mamba layers, from beginning to end: a right one passes, its own mistakes are found."""

import pytest
from support.shapes import MAMBA, gpt, hybrid, recipe_for

from mup_megatron.check.mutants import MUTANTS
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.check.verdict.verdict import Verdict

BASE, TARGET = (hybrid(gpt(width), "M*-M", **MAMBA) for width in (2, 16))


def verdict(mutant: str | None) -> Verdict:
    own = None if mutant is None else MUTANTS[mutant]
    return check_megatron(TARGET, recipe_for(BASE, lr=0.004), references=None, mutant=own)


@pytest.mark.slow
def test_a_right_model_passes() -> None:
    found = verdict(None)
    assert found.passed, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "culprit", "cause"),
    [
        ("convolution-as-matrix", "decoder.layers.0.mixer.conv1d.weight", "convolution-learning-rate"),
        ("residual-init-as-gpt", "decoder.layers.0.mixer.out_proj.weight", "residual-init"),
    ],
)
def test_a_mistake_is_found_and_named(mistake: str, culprit: str, cause: str) -> None:
    found = verdict(mistake)
    assert not found.passed
    assert (found.culprit, found.causes[0].name) == (culprit, cause)
