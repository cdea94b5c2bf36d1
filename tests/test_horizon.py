"""A recipe's horizon: to disk and back, what it needs, that it moves a plan once, and that another run is noticed."""

import re
from pathlib import Path
from typing import Any

import pytest
from support.commands import BASE, TARGET

from mup_megatron import theory
from mup_megatron.architectures.registry import model_file
from mup_megatron.check.family.stress import stressed
from mup_megatron.checkpoint_recipe import differences, packed, unpacked
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe, load_recipe, recipe, save_recipe

PACKAGE = Path(__file__).parents[1] / "mup_megatron"
TUNED = {"lr": 0.004, "min_lr": 0.0004, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.96}
TUNING = {"train_iters": 200, "global_batch_size": 8, "seq_length": 64}
TOKENS = 16 * 200 * 8 * 64
LONGER = {"rule": "steps", "tokens": TOKENS, "batch": 32}
SAME = {"rule": "steps", "tokens": 200 * 8 * 64, "batch": 8}


def a_recipe(horizon: dict[str, Any] | None = LONGER, **changes: Any) -> Recipe:
    content = {"base": BASE, "hyperparameters": TUNED, "training": TUNING, **changes}
    return recipe(content | ({} if horizon is None else {"horizon": horizon}), source="a.recipe.yaml")


def refused(horizon: dict[str, Any] | None = LONGER, **changes: Any) -> str:
    with pytest.raises(InputError) as error:
        a_recipe(horizon, **changes)
    message = str(error.value)
    assert message.startswith("a.recipe.yaml: ")
    assert all(len(line) <= 300 for line in message.splitlines())
    return message


# ---- what it does --------------------------------------------------------------------------------------------------


def test_base_values_are_moved_before_any_rule_of_width() -> None:
    plan, before = (a_recipe(own).plan(model_file(TARGET, source="target")) for own in (LONGER, None))
    assert (plan.lr, plan.min_lr, plan.weight_decay, plan.adam_eps) == (0.002, 0.0002, 0.05, 2e-8)
    for entry, other in zip(plan.entries, before.entries, strict=True):
        assert entry.lr == pytest.approx(other.lr / 2)
        assert entry.weight_decay == pytest.approx(other.weight_decay / 2)
        assert entry.eps == pytest.approx(2 * (other.eps or 0))
        assert (entry.init_std, entry.multiplier) == (other.init_std, other.multiplier)


def test_betas_are_moved_and_what_was_tuned_stays_to_be_read() -> None:
    given = a_recipe()
    assert given.optimizer_values == pytest.approx({"adam_beta1": 0.975, "adam_beta2": 0.99, "adam_eps": 2e-8})
    assert given.plan(model_file(TARGET, source="target")).optimizer_values == given.optimizer_values
    assert given.hyperparameters.lr == 0.004
    assert given.moves["lr"] == (0.004, 0.002)


def test_sequences_of_another_length_make_batches_of_another_size() -> None:
    # Twice as long and a batch of half as many: as large; twice the tokens: twice the steps.
    given = a_recipe({"rule": "timescale", "tokens": 2 * 200 * 8 * 64, "batch": 4, "seq_length": 128})
    assert given.moved.weight_decay == pytest.approx(0.05)


def test_the_tunings_own_run_moves_no_bit() -> None:
    given, without = a_recipe(SAME), a_recipe(None)
    assert given.moved == without.hyperparameters
    target = model_file(TARGET, source="target")
    assert given.plan(target).entries == without.plan(target).entries


def test_a_settled_recipe_is_the_same_run_without_a_horizon() -> None:
    given, target = a_recipe(), model_file(TARGET, source="target")
    assert given.settled().horizon is None
    assert given.settled().plan(target).entries == given.plan(target).entries


def test_stress_is_what_the_run_has() -> None:
    with_horizon, without = (stressed(a_recipe(own), steps=8, eps=1e-4) for own in (LONGER, None))
    assert with_horizon.horizon is not None
    assert with_horizon.moved.lr == pytest.approx(without.moved.lr, rel=0.5)
    assert with_horizon.moved.adam_eps == pytest.approx(1e-4)
    assert with_horizon.moved.adam_beta1 == pytest.approx(0.975)


# ---- the file ------------------------------------------------------------------------------------------------------


def test_it_comes_back_from_disk_and_from_a_checkpoint(tmp_path: Path) -> None:
    for given in (a_recipe(), a_recipe({"rule": "tokens", "tokens": 2e9, "batch": 8, "exponent": 0.3})):
        save_recipe(given, tmp_path / "r.yaml")
        assert load_recipe(tmp_path / "r.yaml") == given
        assert unpacked(packed(given), source="a checkpoint") == given


def test_without_one_nothing_of_it_is_written_and_the_tuning_says_nothing() -> None:
    given = a_recipe(None)
    assert "horizon" not in given.to_yaml()
    assert given.fingerprint == a_recipe(None, training={}).fingerprint


def test_it_is_in_the_fingerprint_with_the_run_that_it_moves_from() -> None:
    others = [
        a_recipe(None),
        a_recipe(SAME),
        a_recipe({**LONGER, "rule": "timescale"}),
        a_recipe({**LONGER, "batch": 16}),
        a_recipe({**LONGER, "seq_length": 128}),
        a_recipe(training={**TUNING, "train_iters": 100}),
        a_recipe(),
    ]
    assert len({each.fingerprint for each in others}) == len(others)
    assert a_recipe().fingerprint == a_recipe(provenance={"study": "s"}).fingerprint


def test_a_rules_own_exponent_is_written_out() -> None:
    content = {"rule": "tokens", "tokens": 1e9, "batch": 8}
    assert a_recipe(content) == a_recipe({**content, "exponent": 0.32})
    assert "exponent: 0.32" in a_recipe(content).to_yaml()
    assert "\n  exponent:" not in a_recipe().to_yaml()


@pytest.mark.parametrize(
    ("horizon", "changes", "said"),
    [
        ({"rule": "steps", "batch": 8}, {}, "horizon.tokens: missing"),
        ({"rule": "steps", "tokens": 8}, {}, "horizon.batch: missing"),
        ({"tokens": 8, "batch": 8}, {}, "horizon.rule: missing"),
        ({**LONGER, "rule": "step"}, {}, "should be one of 'none', 'steps', 'batch-sde', 'timescale', 'tokens'"),
        ({**LONGER, "tokens": 1.5}, {}, "horizon.tokens"),
        ({**LONGER, "batch": 0}, {}, "horizon.batch"),
        ({**LONGER, "exponent": 0.3}, {}, "exponent: the rule steps has none"),
        (LONGER, {"training": {}}, "training.train_iters, training.global_batch_size, training.seq_length: missing"),
        (LONGER, {"training": {**TUNING, "seq_length": None}}, "horizon: training.seq_length: missing"),
        (LONGER, {"parametrization": {"optimizer": "sgd"}}, "horizon: the rule steps is not known for SGD"),
        ({**LONGER, "rule": "batch-sde"}, {}, "for the same number of tokens"),
        ({**LONGER, "rule": "tokens"}, {}, "for the same batch"),
        ({**SAME, "batch": 80}, {}, "adam_beta1 0.9 would become 0"),
        (
            {"rule": "tokens", "tokens": 1e9, "batch": 8},
            {"schedule": {"lr_decay_style": "WSD"}},
            "the rule tokens is a fit to schedules that decay over the whole run",
        ),
        (
            {"rule": "tokens", "tokens": 1e9, "batch": 8},
            {"schedule": {"lr_decay_fraction": 2.0}},
            "the rule tokens is a fit to schedules that decay over the whole run",
        ),
        (
            {"rule": "tokens", "tokens": 1e9, "batch": 8},
            {"hyperparameters": {**TUNED, "min_lr": 0.003}},
            "and the recipe's does not. Give it lr_decay_style linear or cosine, lr_decay_fraction 1 and a min_lr of",
        ),
    ],
)
def test_what_a_rule_needs_is_asked_for_and_what_it_does_not_know_refused(
    horizon: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    assert said in refused(horizon, **changes)


def test_schedules_in_fractions_of_the_run_go_with_the_rules_that_are_derived() -> None:
    for rule in ("steps", "timescale"):
        assert a_recipe({**LONGER, "rule": rule}, schedule={"lr_decay_style": "WSD"}).moves


def test_a_rule_that_moves_nothing_needs_no_tuning() -> None:
    given = a_recipe({**LONGER, "rule": "none"}, training={}, parametrization={"optimizer": "sgd"})
    assert given.moved == given.hyperparameters
    assert given.told_horizon == "horizon none: nothing is moved"


# ---- twice, in part, elsewhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lr", 0.002, "hyperparameters.lr 0.002 is what steps makes of the tuned 0.004, and would be moved twice"),
        ("weight_decay", 0.05, "hyperparameters.weight_decay 0.05 is what steps makes of the tuned 0.1"),
        ("adam_beta1", 0.975, "hyperparameters.adam_beta1 0.975 is what steps makes of the tuned 0.9"),
    ],
)
def test_values_that_were_moved_already_are_noticed(key: str, value: float, said: str) -> None:
    noted = {"tuned": {each: TUNED[each] for each in ("lr", "weight_decay", "adam_beta1")}}
    assert a_recipe(provenance=noted).moves
    assert said in refused(hyperparameters={**TUNED, key: value}, provenance=noted)
    # A value of one's own is another tuning; of a beta near 1 it is as far from moved as the move is long.
    near = {"tuned": {"adam_beta2": 0.999}}
    assert a_recipe(hyperparameters={**TUNED, "adam_beta2": 0.999}, provenance=near).moves
    assert a_recipe(hyperparameters={**TUNED, "lr": 0.003}, provenance=noted).moves


def test_what_a_recipe_says_of_its_tuning_is_held_against_what_was_noted() -> None:
    noted = {"tuned": {"lr": 0.004, "weight_decay": 0.1}, "tuned_in": TUNING}
    # Another rule moves the same values, by itself.
    assert a_recipe({**LONGER, "rule": "timescale"}, provenance=noted).moved.weight_decay == pytest.approx(0.1 / 4)
    by_both = {**TUNED, "weight_decay": 0.05}
    said = refused({**LONGER, "rule": "timescale"}, hyperparameters=by_both, provenance=noted)
    assert "weight_decay 0.05 is what steps makes of the tuned 0.1, and would be moved by timescale besides" in said
    # What the rule leaves alone is moved once.
    assert a_recipe({**LONGER, "rule": "timescale"}, hyperparameters={**TUNED, "lr": 0.002}, provenance=noted).moves
    said = refused(training={**TUNING, "train_iters": 800}, provenance=noted)
    assert "training.train_iters is 800, and these values were tuned at 200, from which they are moved" in said
    another = {"training": {**TUNING, "train_iters": 800}, "hyperparameters": {**TUNED, "lr": 0.003}}
    assert a_recipe(**another, provenance=noted).moved.lr == 0.003
    assert a_recipe({**LONGER, "rule": "none"}, training={}, provenance=noted).moved.lr == 0.004


def test_another_run_is_told_with_both_numbers() -> None:
    tokens, given = TOKENS, a_recipe()
    assert given.run_problems(batch=32, tokens=tokens, seq_length=64) == ()
    assert given.run_problems(tokens=tokens + 32 * 64 - 1) == ()
    assert given.run_problems(tokens=tokens + 32 * 64 - 1, seq_length=64) == ()  # a last iteration that is not full
    [batch] = given.run_problems(batch=8, tokens=tokens, seq_length=64)
    assert "moved to batches of 32 sequences, and this run's have 8" in batch
    [length] = given.run_problems(batch=32, tokens=tokens, seq_length=128)
    assert "training.seq_length: the recipe's values are moved to sequences of 64, and this run's have 128" in length
    [much] = given.run_problems(batch=32, tokens=tokens // 2, seq_length=64)
    assert f"moved to {tokens} tokens, and this run has {tokens // 2}" in much
    assert a_recipe(None).run_problems(batch=1, tokens=1, seq_length=1) == ()
    assert a_recipe({**LONGER, "rule": "none"}).run_problems(batch=8) != ()


def test_a_checkpoint_of_another_rule_is_told_by_it() -> None:
    told = list(differences(a_recipe(), a_recipe({**LONGER, "rule": "timescale"})))
    assert told == [("horizon.rule", "steps", "timescale")]
    other = list(differences(a_recipe(), a_recipe(training={**TUNING, "train_iters": 100})))
    assert other == [("training.train_iters", 200, 100)]
    assert not list(differences(a_recipe(None), a_recipe(None, training={})))


AS_TUNED = {
    "check/module_family.py",  # basins are relative to what was tuned
    "check/run_megatron.py",
    "check/transfer.py",
    "megatron/pretrain/flags.py",  # tells what was moved
    "quickstart/experiment.py",  # of which the tuning itself is a part
    "quickstart/report.py",
}


def test_whoever_carries_out_a_recipe_reads_the_moved_values() -> None:
    reads = re.compile(r"recipe\.hyperparameters\b")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if reads.search(path.read_text(encoding="utf-8"))
    }
    assert found == AS_TUNED


def test_rules_of_horizon_are_adams_and_no_other_optimizers() -> None:
    known = {name for name, optimizer in theory.optimizers().items() if optimizer.horizons}
    assert known == {"adam"}


def test_what_no_run_has_is_refused() -> None:
    assert "exponent" in refused({"rule": "tokens", "tokens": TOKENS, "batch": 8, "exponent": 400.0})
    assert "tokens" in refused({**LONGER, "tokens": 10**300})
