"""A trial is a training of the proxy; the best one becomes a recipe. Real trials: tests/cli/test_sweep_command.py."""

import itertools
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import BASE

from mup_megatron.architectures.cost import parameter_count, training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe, recipe
from mup_megatron.search import Space, StudyRecord, StudySpec, Trial, load_space
from mup_megatron.search.space import SearchRange
from mup_megatron.training.options import TrainingOptions
from mup_megatron.tuning import (
    DEFAULT_SPACE,
    SEARCHABLE,
    ProxyTraining,
    Target,
    at_rung,
    fixed_content,
    ladder_for,
    narrower,
    transferred,
)

SPACE_FILE = Path(__file__).parents[1] / "configs" / "spaces" / "gpt3_6.7b.yaml"
PROXY = model_file(BASE, source="proxy.yaml")
OPTIONS = TrainingOptions(train_iters=3, global_batch_size=2, eval_iters=1)
GIVEN = recipe(
    {
        "base": {**BASE, "hidden_size": 64},
        "hyperparameters": {"lr": 0.5, "weight_decay": 0.3, "adam_beta2": 0.95},
        "schedule": {"lr_decay_style": "cosine"},
        "per_parameter": [{"match": "embedding.*", "lr_mult": 2.0}],
        "parametrization": {"weight_decay_exponent": 0.5},
        "training": {"train_iters": 7},
        "provenance": {"study": "an older one"},
    },
    source="given",
)


def objective(given: Recipe | None = None, **changes: Any) -> ProxyTraining:
    fields = {
        "proxy": PROXY, "fixed": fixed_content(given), "data": Path("some/where/text"), "data_sha256": "ab",
        "options": OPTIONS,
    }  # fmt: skip
    return ProxyTraining(**{**fields, **changes})


def space(**bounds: tuple[float, float]) -> Space:
    return Space({name: SearchRange(low, high, log=False) for name, (low, high) in bounds.items()})


# What is searched


def test_the_default_space_is_the_one_in_the_file() -> None:
    in_file = load_space(SPACE_FILE, SEARCHABLE)
    assert in_file.ranges.keys() == DEFAULT_SPACE.ranges.keys()
    for name, searched in in_file.ranges.items():
        ours = DEFAULT_SPACE.ranges[name]
        # 10**-4 and 1e-4 may differ in the last bit.
        assert (ours.low, ours.high) == pytest.approx((searched.low, searched.high), rel=1e-15)
        assert ours.log == searched.log


def test_the_default_space_is_the_papers() -> None:
    bounds = {name: (searched.low, searched.high) for name, searched in DEFAULT_SPACE.ranges.items()}
    assert bounds == {
        "lr": (10**-4, 10**-1),
        "init_method_std": (0.02 / 10, 0.02 * 10),
        "embedding_multiplier": (10**-1, 10),
        "attention_multiplier": (4**-1, 4),
        "output_multiplier": (4**-1, 4),
    }
    assert all(searched.log for searched in DEFAULT_SPACE.ranges.values())


def test_the_space_around_published_values_has_them_in_the_middle() -> None:
    around = load_space(SPACE_FILE.with_name("published_256.yaml"), SEARCHABLE)
    assert around.ranges.keys() == DEFAULT_SPACE.ranges.keys()
    published = {
        "lr": (0.006, 0.006), "init_method_std": (0.05, 0.08, 0.1), "embedding_multiplier": (10.0, 10.0, 12.0),
        "output_multiplier": (1.0, 1.0), "attention_multiplier": (1.0, 1.0),
    }  # fmt: skip
    for name, values in published.items():
        middle = math.exp(sum(map(math.log, values)) / len(values))
        assert around.ranges[name].fraction(middle) == pytest.approx(0.5, abs=0.02)
        assert all(0.25 < around.ranges[name].fraction(value) < 0.75 for value in values)


def test_whatever_a_recipe_tunes_can_be_searched() -> None:
    numbers = {key for key, value in dict(GIVEN.hyperparameters).items() if isinstance(value, float)}
    assert set(SEARCHABLE) == numbers
    words = set(dict(GIVEN.hyperparameters)) - numbers
    assert all(key.startswith("muon_") for key in words), "modes, switches and counts are chosen, not drawn"


# A trial


def test_a_trials_recipe_has_its_values_at_the_proxy_and_the_rest_as_given() -> None:
    made = objective(GIVEN).recipe({"lr": 0.01, "output_multiplier": 2.0})
    assert made.base == PROXY
    assert (made.hyperparameters.lr, made.hyperparameters.output_multiplier) == (0.01, 2.0)
    assert (made.hyperparameters.weight_decay, made.hyperparameters.adam_beta2) == (0.3, 0.95)
    for section in ("schedule", "per_parameter", "parametrization"):
        assert getattr(made, section) == getattr(GIVEN, section)
    assert made.training.train_iters is None, "how the older one was tuned says nothing of this one"
    assert made.provenance == {}


def test_without_a_recipe_the_rest_are_defaults() -> None:
    made = objective().recipe({"lr": 0.01})
    assert made == recipe({"base": BASE, "hyperparameters": {"lr": 0.01}}, source="defaults")


@pytest.mark.parametrize("given", [None, GIVEN])
def test_it_can_be_sent_to_another_process(given: Recipe | None) -> None:
    made = objective(given)
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("given", [None, GIVEN])
def test_the_context_is_json_and_holds_what_a_loss_depends_on(given: Recipe | None) -> None:
    context = objective(given).context()
    assert json.loads(json.dumps(context, allow_nan=False)) == context
    changed: list[dict[str, Any]] = [
        {"proxy": PROXY.model_copy(update={"num_layers": 2})},
        {"data": Path("other")},
        {"data_sha256": "cd"},
        *({"options": replace(OPTIONS, **change)} for change in (
            {"train_iters": 4}, {"global_batch_size": 4}, {"micro_batch_size": 1}, {"seed": 1}, {"eval_iters": 2},
            {"bf16": True}, {"split": "9,1,0"},
        )),
    ]  # fmt: skip
    assert all(objective(given, **change).context() != context for change in changed)
    assert objective(GIVEN).context() != objective(None).context()
    # Neither where the data lie nor where indices are kept.
    moved = {
        "data": Path("else/where/text"),
        "options": replace(OPTIONS, data_cache_path=Path("cache"), log_interval=1),
    }
    assert objective(given, **moved).context() == context


# What no trial could run


@pytest.mark.parametrize("given", [None, GIVEN])
def test_the_default_space_is_possible(given: Recipe | None) -> None:
    objective(given).require_possible(DEFAULT_SPACE, source="--space")


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"lr": (-0.1, 0.1)}, r"s\.yaml: hyperparameters\.lr: should be greater than 0, found -0\.1"),
        ({"lr": (0.1, 0.2), "adam_beta2": (0.9, 1.0)}, r"hyperparameters\.adam_beta2: should be less than 1, found 1"),
        ({"lr": (0.01, 0.2), "min_lr": (0.0, 0.1)}, r"hyperparameters: min_lr 0\.1 is above lr 0\.01\. Lower it\."),
        ({"weight_decay": (0.1, 0.2)}, r"hyperparameters\.lr: missing"),
    ],
)
def test_a_space_with_an_impossible_corner_is_refused(bounds: dict[str, tuple[float, float]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        objective().require_possible(space(**bounds), source="s.yaml")


def test_options_and_overrides_that_no_trial_could_run_are_refused() -> None:
    lr = space(lr=(0.1, 0.2))
    with pytest.raises(InputError, match=r"--train-iters 0: must be at least 1"):
        objective(options=replace(OPTIONS, train_iters=0)).require_possible(lr, source="s.yaml")
    unmatched = GIVEN.model_copy(
        update={"per_parameter": (GIVEN.per_parameter[0].model_copy(update={"match": "nothing.*"}),)}
    )
    with pytest.raises(InputError, match=r"per_parameter\[0\] 'nothing\.\*' matches no parameter"):
        objective(unmatched).require_possible(lr, source="s.yaml")


# The best trial


def trial(number: int, loss: float | None, **parameters: float) -> Trial:
    state = "complete" if loss is not None else "diverged"
    metrics = {"tokens": 96, "versions": {"torch": f"2.{number}"}}
    return Trial(number, number, state, loss, parameters, 1.0, None if loss is not None else "NaN", metrics)


def study(*trials: Trial, context: dict[str, Any] | None = None) -> StudyRecord:
    context = objective(GIVEN).context() if context is None else context
    spec = StudySpec("s", "sqlite:///s.db", 5, "random", space(lr=(0.001, 1.0)), context)
    return StudyRecord(spec, trials, len(trials))


TRIALS = (trial(0, 3.0, lr=0.1), trial(1, None, lr=0.9), trial(2, 2.5, lr=0.25), trial(3, 2.75, lr=0.01))


def test_the_best_trial_becomes_a_recipe_with_its_values_and_what_was_fixed() -> None:
    found = transferred(study(*TRIALS))
    assert found.hyperparameters.lr == 0.25
    # But for where it comes from, it is what the trial ran with.
    assert found.fingerprint == objective(GIVEN).recipe({"lr": 0.25}).fingerprint
    assert found.training.model_dump() == {"train_iters": 3, "global_batch_size": 2, "seq_length": 16}


def test_the_recipe_says_where_it_comes_from() -> None:
    provenance = transferred(study(*TRIALS)).provenance
    # Of the trial, not of the program that transfers it.
    assert provenance.pop("versions") == {"torch": "2.2"}
    assert provenance == {
        "study": "s",
        "trial": 2,
        "loss": 2.5,
        "trials": {"complete": 3, "diverged": 1},
        "searched": {"lr": {"low": 0.001, "high": 1.0, "log": False}},
        "sampler": "random",
        "seed": 5,
        "data": {"name": "text", "sha256": "ab"},
        "tokens_per_trial": 96,
    }


def test_without_a_complete_trial_there_is_nothing_to_transfer() -> None:
    for trials in ((), (TRIALS[1],)):
        with pytest.raises(InputError, match=r"^study 's': no complete trial yet\. Run the sweep on, or widen"):
            transferred(study(*trials))


def test_a_study_of_something_else_is_refused() -> None:
    with pytest.raises(InputError, match=r"^study 's' was not made by `mup-megatron sweep`\. Choose another"):
        transferred(study(*TRIALS, context={"model": "resnet"}))


# The optimum, and what the search has cost


def searched(optimum: float, count: int = 40) -> StudyRecord:
    """A search of the learning rate whose loss is lowest there, from 0.001 to 1 in logarithms."""
    context = objective(GIVEN).context()
    logarithmic = Space({"lr": SearchRange(0.001, 1.0, log=True)})
    rates = [logarithmic.sample(5, number)["lr"] for number in range(count)]
    found = tuple(trial(i, 3.0 + (math.log10(lr / optimum)) ** 2, lr=lr) for i, lr in enumerate(rates))
    return StudyRecord(StudySpec("s", "sqlite:///s.db", 5, "random", logarithmic, context), found, count)


def test_the_fitted_optimum_is_in_the_provenance_and_the_best_trial_is_the_recipe() -> None:
    found = transferred(searched(0.04))
    fit = found.provenance["fitted"]
    assert fit["basins"]["lr"]["optimum"] == pytest.approx(0.04, rel=0.01)
    low, high = fit["basins"]["lr"]["interval"]
    assert low <= 0.04 * 1.001
    assert high >= 0.04 * 0.999
    assert found.hyperparameters.lr == searched(0.04).require_best().parameters["lr"]
    assert "fitted" not in transferred(searched(0.04, count=11)).provenance, "too few trials"


def test_an_optimum_at_an_edge_of_the_space_is_refused_unless_accepted() -> None:
    with pytest.raises(
        InputError, match=r"falls towards an edge of the space \(lr 1\)\. .* or add --accept-edge"
    ) as error:
        transferred(searched(8.0))
    assert len(str(error.value)) <= 300
    found = transferred(searched(8.0), accept_edge=True)
    assert found.provenance["fitted"]["at_edges"] == {"lr": "high"}
    assert found.hyperparameters.lr == searched(8.0).require_best().parameters["lr"]


def test_the_share_of_the_targets_cost_is_said_if_the_target_is() -> None:
    assert "cost" not in transferred(study(*TRIALS)).provenance
    target = PROXY.model_copy(update={"hidden_size": 128, "num_attention_heads": 4})
    cost = transferred(study(*TRIALS), target=Target(target, tokens=10**6)).provenance["cost"]
    tokens = len(TRIALS) * 3 * 2 * PROXY.seq_length
    assert cost == {
        "flops": tokens * training_flops(PROXY).total,
        "share_of_target": tokens * training_flops(PROXY).total / (10**6 * training_flops(target).total),
    }
    longest = transferred(study(*TRIALS), target=Target(target)).provenance["cost"]
    assert longest["share_of_target"] == pytest.approx(
        cost["flops"] / (20 * parameter_count(target) * training_flops(target).total)
    )


# Fidelities

WIDE = PROXY.model_copy(update={"hidden_size": 128, "num_attention_heads": 4})


def rungs(budget: float = 1e12, found: StudyRecord | None = None, **changes: Any) -> list[tuple[int, int, int]]:
    training = objective(**{"proxy": WIDE, "options": replace(OPTIONS, train_iters=40), **changes})
    ladder = ladder_for(training, DEFAULT_SPACE, budget, found, source="--space")
    at = [at_rung(training, rung) for rung in ladder.rungs]
    return [
        (each.model.hidden_size, each.options.train_iters, rung.trials)
        for each, rung in zip(at, ladder.rungs, strict=True)
    ]


def test_a_ladder_leads_from_narrow_and_short_trials_to_whole_ones() -> None:
    found = rungs()
    assert [rung[:2] for rung in found] == [(32, 5), (32, 20), (64, 20), (128, 40)]
    assert all(below[2] > 2 * above[2] for below, above in itertools.pairwise(found))
    # Narrower heads where there are too few of them.
    two_heads = PROXY.model_copy(update={"hidden_size": 256, "num_attention_heads": 2})
    assert [rung[:2] for rung in rungs(proxy=two_heads)] == [(64, 5), (64, 20), (128, 20), (256, 40)]
    assert (narrower(two_heads, 1 / 4).head_size, narrower(two_heads, 1 / 4).num_attention_heads) == (32, 2)
    assert (narrower(two_heads, 1 / 2).head_size, narrower(two_heads, 1 / 2).num_attention_heads) == (128, 1)
    # One head is as narrow as it gets: what is left is to be shorter.
    assert [rung[:2] for rung in rungs(proxy=PROXY)] == [(32, 5), (32, 20), (32, 40)]
    assert [rung[:2] for rung in rungs(options=replace(OPTIONS, train_iters=1))] == [(32, 1), (64, 1), (128, 1)]
    assert [rung[:2] for rung in rungs(proxy=PROXY, options=replace(OPTIONS, train_iters=1))] == [(32, 1)]


def test_the_cost_of_a_rung_is_that_of_its_model_and_its_tokens() -> None:
    training = objective(proxy=WIDE, options=replace(OPTIONS, train_iters=40))
    ladder = ladder_for(training, DEFAULT_SPACE, 1e12, None, source="--space")
    assert [rung.fidelity.cost for rung in ladder.rungs] == [
        training_flops(narrower(WIDE, share)).total * steps * OPTIONS.global_batch_size * WIDE.seq_length
        for share, steps in ((1 / 4, 5), (1 / 4, 20), (1 / 2, 20), (1, 40))
    ]


def test_a_rungs_model_has_the_proxys_recipe_so_that_hyperparameters_mean_the_same_there() -> None:
    training = objective(GIVEN, proxy=WIDE, options=replace(OPTIONS, train_iters=40))
    ladder = ladder_for(training, DEFAULT_SPACE, 1e12, None, source="--space")
    lowest = at_rung(training, ladder.rungs[0])
    made = lowest.recipe({"lr": 0.01})
    assert made == training.recipe({"lr": 0.01})
    assert made.base == WIDE
    rates = {entry["name"]: entry["lr"] for entry in made.plan(lowest.model).to_json()["parameters"]}
    assert rates["decoder.layers.0.mlp.linear_fc1.weight"] == 0.01 * 4
    assert json.loads(json.dumps(ladder.to_json())) == ladder.to_json()
    assert pickle.loads(pickle.dumps(lowest)) == lowest


def test_a_trial_trains_the_model_of_its_rung_for_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    training = objective(proxy=WIDE, options=replace(OPTIONS, train_iters=40))
    ladder = ladder_for(training, DEFAULT_SPACE, 1e12, None, source="--space")
    seen = []

    def run_training(model: ModelFile, made: Recipe, data: Path, options: TrainingOptions, **_: Any) -> Any:
        seen.append((model.hidden_size, made.base.hidden_size, options.train_iters))
        return SimpleNamespace(
            validation_loss=1.0, status="complete", reason=None, train_loss=1.0, iterations=1, tokens=1
        )

    monkeypatch.setattr("mup_megatron.tuning.objective.run_training", run_training)
    for rung in ladder.rungs:
        at_rung(training, rung)({"lr": 0.01}, lambda step, loss: None)
    assert seen == [(32, 128, 5), (32, 128, 20), (64, 128, 20), (128, 128, 40)]


def test_a_study_keeps_its_ladder() -> None:
    """Whatever a later release would choose for the budget."""
    training = objective(proxy=WIDE, options=replace(OPTIONS, train_iters=40))
    made = ladder_for(training, DEFAULT_SPACE, 1e12, None, source="--space")
    older = replace(made, rungs=(replace(made.rungs[0], trials=7), *made.rungs[1:]))
    spec = StudySpec("s", "sqlite:///s.db", 5, "random", DEFAULT_SPACE, training.context(), ladder=older)
    found = StudyRecord(spec, (), older.trials)
    assert rungs(found=found)[0][2] == 7
    assert rungs(found=found, budget=2e12)[0][2] > 7
    assert rungs(found=found, data=Path("other"))[0][2] > 7


def test_a_rung_that_could_not_run_is_refused() -> None:
    training = objective(proxy=WIDE, options=replace(OPTIONS, train_iters=40))
    with pytest.raises(InputError, match=r"s\.yaml: hyperparameters\.lr: should be greater than 0"):
        ladder_for(training, space(lr=(-0.1, 0.1)), 1e12, None, source="s.yaml")
    rung = ladder_for(training, DEFAULT_SPACE, 1e12, None, source="--space").rungs[0]
    damaged = replace(rung, fidelity=replace(rung.fidelity, settings={"hidden_size": 32}))
    with pytest.raises(InputError, match=r"the rung of .* trials: train_iters: missing"):
        at_rung(training, damaged)
