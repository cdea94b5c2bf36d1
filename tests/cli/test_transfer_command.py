"""`transfer`: from a study on disk to a recipe on disk."""

from collections.abc import Mapping
from pathlib import Path

import optuna
from support.commands import BASE, Command, contents

from mup_megatron.architectures.registry import model_file
from mup_megatron.recipe import load_recipe, recipe
from mup_megatron.search import Objective, ReportFn, StudySpec, TrialOutcome, default_storage, run_sweep
from mup_megatron.training.options import TrainingOptions
from mup_megatron.tuning import DEFAULT_SPACE, ProxyTraining, fixed_content
from mup_megatron.yaml_io import dump_yaml, parse_yaml

FIXED = recipe({"base": BASE, "hyperparameters": {"lr": 1.0, "weight_decay": 0.3}}, source="fixed")


def prefer_high_lr(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    """Stands for a training: which trial is best is all that `transfer` asks of it."""
    return TrialOutcome(-parameters["lr"], metrics={"tokens": 96})


def diverge(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    return TrialOutcome(None)


def made_study(name: str = "s", objective: Objective = prefer_high_lr) -> StudySpec:
    training = ProxyTraining(
        proxy=model_file(BASE, source="base"),
        fixed=fixed_content(FIXED),
        data=Path("d"),
        data_sha256=None,
        options=TrainingOptions(train_iters=3, global_batch_size=2),
    )
    spec = StudySpec(name, default_storage(name), 1, "random", DEFAULT_SPACE, training.context())
    run_sweep(spec, objective, 3)
    return spec


def test_the_best_trial_of_a_study_becomes_a_file(run: Command, here: Path) -> None:
    spec = made_study()
    best = optuna.load_study(study_name="s", storage="sqlite:///results/s.db").best_trial
    assert run("transfer", "--study", "s", "-o", "new/s.recipe.yaml") == (0, "new/s.recipe.yaml\n", "")
    found = load_recipe(here / "new" / "s.recipe.yaml")
    values = found.hyperparameters.model_dump()
    assert {name: values[name] for name in best.params} == best.params
    assert best.params["lr"] == max(spec.space.sample(1, number)["lr"] for number in range(3))
    assert found.hyperparameters.weight_decay == 0.3
    assert found.base == model_file(BASE, source="base")
    assert (found.provenance["study"], found.provenance["trial"]) == ("s", best.number)


def test_without_an_output_it_is_printed(run: Command, here: Path) -> None:
    made_study()
    before = contents(here)
    code, out, err = run("transfer", "--study", "s", "--storage", "sqlite:///results/s.db")
    assert (code, err) == (0, "")
    assert recipe(parse_yaml(out, source="output"), source="output").provenance["study"] == "s"
    assert contents(here) == before


def test_what_exists_is_replaced_only_if_asked_for(run: Command, here: Path) -> None:
    made_study()
    before = contents(here)
    code, out, err = run("transfer", "--study", "s", "-o", "r.yaml")
    assert (code, out) == (2, "")
    assert "r.yaml: exists already. Give --force" in err
    assert contents(here) == before
    assert run("transfer", "--study", "s", "-o", "r.yaml", "--force").code == 0
    assert load_recipe(here / "r.yaml").provenance["study"] == "s"


def test_a_study_without_an_answer_is_bad_input_and_writes_nothing(run: Command, here: Path) -> None:
    made_study("diverged", diverge)
    optuna.create_study(study_name="by hand", storage="sqlite:///results/diverged.db")
    (here / "results" / "other.db").write_bytes(b"not a database, but a file of some length" * 100)
    before = contents(here)
    storage = ("--storage", "sqlite:///results/diverged.db")
    for words, said in (
        (("diverged",), "study 'diverged': no complete trial yet. Run the sweep on, or widen its space."),
        (("nothing",), "results/nothing.db: no such file. Check --study and --storage."),
        (("else", *storage), "no study 'else' in it, only 'by hand', 'diverged'. Check --study."),
        (("by hand", *storage), "study 'by hand' was not made by a sweep. Choose another with --study."),
        (("other",), "results/other.db: not a sound SQLite file"),
        (("../other",), "--study '../other': not a file name."),
        (("s", "--storage", "results"), "--storage 'results': not a URL."),
    ):
        code, out, err = run("transfer", "-o", "new.recipe.yaml", "--study", *words)
        assert (code, out) == (2, "")
        assert said in err
        assert "Traceback" not in err
    assert contents(here) == before


def test_a_rule_moves_the_best_trial_to_the_targets_run(run: Command, here: Path) -> None:
    made_study()
    assert run("transfer", "--study", "s", "-o", "tuned.yaml").code == 0
    tokens = 3 * 2 * BASE["seq_length"]
    words = ("--rule", "steps", "--target-tokens", str(16 * tokens), "--target-batch", "8")
    assert run("transfer", "--study", "s", "-o", "moved.yaml", *words) == (0, "moved.yaml\n", "")
    tuned, moved = load_recipe(here / "tuned.yaml"), load_recipe(here / "moved.yaml")
    assert moved.horizon is not None
    assert moved.horizon.model_dump(exclude_none=True) == {"rule": "steps", "tokens": 16 * tokens, "batch": 8}
    assert moved.hyperparameters == tuned.hyperparameters
    assert moved.moved.lr == tuned.hyperparameters.lr / 2
    assert moved.provenance["tuned"] == {key: before for key, (before, _) in moved.moves.items()}
    assert moved.fingerprint != tuned.fingerprint
    # What was moved already is not moved again.
    again = moved.model_copy(update={"hyperparameters": moved.moved}).to_yaml()
    (here / "again.yaml").write_text(again)
    (here / "target.yaml").write_text(dump_yaml({**BASE, "hidden_size": 128, "num_attention_heads": 4}))
    code, out, err = run("explain", "target.yaml", "--recipe", "again.yaml")
    assert (code, out) == (2, "")
    assert "and would be moved twice" in err
    code, out, err = run("sweep", "target.yaml", "--data", "d", "--study", "t", "--trials", 1, "--recipe", "moved.yaml")
    assert (code, out) == (2, "")
    assert "a search tunes at its own" in err


def test_what_is_left_out_is_as_in_the_tuning(run: Command, here: Path) -> None:
    made_study()
    words = ("--rule", "tokens", "--target-tokens", "1e6", "--exponent", "0.3")
    assert run("transfer", "--study", "s", "-o", "moved.yaml", *words).code == 0
    horizon = load_recipe(here / "moved.yaml").horizon
    assert horizon is not None
    assert (horizon.tokens, horizon.batch, horizon.exponent) == (10**6, 2, 0.3)
    words = ("--force", "--rule", "batch-sde", "--target-batch", "4")
    assert run("transfer", "--study", "s", "-o", "moved.yaml", *words).code == 0


def test_half_of_what_a_rule_needs_is_bad_input(run: Command, here: Path) -> None:
    made_study()
    for words, said in (
        (("--target-batch", "8"), "--target-batch without --rule"),
        (("--rule", "steps"), "--rule steps: to which run? Give --target-tokens"),
        (("--rule", "steps", "--target-tokens", "1.5"), "1.5 is not a whole number"),
        (("--rule", "batch-sde", "--target-tokens", "1e9"), "for the same number of tokens"),
        (("--rule", "step", "--target-batch", "8"), "'step' is not one of"),
    ):
        code, out, err = run("transfer", "--study", "s", *words)
        assert (code, out) == (2, "")
        assert said in err
