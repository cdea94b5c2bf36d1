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
from mup_megatron.yaml_io import parse_yaml

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
