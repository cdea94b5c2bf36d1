"""The check against Megatron-Core's own μP (`use_mup`): what docs/native-mup.md says is off there, it finds and names.

Every subject is a real Megatron model with Megatron's own overrides; the reference is a plain GPT with our plan. The
base's head size is given to native μP, so that its attention is right.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import pytest
from support import planned, stock
from support.processes import run_ranks
from support.shapes import gpt

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.stress import stressed
from mup_megatron.check.measure.measurements import MeasuredRun, Measurements, Quantity, RunProtocol
from mup_megatron.check.verdict.comparison import Comparison, Mismatch, compare, findings
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import Recipe

pytestmark = pytest.mark.skipif(core_version() < (0, 17, 0), reason="megatron-core 0.16 has no μP of its own")

PROTOCOL = RunProtocol(steps=8, recorded=(3, 8), spectral=False)
SEEDS = 2
EPS = 0.003
"""Of the gradients' size, so that it acts."""
SHAPE = {"untie_embeddings_and_output_weights": True, "position_embedding_type": "rope"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe, and the models that it is carried to."""

    recipe: Recipe
    models: tuple[ModelFile, ...]


def _case(*, ffn_grows: bool = True, eps: float | None = EPS, exponent: float = 1.0) -> Case:
    models = tuple(gpt(r, **SHAPE, **({} if ffn_grows else {"ffn_hidden_size": 64})) for r in (1, 2, 4))
    recipe = planned.recipe(models[0], weight_decay_exponent=exponent)
    return Case(recipe=stressed(recipe, steps=PROTOCOL.steps, eps=eps), models=models)


CASES = {
    "as in our plan": _case(eps=None, exponent=0.0),
    "eps and weight decay": _case(),
    "fixed ffn": _case(ffn_grows=False, eps=None, exponent=0.0),
}
"""The first stays within what native μP does as we do; each of the others leaves it in one way."""


# ---- in the rank -----------------------------------------------------------------------------------------------------


def _native(case: Case, model: ModelFile, seed: int) -> MeasuredRun:
    """A run as Megatron-LM sets it up under --use-mup, measured."""
    from megatron.core.optimizer import get_mup_config_overrides, get_standard_config_overrides

    from mup_megatron.check.measure.measuring import measure
    from mup_megatron.check.subjects.megatron import MegatronTrainee
    from mup_megatron.training.build import Built
    from mup_megatron.training.options import BatchSizes

    base, layout, sizes = case.recipe.megatron_base, stock.Layout(), planned.sizes_of(model)
    stock.init_parallel(layout, seed)
    config = stock.transformer_config(
        sizes, layout, use_mup=True, mup_base_hidden_size=base.hidden_size, mup_base_head_dim=base.head_size
    )
    chunks = stock.build_chunks(sizes, layout, config)

    def overrides(_chunks: object, optimizer: object) -> dict[object, object]:
        own = get_mup_config_overrides(optimizer, config.mup_width_mult, "adam")
        return {**get_standard_config_overrides(optimizer), **own}

    schedule = case.recipe.schedule
    told = planned.training_of(case.recipe)
    training = replace(told, warmup_steps=schedule.lr_warmup_fraction * PROTOCOL.steps, decay_steps=PROTOCOL.steps)
    run = stock.finish(sizes, layout, training, config, chunks, overrides)
    built = Built(config, run.chunks, run.optimizer, run.scheduler)
    batches = BatchSizes(global_batch=PROTOCOL.batch_size, micro_batch=PROTOCOL.batch_size, data_parallel=1)
    trainee = MegatronTrainee(built, model, case.recipe, seed=seed, sizes=batches)
    return measure(trainee, PROTOCOL, width=model.hidden_size, seed=seed)


def _reference(case: Case, model: ModelFile, seed: int) -> MeasuredRun:
    from mup_megatron.check.measure.measuring import measure
    from mup_megatron.check.reference.gpt import Reference

    plan = case.recipe.plan(model)
    trainee = Reference(model, case.recipe, plan, seed=seed, steps=PROTOCOL.steps, batch_size=PROTOCOL.batch_size)
    return measure(trainee, PROTOCOL, width=model.hidden_size, seed=seed)


def _both(case: Case) -> tuple[Measurements, Measurements]:
    """(native, reference)"""
    native = tuple(_native(case, model, seed) for model in case.models for seed in range(SEEDS))
    reference = tuple(_reference(case, model, 100 + seed) for model in case.models for seed in range(SEEDS))
    return Measurements(native), Measurements(reference)


# ---- what is found ---------------------------------------------------------------------------------------------------


@cache
def _compared(name: str) -> Comparison:
    native, reference = run_ranks(_both, 1, CASES[name])[0]
    assert native.problems == reference.problems == []
    # Natively the readout's factor is on what the readout gives, so its module's output is not yet the logits.
    coordinates = (Quantity.ACTIVATION, Quantity.UPDATE)
    both = compare(native, reference)
    return {key: c for key, c in both.items() if not (key.name == "output_layer" and key.quantity in coordinates)}


def _off(comparison: Comparison, quantity: Quantity) -> dict[str, float]:
    """Names of what is off with width, and by which power of it."""
    found = [f for f in findings(comparison) if f.key.quantity is quantity and f.kind is Mismatch.SLOPE]
    return {f.key.name: f.compared.slope for f in found}


def _looked_at(comparison: Comparison, quantity: Quantity) -> set[str]:
    return {key.name for key in comparison if key.quantity is quantity}


def _hidden(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.endswith(".weight") and ".linear_" in name}


def test_where_native_mup_does_as_our_plan_nothing_is_found() -> None:
    """But for eps, which is read off exactly even where it is too small to act."""
    comparison = _compared("as in our plan")

    assert [f for f in findings(comparison) if f.key.quantity is not Quantity.EPS] == []
    assert _looked_at(comparison, Quantity.LEARNING_RATE) > _hidden(_looked_at(comparison, Quantity.INITIAL))


def test_an_ffn_that_stays_is_found_at_the_initial_weights_and_learning_rate_of_fc2() -> None:
    comparison = _compared("fixed ffn")
    fc2 = {f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(2)}

    initial, rate = (_off(comparison, quantity) for quantity in (Quantity.INITIAL, Quantity.LEARNING_RATE))

    assert set(initial) == set(rate) == fc2
    # Its fan_in stays: neither its std should fall with hidden, as 1/√m, nor its rate, as 1/m.
    assert list(initial.values()) == pytest.approx([-0.5, -0.5], abs=0.05)
    assert list(rate.values()) == pytest.approx([-1, -1], abs=0.02)


def test_eps_is_found_at_everything_but_hidden_weights() -> None:
    comparison = _compared("eps and weight decay")

    off = _off(comparison, Quantity.EPS)

    assert {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"} <= set(off)
    assert {f"decoder.layers.{layer}.input_layernorm.weight" for layer in range(2)} <= set(off)
    assert _hidden(off) == set()
    assert off["embedding.word_embeddings.weight"] == pytest.approx(1, abs=0.1)


def test_weight_decay_is_found_at_hidden_weights_alone() -> None:
    comparison = _compared("eps and weight decay")

    off = _off(comparison, Quantity.WEIGHT_DECAY)

    assert set(off) == _hidden(_looked_at(comparison, Quantity.INITIAL))
    assert list(off.values()) == pytest.approx([-1] * len(off), abs=0.05)


def test_the_causes_come_before_their_consequences() -> None:
    assert findings(_compared("fixed ffn"))[0].key.name.endswith("linear_fc2.weight")
    assert findings(_compared("eps and weight decay"))[0].key.quantity is Quantity.EPS
