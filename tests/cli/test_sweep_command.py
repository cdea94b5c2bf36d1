"""`sweep`, and the way it is a part of: text, search, recipe, plan, a wide model that trains."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from support.commands import TARGET, Command, contents, write

from mup_megatron.architectures.registry import load_model_file
from mup_megatron.recipe import load_recipe
from mup_megatron.search import StudySpec, TrialOutcome, default_storage, run_sweep
from mup_megatron.training.data.reading import read_meta
from mup_megatron.tuning import DEFAULT_SPACE
from mup_megatron.validation import plain

ROOT = Path(__file__).parents[2]
SWEEP = ("sweep", "base.yaml", "--data", "text", "--study", "small", "--train-iters", "3", "--global-batch-size", "2",
         "--eval-iters", "1")  # fmt: skip


def fresh(*words: str) -> subprocess.CompletedProcess[str]:
    """A command as a user starts it, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mup_megatron", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_from_text_to_a_wide_model(run: Command, here: Path, data: Path) -> None:
    # A search: Optuna's study, a table and the best trial on disk; the answer alone on standard output.
    done = fresh(*SWEEP, "--trials", "2")
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name="small", storage="sqlite:///results/small.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert [trial.params for trial in study.trials] == [DEFAULT_SPACE.sample(1234, number) for number in range(2)]
    best = study.best_trial
    assert done.stdout.splitlines() == [
        f"best: trial {best.number}, loss {best.value:.6g}",
        *(f"  {name}: {value:.6g}" for name, value in best.params.items()),
    ]
    assert "[2/2]" in done.stderr
    with (here / "results" / "small" / "trials.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["loss"]) for row in rows] == [trial.value for trial in study.trials]
    on_disk = json.loads((here / "results" / "small" / "best.json").read_text())
    assert on_disk["trial"]["parameters"] == best.params
    assert on_disk["trial"]["metrics"]["iterations"] == 3

    # The best trial as a recipe, and what follows from it for a model four times as wide.
    assert run("transfer", "--study", "small", "-o", "small.recipe.yaml").code == 0
    recipe = load_recipe(here / "small.recipe.yaml")
    assert recipe.hyperparameters.lr == best.params["lr"]
    assert recipe.provenance["data"] == {"name": "text", "sha256": read_meta(data).bin_sha256}
    plan = json.loads(run("explain", "target.yaml", "--recipe", "small.recipe.yaml", "--format", "json").out)
    rates = {row["name"]: row["lr"] for row in plan["parameters"]}
    assert rates["embedding.word_embeddings.weight"] == best.params["lr"]
    assert rates["decoder.layers.0.mlp.linear_fc1.weight"] == best.params["lr"] / 4

    # The wide model trains with it.
    done = fresh("train", "target.yaml", "--recipe", "small.recipe.yaml", "--data", "text", "--train-iters", "2",
                 "--global-batch-size", "2",
                 "--output", "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("out: 2 iterations, training loss ")
    with (here / "out" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["iteration"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == ["iteration", "loss", "lr", "grad_norm"]
    assert json.loads((here / "out" / "result.json").read_text())["status"] == "complete"
    assert load_recipe(here / "out" / "recipe.yaml").fingerprint == recipe.fingerprint == plan["fingerprint"]

    # The same search again has nothing to do and gives the same answer.
    before = contents(here)
    again = run(*SWEEP, "--trials", "2")
    assert again.code == 0
    assert again.out.splitlines()[0] == f"best: trial {best.number}, loss {best.value:.6g}"
    after = optuna.load_study(study_name="small", storage="sqlite:///results/small.db").trials
    assert after == study.trials

    # Another space, or another length of the trials, is another study.
    write(here / "space.yaml", {"lr": {"low": 0.001, "high": 0.01}})
    for words, said in (
        (("--space", "space.yaml"), "space.lr.low was 0.0001 and is 0.001"),
        (("--train-iters", "4"), "context.training.train_iters was 3 and is 4"),
    ):
        code, out, err = run(*SWEEP, "--trials", "3", *words)
        assert (code, out) == (2, "")
        assert "study 'small' was made with other settings" in err
        assert said in err
        assert "Nothing was changed." in err
    (here / "space.yaml").unlink()
    assert contents(here) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trials", "0"], "--trials 0: must be at least 1"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--train-iters", "0"], "--train-iters 0: must be at least 1"),
        (["--global-batch-size", "-2"], "--global-batch-size -2: must be at least 1"),
        (["--micro-batch-size", "3"], "--global-batch-size 2 is not divisible by --micro-batch-size 3"),
        # Without a validation loss every trial would count as diverged.
        (["--eval-iters", "0"], "0 is not in the range x>=1"),
        (["--sampler", "grid"], "'grid' is not one of 'random', 'tpe'"),
        (["--study", "a/b"], "--study 'a/b': not a file name"),
        (["--storage", "nowhere"], "--storage 'nowhere': not a URL"),
        (["--data", "nowhere"], "nowhere.bin: no such file"),
        (["--data", "text.bin"], "Leave the suffix away: text."),
        (["--space", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--space", "no_lr.yaml"], "no_lr.yaml: no lr in it. Search it, or give its value in a --recipe."),
        (["--space", "negative.yaml"], "negative.yaml: hyperparameters.lr: should be greater than 0, found -0.1"),
        (["--space", "unknown.yaml"], "unknown.yaml: dropout: not a hyperparameter to search. Choose from lr,"),
        (["--recipe", "unmatched.recipe.yaml"], "per_parameter[0] 'nothing.*' matches no parameter"),
    ],
)
def test_what_no_trial_could_run_is_refused_before_there_is_a_study(
    run: Command, here: Path, data: Path, words: list[str], said: str
) -> None:
    write(here / "no_lr.yaml", {"weight_decay": {"low": 0.0, "high": 0.1}})
    write(here / "negative.yaml", {"lr": {"low": -0.1, "high": 0.1}})
    write(here / "unknown.yaml", {"dropout": {"low": 0.0, "high": 0.1}})
    text = (here / "r.yaml").read_text() + "per_parameter: [{match: nothing.*}]\n"
    (here / "unmatched.recipe.yaml").write_text(text)
    before = contents(here)
    code, out, err = run(*SWEEP, "--trials", "1", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert contents(here) == before


def test_a_vocabulary_smaller_than_the_datas_is_refused_before_there_is_a_study(
    run: Command, here: Path, data: Path
) -> None:
    write(here / "base.yaml", {**TARGET, "vocab_size": 200})
    before = contents(here)
    code, out, err = run(*SWEEP, "--trials", "1")
    assert (code, out) == (2, "")
    assert "base.yaml: vocab_size is 200, but the data text have token ids up to 256. Set vocab_size: 257" in err
    assert contents(here) == before


# A budget


BUDGET = ("sweep", "target.yaml", "--data", "text", "--study", "rungs", "--train-iters", "4", "--global-batch-size",
          "2", "--eval-iters", "1")  # fmt: skip


def test_a_budget_is_spent_on_narrower_and_shorter_trials_first(run: Command, here: Path, data: Path) -> None:
    code, out, err = run(*BUDGET, "--budget", "1e6")
    assert (code, out) == (2, "")
    needed = re.search(r"--budget 1e\+06: too small, the least ladder of this proxy costs (\S+) and", err)
    assert needed is not None
    assert not (here / "results").exists()
    done = run(*BUDGET, "--budget", needed[1])
    assert done.code == 0, done.err
    shown = [line.split() for line in done.err.splitlines()[:5]]
    assert shown[0] == ["rung", "width", "steps", "trials", "FLOPs", "share"]
    candidates = int(shown[1][3])  # the cost in the message is rounded up, so it can be enough for some more
    counts = [candidates, 5, 5, 3]
    assert 10 <= candidates <= 13
    assert [row[:4] for row in shown[1:]] == [
        [str(cell) for cell in row] for row in ((0, 32, 1, candidates), (1, 32, 2, 5), (2, 64, 2, 5), (3, 128, 4, 3))
    ]
    assert sum(float(row[4]) for row in shown[1:]) == pytest.approx(float(needed[1]), rel=0.1)
    assert re.search(rf"FLOPs, as much as \S+ whole trials\. {candidates} of those would be ", done.err)
    assert re.search(r"\S+ of \S+ FLOPs spent", done.err)
    study = optuna.load_study(study_name="rungs", storage="sqlite:///results/rungs.db")
    rungs = study.user_attrs["sweep"]["ladder"]["rungs"]
    assert sum(rung["cost"] * rung["trials"] for rung in rungs) <= float(needed[1]), "what is shown is rounded"
    places = [divmod(trial.user_attrs["slot"], candidates) for trial in study.trials]
    assert [[rung for rung, _ in places].count(number) for number in range(4)] == counts
    steps = [trial.user_attrs["metrics"]["iterations"] for trial in study.trials if trial.value is not None]
    assert [steps.count(number) for number in (1, 2, 4)] == [candidates, 10, 3]
    assert all(
        trial.params == DEFAULT_SPACE.sample(1234, place[1]) for trial, place in zip(study.trials, places, strict=True)
    )
    best = min(
        (trial for trial, place in zip(study.trials, places, strict=True) if place[0] == 3), key=lambda t: t.value
    )
    assert done.out.startswith(f"best: trial {best.number}, loss {best.value:.6g}\n")

    # The same command again has nothing to do; the recipe is of the proxy and says what was spent.
    assert run(*BUDGET, "--budget", needed[1]).out == done.out
    assert optuna.load_study(study_name="rungs", storage="sqlite:///results/rungs.db").trials == study.trials
    assert run("transfer", "--study", "rungs", "-o", "rungs.recipe.yaml", "--target", "target.yaml").code == 0
    recipe = load_recipe(here / "rungs.recipe.yaml")
    assert recipe.base == load_model_file(here / "target.yaml")
    assert recipe.hyperparameters.lr == best.params["lr"]
    assert [(rung["width"], rung["steps"], rung["trials"]) for rung in recipe.provenance["cost"]["rungs"]] == [
        (32, 1, candidates), (32, 2, 5), (64, 2, 5), (128, 4, 3)
    ]  # fmt: skip
    assert recipe.provenance["cost"]["flops"] <= float(needed[1])

    # Another budget is another search.
    for words, said in (
        (("--budget", "1e12"), "ladder.budget was"),
        (("--trials", "3"), "ladder is missing now"),
        (("--budget", needed[1], "--train-iters", "3"), "context.training.train_iters was 4 and is 3"),
    ):
        code, out, err = run(*BUDGET, *words)
        assert (code, out) == (2, "")
        assert said in err


@pytest.mark.parametrize(
    "words",
    [["--trials", "2"], ["--best", "2", "--of", "small"], ["--of", "small"], ["--budget", "0"], ["--budget", "inf"]],
)
def test_a_budget_stands_alone_and_is_a_number(run: Command, here: Path, data: Path, words: list[str]) -> None:
    code, out, err = run(*BUDGET, "--budget", "1e12", *words)
    assert (code, out) == (2, "")
    assert "With --budget FLOPS the search decides it itself." in err or "'--budget'" in err
    assert not (here / "results").exists()


# The best trials of another study


@pytest.mark.slow  # as in search/test_selection.py, by the command
def test_the_best_of_one_study_are_run_longer_by_another(run: Command, here: Path, data: Path) -> None:
    (here / "given.recipe.yaml").write_text((here / "r.yaml").read_text() + "schedule: {lr_decay_style: cosine}\n")
    done = fresh(*SWEEP, "--trials", "3", "--recipe", "given.recipe.yaml")
    assert done.returncode == 0, done.stderr
    first = optuna.load_study(study_name="small", storage="sqlite:///results/small.db").trials
    order = sorted(first, key=lambda trial: trial.value or 0.0)
    longer = ("sweep", "base.yaml", "--data", "text", "--study", "longer", "--best", "2", "--of", "small",
              "--train-iters", "5", "--global-batch-size", "2", "--eval-iters", "1")  # fmt: skip
    done = fresh(*longer)
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name="longer", storage="sqlite:///results/longer.db")
    assert [trial.params for trial in study.trials] == [trial.params for trial in order[:2]]
    assert [trial.user_attrs["metrics"]["iterations"] for trial in study.trials] == [5, 5]

    # The recipe has what the first study left alone, and says where its trial comes from.
    assert run("transfer", "--study", "longer", "-o", "longer.recipe.yaml").code == 0
    recipe = load_recipe(here / "longer.recipe.yaml")
    assert recipe.schedule.lr_decay_style == "cosine"
    chosen = order[study.best_trial.number]
    assert recipe.hyperparameters.lr == chosen.params["lr"]
    assert recipe.provenance["selected_from"] == {
        "study": "small", "best": 2, "trial": chosen.number, "loss": chosen.value
    }  # fmt: skip

    # The first study goes on; the second keeps what it was made of, and needs the first no more.
    before = study.trials
    (here / "results" / "small.db").unlink()
    assert run(*longer).code == 0
    assert optuna.load_study(study_name="longer", storage="sqlite:///results/longer.db").trials == before
    for words, said in (
        (("--best", "1"), "--best 1: study 'longer' was made of the best 2 of 'small'"),
        (("--of", "longer"), "--of longer: the same as --study"),
        (("--of", "other"), "results/other.db: no such file"),
        (("--train-iters", "6"), "context.training.train_iters was 5 and is 6"),
        (("--space", "space.yaml"), "--space: with --of, all hyperparameters are those of study 'small'. Drop it."),
        (("--recipe", "r.yaml"), "--recipe: with --of"),
        (("--sampler", "tpe"), "--sampler: with --of"),
        (("--trials", "2"), "Either --trials N for a search, or --best N --of NAME"),
    ):
        code, out, err = run(*longer, *words)
        assert (code, out) == (2, ""), words
        assert said in err


def test_another_shape_than_that_of_the_first_study_is_refused(run: Command, here: Path, data: Path) -> None:
    spec = StudySpec("small", default_storage("small"), 1, "random", DEFAULT_SPACE, {
        "proxy": plain(load_model_file(here / "target.yaml")), "fixed": {}
    })  # fmt: skip
    run_sweep(spec, lambda parameters, report: TrialOutcome(parameters["lr"]), 1)
    code, out, err = run("sweep", "base.yaml", "--data", "text", "--study", "longer", "--best", "1", "--of", "small")
    assert (code, out) == (2, "")
    assert "--of small: that study trained another model (hidden_size, num_attention_heads differ)" in err
    assert not (here / "results" / "longer.db").exists()


@pytest.mark.parametrize(
    "words", [[], ["--best", "2"], ["--of", "small"], ["--trials", "2", "--best", "2", "--of", "small"]]
)
def test_a_sweep_is_told_how_many_trials_in_one_way(run: Command, here: Path, data: Path, words: list[str]) -> None:
    code, out, err = run(*SWEEP, *words)
    assert (code, out) == (2, "")
    assert "How many trials? Either --trials N for a search, or --best N --of NAME for those of another." in err
