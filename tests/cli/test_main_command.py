"""What every command has in common: help, exit codes, and who says what went wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Command

from mup_megatron import __version__
from mup_megatron.cli import options
from mup_megatron.cli.main import COMMANDS, main
from mup_megatron.cli.sweep import WORDS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(run: Command, words: list[str]) -> None:
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    for name, purpose in COMMANDS.items():
        assert f"  {name} " in out
        assert purpose[:40] in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run: Command, name: str) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: mup-megatron {name} " in out


def test_the_commands_are_the_modules() -> None:
    here = {path.stem for path in (ROOT / "mup_megatron" / "cli").glob("*.py")}
    words = {f"sweep_{word}" for word in WORDS}
    assert {name.replace("-", "_") for name in COMMANDS} | words == here - {"__init__", "main", "options"}


def test_the_version(run: Command) -> None:
    assert run("--version") == (0, f"mup-megatron, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explian"], "No such command 'explian'"),
        (["--verbose"], "No such option"),
        (["explain", "target.yaml", "--recipe", "r.yaml", "--verbose"], "No such option"),
        (["explain", "target.yaml"], "Missing option '--recipe'"),
        (["explain", "--recipe", "r.yaml"], "Missing argument 'TARGET.yaml'"),
        (["explain", "target.yaml", "--recipe", "r.yaml", "--format", "xml"], "'xml' is not one of 'table', 'json'"),
        (["explain", "target.yaml", "more.yaml", "--recipe", "r.yaml"], "unexpected extra argument (more.yaml)"),
        (["proxy", "target.yaml", "--trials", "many"], "'many' is not a valid integer"),
    ],
)
def test_a_line_that_is_no_command_is_bad_input(run: Command, here: Path, words: list[str], said: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("mup-megatron: ")
    assert said in err
    assert "Usage: mup-megatron" in err
    assert "Traceback" not in err


def test_bad_input_is_one_sentence(run: Command, here: Path) -> None:
    answer = run("explain", "nowhere.yaml", "--recipe", "r.yaml")
    assert answer == (2, "", "mup-megatron: nowhere.yaml: no such file. Check the path.\n")


@pytest.mark.parametrize("words", [["--debug", "explain"], ["explain", "--debug"]])
def test_debug_shows_where_it_happened_and_the_same_answer(run: Command, here: Path, words: list[str]) -> None:
    code, out, err = run(*words, "nowhere.yaml", "--recipe", "r.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback (most recent call last):")
    assert "in read_target" in err
    assert err.endswith("mup-megatron: nowhere.yaml: no such file. Check the path.\n")


def test_debug_alone_changes_nothing(run: Command, here: Path) -> None:
    words = ("explain", "target.yaml", "--recipe", "r.yaml", "--format", "json")
    assert run(*words, "--debug") == run(*words)


def test_after_two_dashes_debug_is_a_word_like_others(run: Command, here: Path) -> None:
    assert run("explain", "--recipe", "r.yaml", "--", "--debug") == (
        2,
        "",
        "mup-megatron: --debug: no such file. Check the path.\n",
    )


def test_what_the_theory_refuses_is_bad_input_too(run: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "r.yaml").write_text((here / "r.yaml").read_text() + "per_parameter: [{match: nothing.*}]\n")
    words = ("explain", "target.yaml", "--recipe", "r.yaml")
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "per_parameter[0] 'nothing.*' matches no parameter" in err


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False), ("7", False)])
def test_of_many_processes_the_first_alone_says_why(
    run: Command, here: Path, monkeypatch: pytest.MonkeyPatch, rank: str, speaks: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the others wait for the first to have spoken
    for words in (["explain", "nowhere.yaml", "--recipe", "r.yaml"], ["explian"], ["train", "--bf17"]):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert bool(err) == speaks


def test_an_interruption_is_no_bad_input(run: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "load_recipe", interrupted)
    code, out, err = run("explain", "target.yaml", "--recipe", "r.yaml")
    assert (code, out, err.strip()) == (130, "", "mup-megatron: interrupted")


def test_a_fault_of_ours_is_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(options, "load_recipe", broken)
    with pytest.raises(ZeroDivisionError):
        main(["explain", "target.yaml", "--recipe", "r.yaml"])


def test_what_the_system_refuses_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "load_recipe", lambda path: Path("gone", "study.db").read_text())
    with pytest.raises(SystemExit) as left:
        main(["explain", "target.yaml", "--recipe", "r.yaml"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "gone/study.db cannot be opened or written (No such file or directory). Correct its path" in said


def test_an_answer_that_cannot_be_written_is_no_success(here: Path) -> None:
    command = [sys.executable, "-m", "mup_megatron", "recipe", "--defaults"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 2
    assert "mup-megatron: the answer cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_gets_no_traceback(here: Path) -> None:
    command = [sys.executable, "-m", "mup_megatron", "explain", str(ROOT / "configs/models/gpt3_175b.yaml")]
    (here / "r.yaml").write_text("base: {num_layers: 1, hidden_size: 128, num_attention_heads: 1, vocab_size: 300, "
                                 "seq_length: 16}\nhyperparameters: {lr: 0.006}\n")  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as closed:
        done = subprocess.run(
            [*command, "--recipe", "r.yaml"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False,
            env=environment,
        )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
