"""The GPT-3 6.7B experiment: what its dry run says, and the whole of it in small, killed on the way."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from support.processes import HANGS_AFTER_S

from mup_megatron.recipe import load_recipe

ROOT = Path(__file__).parents[2]
HERE = ROOT / "launch" / "gpt3_6.7b"
RUN = HERE / "run.sh"
PAPER = ("--search", "paper")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """As after `make setup`: the commands of this interpreter are on the PATH. Nothing else that they read is set."""
    commands = tmp_path / "bin"
    commands.mkdir()
    ours = commands / "mup-megatron"
    ours.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mup_megatron "$@"\n')
    ours.chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    wanted = {"PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH"}
    kept = {key: value for key, value in os.environ.items() if key in wanted}
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}


def run(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(RUN), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=HANGS_AFTER_S)


def commands_of(out: str) -> dict[str, list[list[str]]]:
    """Stage → the commands that a dry run prints for it."""
    found: dict[str, list[list[str]]] = {}
    stage = ""
    for line in out[out.index("\nThe commands") :].splitlines()[2:]:
        if line.startswith("  "):
            if words := shlex.split(line, comments=True):
                found[stage].append(words)
        elif line:
            stage = line
            found[stage] = []
    return found


def words_after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


# The dry run at full scale


def test_the_dry_run_costs_what_the_paper_says(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, "--dry-run", "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "work").exists()
    share = 40e6 * (4e9 * 350 + 16e9 * 117) / (6.7e9 * 300e9)
    assert f"{share:.1%}" == "6.5%"
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in done.stdout.splitlines()}
    assert rows["parameters, as the paper rounds them"][-1] == f"{share:.2%}"
    # Per layer and token 6·12h² for weights and 12·s·h for scores; the readout 6·h·V.
    proxy, target = (32 * (72 * h**2 + 12 * 2048 * h) + 6 * h * 50304 for h in (256, 4096))
    assert rows["FLOPs per token"][:2] == [f"{proxy:,}", f"{target:,}"]
    spent = proxy * (4e9 * 350 + 16e9 * 117)
    assert rows["search, in all"][-2:] == [f"{spent:.3g}", f"{spent / (target * 300e9):.2%}"]
    assert rows["stage 1"][0:2] == ["350", "gpt3_6.7b_proxy_40m"]
    assert rows["stage 2"][0] == "117"


def test_the_dry_run_shows_the_search_over_fidelities_beside_it(environment: dict[str, str], tmp_path: Path) -> None:
    lines = run(environment, "--dry-run", "--work", tmp_path / "work").stdout.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("rung "))
    *rungs, total = (re.split(r"  +", line) for line in lines[begin + 1 : lines.index("", begin)])
    # Each width costs per token what that of the proxy would.
    for _, trials, width, iterations, batch, *_, flops, _ in rungs:
        h, tokens = int(width), int(iterations.replace(",", "")) * int(batch) * 2048
        spent = int(trials) * tokens * (32 * (72 * h**2 + 12 * 2048 * h) + 6 * h * 50304)
        assert float(flops) == pytest.approx(spent, rel=0.01)
    assert rungs[-1][2:4] == ["256", "7,629"]
    assert sum(int(row[1]) for row in rungs) == int(total[1])
    assert int(rungs[0][1]) >= 300, "about as many candidates as the paper's trials"
    assert float(total[-1].rstrip("%")) <= 0.3


def test_the_readme_shows_what_the_dry_run_prints(environment: dict[str, str], tmp_path: Path) -> None:
    out = run(environment, "--dry-run", "--work", tmp_path / "work").stdout
    costs = out[: out.index("\nThe commands")].strip()
    assert f"```\n{costs}\n```" in (HERE / "README.md").read_text(encoding="utf-8")


def test_the_default_is_one_search_with_a_budget(environment: dict[str, str], tmp_path: Path) -> None:
    out = run({**environment, "DATA": "/data/text"}, "--dry-run", "--work", tmp_path / "work").stdout
    commands = commands_of(out)
    assert list(commands) == ["prepare", "search", "transfer", "target", "evaluate", "report"]
    (command,) = commands["search"]
    assert words_after(command, "--budget") == "3.6e19"
    assert int(words_after(command, "--train-iters")) == 4e9 // (256 * 2048)
    assert commands["transfer"][0] == command, "what a lost job has left is run before"
    study = words_after(command, "--study")
    assert words_after(commands["transfer"][1], "--study") == study
    assert [words_after(commands["report"][0], "--study"), commands["report"][1][3]] == [study, study]


def test_the_stages_are_commands_of_the_papers_sizes(environment: dict[str, str], tmp_path: Path) -> None:
    out = run({**environment, "DATA": "/data/text"}, *PAPER, "--dry-run", "--work", tmp_path / "work").stdout
    commands = commands_of(out)
    assert list(commands) == ["prepare", "stage1", "stage2", "transfer", "target", "evaluate", "report"]
    for stage, tokens in (("stage1", 4e9), ("stage2", 16e9)):
        command = commands[stage][0]
        batch = int(words_after(command, "--global-batch-size")) * 2048
        assert 0 <= tokens - int(words_after(command, "--train-iters")) * batch < batch
        assert words_after(command, "--data") == "/data/text"
    assert words_after(commands["stage1"][0], "--trials") == "350"
    assert words_after(commands["stage2"][0], "--best") == "117"
    assert words_after(commands["stage2"][0], "--of") == words_after(commands["stage1"][0], "--study")
    assert commands["transfer"][0] == commands["stage2"][0], "what a lost job has left is run before"
    assert "TRAIN_TOKENS=300000000000" in commands["target"][0]
    assert commands["target"][0][-2:] == [str(ROOT / "launch" / "gpt3.sh"), "6.7b"]


def test_slurm_gets_a_chain_of_jobs_that_call_the_script_itself(environment: dict[str, str], tmp_path: Path) -> None:
    settings = {"DATA": "/data/text", "STORAGE": "postgresql://me@db/optuna", "STAGE1_JOBS": "32"}
    out = run({**environment, **settings}, *PAPER, "--slurm", "--dry-run", "--work", tmp_path / "a folder").stdout
    commands = commands_of(out)
    assert commands["prepare"][-1] == ["optuna", "--quiet", "study-names", "--storage", settings["STORAGE"]]
    waits_for = {}
    for stage in ("stage1", "stage2", "transfer", "target", "evaluate"):
        (command,) = commands[stage]
        words = command[command.index("sbatch") :]
        waits_for[stage] = next((word for word in words if word.startswith("--dependency")), None)
        if stage != "target":
            (wrapped,) = (word.removeprefix("--wrap=") for word in words if word.startswith("--wrap"))
            assert shlex.split(wrapped)[:9] == [
                str(RUN), "--scale", "full", *PAPER, "--work", str(tmp_path / "a folder"), "--stage", stage
            ]  # fmt: skip
    assert waits_for == {
        "stage1": None,
        "stage2": "--dependency=afterany:JOB_OF_stage1",
        "transfer": "--dependency=afterany:JOB_OF_stage2",
        "target": "--dependency=singleton,afterok:JOB_OF_transfer",
        "evaluate": "--dependency=afterok:JOB_OF_target",
    }
    assert "--array=1-32" in commands["stage1"][0]
    assert commands["target"][0][-2:] == [str(ROOT / "launch" / "slurm.sh"), "6.7b"]
    assert "--nodes=16" in commands["target"][0]


def test_slurm_gets_the_search_over_fidelities_as_one_array(environment: dict[str, str], tmp_path: Path) -> None:
    settings = {"DATA": "/data/text", "STORAGE": "postgresql://me@db/optuna", "SEARCH_JOBS": "8", "SEARCH_TIME": "5:00"}
    commands = commands_of(run({**environment, **settings}, "--slurm", "--dry-run", "--work", tmp_path).stdout)
    assert {"--array=1-8", "--time=5:00"} <= set(commands["search"][0])
    assert {"--dependency=afterany:JOB_OF_search", "--time=5:00"} <= set(commands["transfer"][0])
    assert "--dependency=singleton,afterok:JOB_OF_transfer" in commands["target"][0]


EXPORT_CHECK_SCORE = [
    "mup-megatron export target/checkpoints --recipe target.recipe.yaml --to target-hf --tokenizer T",
    "mup-megatron check --exported target-hf --against target/checkpoints --recipe target.recipe.yaml",
    "lm_eval run --model hf --model_args pretrained=target-hf --tasks a,b --output_path tasks --limit 10",
]


def test_tasks_are_scored_on_the_export_behind_its_check(environment: dict[str, str], tmp_path: Path) -> None:
    settings = {"TOKENIZER": "T", "LM_EVAL": "--limit 10", "DATA": "/data/text"}
    words = ("--scale", "tiny", "--tasks", "a,b", "--stage", "evaluate", "--work", tmp_path)
    shown = commands_of(run({**environment, **settings}, *words, "--dry-run").stdout)["evaluate"]
    assert shown[2][:2] == ["env", "HF_HUB_OFFLINE=1"]
    assert [" ".join(shown[0]), " ".join(shown[1]), " ".join(shown[2][2:])] == EXPORT_CHECK_SCORE
    done = tmp_path / "done"
    for name, fails in (("mup-megatron", "check"), ("lm_eval", "nothing")):
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >>{done}\n[ "$1" != "${{FAILS-{fails}}}" ]\n')
        command.chmod(0o755)
    assert run({**environment, **settings}, *words).returncode == 1
    assert done.read_text().splitlines() == EXPORT_CHECK_SCORE[:2], "nothing is scored that is not the trained model"
    (tmp_path / "target-hf").mkdir()
    assert run({**environment, **settings, "FAILS": ""}, *words).returncode == 0
    assert done.read_text().splitlines()[2:] == EXPORT_CHECK_SCORE[1:], "an export that is there stays"


def test_slurms_job_that_evaluates_knows_the_tasks(environment: dict[str, str], tmp_path: Path) -> None:
    settings = {"DATA": "/data/text", "STORAGE": "postgresql://me@db/optuna"}
    out = run({**environment, **settings}, "--slurm", "--dry-run", "--tasks", "a,b", "--work", tmp_path).stdout
    (wrapped,) = (word for word in commands_of(out)["evaluate"][0] if word.startswith("--wrap"))
    assert words_after(shlex.split(wrapped.removeprefix("--wrap=")), "--tasks") == "a,b"


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        (["--search", "grid"], {}, "--search grid: choose fidelities or paper"),
        (["--stage", "stage1"], {}, "--stage stage1: choose from prepare search transfer target evaluate report with"),
        ([*PAPER, "--stage", "search"], {}, "--stage search: choose from prepare stage1"),
        (["--accept-unfinished"], {}, "--accept-unfinished: it is about stage 2 of --search paper"),
        (["--stage", "search"], {}, "DATA is not set: the prefix of your training data"),
        (["--scale", "huge"], {}, "--scale huge: choose full or tiny"),
        ([*PAPER, "--stage", "stage3"], {}, "--stage stage3: choose from prepare stage1"),
        (["--tasks", "a", "--stage", "evaluate"], {"DATA": "/data/text"}, "TOKENIZER is not set: --tasks needs"),
        (["--scale", "tiny", "--tasks", "a"], {}, "lm-evaluation-harness is not installed. pip install lm-eval"),
        (["--stage"], {}, "--stage: its value is missing"),
        (["--fast"], {}, "--fast: no such option"),
        ([*PAPER, "--stage", "stage1"], {}, "DATA is not set: the prefix of your training data"),
        ([], {"DATA": "/data/text"}, "MEGATRON is not set"),
        (
            [*PAPER, "--slurm", "--stage", "stage1"],
            {"DATA": "/data/text"},
            "STORAGE is not set: jobs on several machines",
        ),
        (
            ["--slurm", "--stage", "search"],
            {"DATA": "/data/text", "STORAGE": "sqlite:///a.db"},
            "STORAGE is not set: jobs on several machines",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(
    environment: dict[str, str], tmp_path: Path, words: list[str], settings: dict[str, str], said: str
) -> None:
    done = run({**environment, **settings}, "--work", tmp_path / "work", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not (tmp_path / "work").exists()


# The whole experiment in small


@pytest.fixture
def data(environment: dict[str, str], tmp_path: Path) -> Path:
    """A small text; without DATA the script makes data of its own, which takes longer."""
    files = sorted(Path(os.__file__).parent.glob("[a-d]*.py"))[:12]
    command = ["mup-megatron", "data", *map(str, files), "-o", str(tmp_path / "text"), "--tokenizer", "bpe:512"]
    subprocess.run(command, env=environment, capture_output=True, check=True, timeout=HANGS_AFTER_S)
    return tmp_path / "text"


def killed(environment: dict[str, str], sign: str, *words: object) -> None:
    """Starts the script, and kills it and all that it has started when it says `sign`."""
    process = subprocess.Popen(
        [str(RUN), *map(str, words)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if sign in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(HANGS_AFTER_S)
    process.stderr.close()
    assert sign in said[-1], "".join(said)


def assert_complete(work: Path) -> dict[str, dict[str, str]]:
    """Six trials, the best two of them for longer, and a target with the best one of those; returns the summary."""
    first, second = (
        optuna.load_study(study_name=f"tiny-{stage}", storage=f"sqlite:///{work}/results/tiny-{stage}.db")
        for stage in ("stage1", "stage2")
    )
    assert len(first.trials) == 6
    order = sorted((trial for trial in first.trials if trial.value is not None), key=lambda trial: trial.value or 0.0)
    assert [trial.params for trial in second.trials] == [trial.params for trial in order[:2]]
    lengths = [study.best_trial.user_attrs["metrics"]["tokens"] for study in (first, second)]
    assert lengths == [10240, 40960]
    recipe = load_recipe(work / "target.recipe.yaml")
    assert recipe.hyperparameters.lr == second.best_trial.params["lr"]
    assert recipe.hyperparameters.weight_decay == 0.1
    assert recipe.provenance["selected_from"]["study"] == "tiny-stage1"
    with (work / "summary.csv").open() as stream:
        rows = {row["stage"]: row for row in csv.DictReader(stream)}
    assert float(rows["tiny-stage1"]["loss"]) == first.best_value
    assert float(rows["tiny-stage2"]["loss"]) == second.best_value
    assert rows["target"]["recipe"] == recipe.fingerprint
    assert json.loads((work / "summary.json").read_text())[2]["loss"] == float(rows["target"]["loss"])
    return rows


@pytest.mark.slow
def test_all_stages_for_real_killed_on_the_way(environment: dict[str, str], tmp_path: Path, data: Path) -> None:
    environment["DATA"] = str(data)
    words = ("--scale", "tiny", *PAPER, "--work", tmp_path / "work")
    killed(environment, "[1/6] trial", *words)
    done = run(environment, *words)
    assert done.returncode == 0, done.stderr
    rows = assert_complete(tmp_path / "work")
    # The answer alone on standard output: the table.
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["stage", "tiny-stage1", "tiny-stage2", "target"]
    assert rows["target"]["recipe"][:12] in done.stdout
    for stage in ("stage1", "stage2"):
        assert (tmp_path / "work" / "results" / f"tiny-{stage}" / "report" / "index.html").exists()
    # What Megatron-LM said last is the target's loss.
    log = (tmp_path / "work" / "target.log").read_text()
    (loss,) = re.findall(r"validation loss at iteration 40 on validation set \| lm loss value: (\S+) ", log)
    assert float(rows["target"]["loss"]) == float(loss) < 6.2, "512 tokens drawn at random would have log 512"
    assert log.count("mup") > 0

    # An evaluation of the user's own gives the loss instead, and is told where everything is.
    environment["EVALUATE"] = 'ls "$MODEL" "$RECIPE" "$CHECKPOINTS/latest_checkpointed_iteration.txt" && echo 1.98'
    done = run(environment, *words, "--stage", "evaluate", "--stage", "report")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[-2:] == ["1.9800", rows["target"]["recipe"][:12]]


@pytest.mark.slow
def test_the_search_over_fidelities_for_real_killed_on_the_way(
    environment: dict[str, str], tmp_path: Path, data: Path
) -> None:
    environment["DATA"] = str(data)
    work = tmp_path / "work"
    words = ("--scale", "tiny", "--work", work, *(w for s in ("prepare", "search", "transfer") for w in ("--stage", s)))
    killed(environment, "] trial", *words)
    done = run(environment, *words, "--stage", "report")
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name="tiny-search", storage=f"sqlite:///{work}/results/tiny-search.db")
    assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED"}
    recipe = load_recipe(work / "target.recipe.yaml")
    assert recipe.provenance["study"] == "tiny-search"
    assert recipe.hyperparameters.lr == study.trials[recipe.provenance["trial"]].params["lr"]
    assert len(recipe.provenance["cost"]["rungs"]) > 1
    assert recipe.provenance["cost"]["flops"] <= 7e10
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["stage", "tiny-search", "target"]
    assert (work / "results" / "tiny-search" / "report" / "index.html").exists()


@pytest.mark.slow
def test_killed_in_the_targets_run_it_goes_on_from_the_checkpoint(
    environment: dict[str, str], tmp_path: Path, data: Path
) -> None:
    environment["DATA"] = str(data)
    words = ("--scale", "tiny", *PAPER, "--work", tmp_path / "work")
    killed(environment, "successfully saved checkpoint from iteration      20", *words)
    done = run(environment, *words, "--stage", "target", "--stage", "report")
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "work")
    log = (tmp_path / "work" / "target.log").read_text()
    # Every tenth iteration is logged, and the first after each start.
    assert re.findall(r"iteration +(\d+)/ +40 \|", log) == ["1", "10", "20", "21", "30", "40"]
    again = run(environment, *words, "--stage", "target")
    assert "the target's run is complete" in again.stderr
