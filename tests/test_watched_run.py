"""The runs of docs/watching.md: each is the line of a model and a recipe, and what is wrong in it is what it says."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import watched_run
from support.watching_page import PAGE, matching, names

from mup_megatron.megatron.arguments.convert import model_from_flags
from mup_megatron.theory import Role


def rates(run: watched_run.Run) -> dict[Role, float]:
    plan = run.recipe().plan(watched_run.model(run.width))
    return {entry.role: entry.lr / watched_run.TUNED["lr"] for entry in plan.entries}


@pytest.mark.parametrize("run", watched_run.RUNS, ids=lambda run: run.key)
def test_a_line_is_the_model_and_logs_everything(run: watched_run.Run, tmp_path: Path) -> None:
    words = watched_run.words(run, tmp_path, tmp_path / "text", 7)
    own = watched_run.model(run.width)
    read = model_from_flags(words, source="line").model_copy(update={"vocab_size": own.vocab_size})
    assert run.recipe().plan(read) == run.recipe().plan(own)
    given = dict(itertools.pairwise(words))
    assert given["--train-iters"] == "7"
    assert (given["--tensorboard-log-interval"], given["--mup-coordinates-interval"]) == ("1", "1")
    assert {"--tensorboard-dir", "--wandb-project", "--mup-recipe"} <= set(words)


def test_what_is_wrong_is_what_is_said() -> None:
    assert rates(watched_run.NARROW) == {Role.INPUT: 1.0, Role.HIDDEN: 1.0, Role.OUTPUT: 1.0}
    assert rates(watched_run.RIGHT) == {Role.INPUT: 1.0, Role.HIDDEN: 0.25, Role.OUTPUT: 1.0}
    assert rates(watched_run.UNSCALED) == rates(watched_run.NARROW)
    assert rates(watched_run.TOO_HIGH) == {role: 32 * lr for role, lr in rates(watched_run.RIGHT).items()}


def test_the_page_has_each_run_and_each_picture() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"\n| {run.called} |" in text for run in watched_run.RUNS)
    shown = {*watched_run.PICTURES, "tensorboard"}
    assert shown == {path.stem for path in (PAGE.parent / "watching").iterdir()}
    assert all(f"(watching/{name}.png)" in text for name in shown)


def table() -> dict[str, list[str]]:
    """The first cell of each line of the page's table → its other cells."""
    text = PAGE.read_text(encoding="utf-8").partition(watched_run.BEGIN)[2].partition(watched_run.END)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line]
    return {first: cells for first, *cells in lines}


def made_up() -> dict[str, watched_run.Scalars]:
    """What the runs would have logged; sizes of two parts, and a rate that is in no table."""
    sizes = {f"mup/rms/{part}": {1: 0.5, 120: 1234.5} for part in ("embedding", "output_layer")}
    return {run.key: {"lm loss": {1: 7.0, 120: 4.5}, "mup/lr/input": {1: 0.1}, **sizes} for run in watched_run.RUNS}


def test_the_table_is_written_between_its_marks_and_nowhere_else() -> None:
    page = f"# Watching\n\n{watched_run.BEGIN}\n\n| old |\n\n{watched_run.END}\n\nAfter.\n"
    lines = watched_run.told(made_up())
    assert lines[0] == "| run | loss | `embedding` | `output_layer` |"
    assert lines[2] == f"| {watched_run.RUNS[0].called} | 4.500 | 0.5 → 1.23e+03 | 0.5 → 1.23e+03 |"
    written = watched_run.with_table(page, lines)
    body = "\n".join(lines)
    assert written == f"# Watching\n\n{watched_run.BEGIN}\n\n{body}\n\n{watched_run.END}\n\nAfter.\n"
    assert watched_run.with_table(written, lines) == written


def test_the_page_has_the_table_that_the_command_writes() -> None:
    heads = table()["run"]
    sizes = {f"mup/rms/{head.strip('`')}": {1: 1.0} for head in heads[1:]}
    assert all(any(matching(name).fullmatch(size) for name in names("Megatron-LM")) for size in sizes)
    lines = watched_run.told({run.key: {"lm loss": {1: 1.0}, **sizes} for run in watched_run.RUNS})
    assert lines[0] == f"| run | {' | '.join(heads)} |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(table())[2:]
    text = PAGE.read_text(encoding="utf-8")
    assert watched_run.with_table(text, ["| x |"]) != text


def test_losses_of_the_text_are_those_of_the_table() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    losses = {run.key: f"{float(table()[run.called][0]):.2f}" for run in watched_run.RUNS}
    unscaled, right = re.findall(r"it is ([\d.]+) at the end, where the recipe gives ([\d.]+)\. ", text)[0]
    (too_high,) = re.findall(r"the loss does come back, to ([\d.]+),", text)
    assert (unscaled, right, too_high) == (losses["unscaled"], losses["right"], losses["too-high"])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The lines of runs that would have been started."""
    lines: list[Any] = []
    monkeypatch.setattr(watched_run.subprocess, "run", lambda line, **_: lines.append(line))
    return lines


def again(folder: Path, train_iters: int = 7) -> None:
    watched_run.logged(watched_run.RIGHT, folder / "right", folder / "text", train_iters)


def test_a_run_that_has_ended_is_not_repeated(tmp_path: Path, made: list[Any]) -> None:
    again(tmp_path)
    again(tmp_path)
    assert len(made) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setitem(watched_run.TUNED, "lr", 0.5),
        lambda patch: patch.setattr(watched_run, "LOOP", [*watched_run.LOOP, "--log-throughput"]),
        lambda patch: patch.setattr(watched_run, "_code", lambda: "other"),
        lambda patch: patch.setattr(watched_run, "version", lambda _: "9.9"),
    ],
    ids=["recipe", "line", "package", "versions"],
)
def test_a_run_of_another_kind_is_repeated(
    tmp_path: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    again(tmp_path)
    (tmp_path / "right" / "board").mkdir()
    change(monkeypatch)
    again(tmp_path)
    assert len(made) == 2
    assert not (tmp_path / "right" / "board").exists(), "events of both would be read as one run's"


def test_a_run_that_broke_is_repeated(tmp_path: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(watched_run.subprocess, "run", broken)
        with pytest.raises(RuntimeError):
            again(tmp_path)
    again(tmp_path)
    assert len(made) == 1


def test_a_folder_without_the_page_is_refused_before_any_run(
    tmp_path: Path, made: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        watched_run.main(["--docs", str(tmp_path), "-o", str(tmp_path / "made")])
    assert "there is no watching.md" in capsys.readouterr().err
    assert not made
