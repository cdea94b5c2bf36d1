"""`sweep report`: the report of a study on disk, and what it refuses."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest
from support.commands import BASE, Command, contents

from mup_megatron.architectures.cost import training_flops
from mup_megatron.architectures.registry import model_file
from mup_megatron.search import ReportFn, StudySpec, TrialOutcome, run_sweep
from mup_megatron.tuning import DEFAULT_SPACE
from mup_megatron.validation import plain

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NAME = "<b>&$x$"


def rate(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
    return TrialOutcome(3.0 + parameters["lr"])


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trials of a study, as `sweep` leaves them; the same, without its context, by another name; no sweep's."""
    file = tmp_path_factory.mktemp("studies") / "one.db"
    context = {
        "proxy": plain(model_file(BASE, source="base.yaml")), "fixed": {}, "data": {"name": "text", "sha256": None},
        "training": {"train_iters": 3, "global_batch_size": 2},
    }  # fmt: skip
    for name, made_with in (("small", context), (NAME, {})):
        run_sweep(StudySpec(name, f"sqlite:///{file}", 1, "random", DEFAULT_SPACE, made_with), rate, 4)
    optuna.create_study(study_name="foreign", storage=f"sqlite:///{file}", direction="minimize")
    return file


@pytest.fixture
def study(here: Path, database: Path) -> Path:
    return Path(shutil.copy(database, here / "one.db"))


def test_a_report_is_a_page_with_pictures_and_leaves_the_study_alone(run: Command, here: Path, study: Path) -> None:
    before = study.read_bytes()
    folder = here / "results" / "small" / "report"
    folder.mkdir(parents=True)
    (folder / "importance.png").write_text("of an earlier study of that name, with more trials")
    code, out, err = run("sweep", "report", "small", "--storage", "sqlite:///one.db")
    assert (code, out, err) == (0, "results/small/report/index.html\n", "")
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "hyperparameters.png", "interactions.png", "parallel.png", "cost.png", "history.png"}
    flops = 4 * training_flops(model_file(BASE, source="base.yaml")).total * 3 * 2 * BASE["seq_length"]
    assert f"4 trials have a result, {flops:.3g} FLOPs spent." in (folder / "index.html").read_text()
    assert study.read_bytes() == before

    # By another name, which is no folder's; into a folder of its own.
    words = ("sweep", "report", NAME, "--storage", "sqlite:///one.db")
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "STUDY '<b>&$x$': not the name of a folder. Say where to write with -o." in err
    assert run(*words, "-o", "there").out == "there/index.html\n"
    page = (here / "there" / "index.html").read_text()
    assert "<h1>Search &lt;b&gt;&amp;$x$</h1>" in page
    assert "FLOPs" not in page, "what its trials cost is not known"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["small"], "results/small.db: no such file. Check --study and --storage."),
        (["other", "--storage", "sqlite:///one.db"], "no study 'other' in it, only '<b>&$x$', 'foreign', 'small'"),
        (["foreign", "--storage", "sqlite:///one.db"], "study 'foreign' was not made by a sweep"),
        (["small", "--storage", "sqlite:///base.yaml"], "base.yaml: not a sound SQLite file"),
        (["small", "--storage", "postgresql://nobody@localhost:1/none"], "postgresql://nobody@localhost:1/none"),
        (["small", "--storage", "here"], "--storage 'here': not a URL"),
        (["small", "--storage", "sqlite:///one.db", "-o", "base.yaml"], "base.yaml/index.html: cannot be written"),
        (["a/b"], "'a/b': not the name of a folder"),
        ([], "Missing argument 'STUDY'"),
    ],
)
def test_what_is_no_study_is_refused(run: Command, here: Path, study: Path, words: list[str], said: str) -> None:
    before = contents(here)
    code, out, err = run("sweep", "report", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert contents(here) == before


def test_a_proxy_of_that_name_is_written_as_a_path(run: Command, here: Path) -> None:
    _, _, err = run("sweep", "./report", "--data", "text", "--trials", "1", "--study", "small")
    assert "report: no such file" in err
    assert "Usage: mup-megatron sweep report [OPTIONS] STUDY" in run("sweep", "report", "--help").out
    assert "`sweep report STUDY`" in run("sweep", "--help").out
