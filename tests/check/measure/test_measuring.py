"""What is measured of one run, on a plain GPT whose every number can be worked out otherwise."""

import math
from statistics import fmean

import pytest
import torch

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.stress import stressed
from mup_megatron.check.measure.measurements import Key, MeasuredRun, Measurements, Quantity, RunProtocol
from mup_megatron.check.measure.measuring import measure
from mup_megatron.check.reference.gpt import Reference
from mup_megatron.recipe import Hyperparameters, Recipe
from mup_megatron.theory import Plan

PROTOCOL = RunProtocol(steps=8, recorded=(3, 8))
TWO_STEPS = RunProtocol(steps=2, recorded=(), spectral=False, activations=False)
BASE = ModelFile(
    num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=64, seq_length=32, transformer_impl="local"
)
TARGET = BASE.model_copy(update={"hidden_size": 64, "num_attention_heads": 4})
RECIPE = stressed(
    Recipe(base=BASE, hyperparameters=Hyperparameters(lr=0.004, init_method_std=0.05, output_multiplier=2.0)),
    steps=PROTOCOL.steps,
    eps=1e-4,
)
LAST = PROTOCOL.steps


def reference() -> Reference:
    return Reference(TARGET, RECIPE, RECIPE.plan(TARGET), seed=3, steps=PROTOCOL.steps, batch_size=4)


@pytest.fixture(scope="module")
def run() -> MeasuredRun:
    return measure(reference(), PROTOCOL, width=64, seed=3)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return RECIPE.plan(TARGET)


def rate(step: int) -> float:
    """Of the schedule of a check at a step counted from 1, relative to the peak: warm-up over 2, down to a tenth."""
    return (step - 1) / 2 if step <= 3 else 1 - 0.9 * (step - 3) / 6


def test_an_initial_weight_has_the_std_of_its_plan(run: MeasuredRun, plan: Plan) -> None:
    for entry in plan.entries:
        found = run.values[Key(Quantity.INITIAL, entry.name, 0)]
        expected = abs(entry.init_value) if entry.init_value is not None else entry.init_std
        assert found == pytest.approx(expected, rel=0.05), entry.name


def test_learning_rate_eps_and_weight_decay_are_the_plans(run: MeasuredRun, plan: Plan) -> None:
    for entry in plan.entries:
        for step in PROTOCOL.recorded:
            values = [
                run.values[Key(quantity, entry.name, step)]
                for quantity in (Quantity.LEARNING_RATE, Quantity.EPS, Quantity.WEIGHT_DECAY)
            ]
            expected = [entry.lr * rate(step), entry.eps, entry.weight_decay]
            assert values == pytest.approx(expected, rel=0.01, abs=1e-4 * RECIPE.hyperparameters.weight_decay), entry


def test_the_first_step_of_a_warm_up_has_no_rate(run: MeasuredRun, plan: Plan) -> None:
    assert {run.values[Key(Quantity.LEARNING_RATE, entry.name, 1)] for entry in plan.entries} == {0.0}


def test_weight_decay_alone_makes_the_overlap_of_hidden_weights(run: MeasuredRun, plan: Plan) -> None:
    for entry in plan.entries:
        if not entry.properties or entry.is_residual:
            decays = [1 - entry.lr * rate(step) * entry.weight_decay for step in range(1, LAST + 1)]
            found = run.values[Key(Quantity.OVERLAP, entry.name, LAST)]
            assert found == pytest.approx(math.prod(decays), rel=0.05), entry.name


def test_a_spectral_norm_is_that_of_the_whole_update_in_units_of_its_sides() -> None:
    trainee = reference()
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    start = {n: p.detach().clone() for n, p in trainee.parameters()}[name]
    found = measure(trainee, PROTOCOL, width=64, seed=3).values[Key(Quantity.SPECTRAL, name, LAST)]
    update = dict(trainee.parameters())[name].detach() - start
    expected = torch.linalg.matrix_norm(update, 2) / math.sqrt(256 / 64)
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_the_model_learns_and_every_loss_is_kept(run: MeasuredRun) -> None:
    assert len(run.losses) == PROTOCOL.steps
    assert fmean(run.losses[-2:]) < run.losses[0]
    assert run.values[Key(Quantity.LOSS, "loss", LAST)] == run.losses[-1]


class _Ending(Reference):
    """Its second step leaves these values in a bias."""

    def __init__(self, *values: float) -> None:
        super().__init__(TARGET, RECIPE, RECIPE.plan(TARGET), seed=3, steps=2, batch_size=4)
        self._values = values

    def step(self, step: int) -> float:
        loss = super().step(step)
        if step == 1:
            bias = dict(self.parameters())["decoder.final_layernorm.bias"]
            with torch.no_grad():
                bias[: len(self._values)] = torch.tensor(self._values)
        return loss


@pytest.mark.parametrize("values", [(math.nan,), (math.inf,), (math.inf, -math.inf)])
def test_a_weight_that_is_not_finite_is_named_with_its_step(values: tuple[float, ...]) -> None:
    found = measure(_Ending(*values), TWO_STEPS, width=64, seed=3)
    assert found.problem == "decoder.final_layernorm.bias: not finite after 2 steps"


def test_one_is_finite_though_its_sum_is_not() -> None:
    assert measure(_Ending(3e38, 3e38), TWO_STEPS, width=64, seed=3).problem is None


def test_two_runs_of_one_seed_are_one_run(run: MeasuredRun) -> None:
    assert measure(reference(), PROTOCOL, width=64, seed=3) == run


def test_runs_survive_a_file(run: MeasuredRun) -> None:
    measured = Measurements((run,))
    assert Measurements.from_json(measured.to_json()) == measured
