"""The doors of the plug-in: the launcher, and an import in a script of one's own. Closed, they touch nothing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.lm_recipes import line, recipe_file
from support.lm_runs import SCRIPT, Finished, run_script

from mup_megatron import launch
from mup_megatron.megatron.pretrain import hooks

TRAINING = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron-core 0.16 has no megatron.training in its wheel",
)


# ---- the launcher -------------------------------------------------------------------------------------------------


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        launch.main(words)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_the_first_argument_is_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the first argument is the script. usage: " in complaint([], capsys)
    assert "the first argument is the script. usage: " in complaint(["--lr", "0.1"], capsys)


def test_a_script_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path / 'x.py'}: no such script" in complaint([str(tmp_path / "x.py")], capsys)


def test_its_help_lists_the_flags_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    launch.main(["--help"])
    assert "--mup-recipe R.recipe.yaml" in capsys.readouterr().out


def run_launcher(tmp_path: Path, text: str, *words: str) -> "subprocess.CompletedProcess[str]":
    script = tmp_path / "script.py"
    script.write_text(text)
    command = [sys.executable, "-m", "mup_megatron.launch", str(script), *words]
    root = str(Path(__file__).parents[3])
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, env=without_gpu)


def test_the_script_sees_what_python_would_show_it(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'next door'")
    text = "import sys, neighbour\nprint(__name__, sys.argv[1:], neighbour.NAME)\nsys.exit(7)\n"
    ended = run_launcher(tmp_path, text, "--help", "x y")
    assert ended.stdout == "__main__ ['--help', 'x y'] next door\n"
    assert ended.returncode == 7


def test_without_a_gpu_a_run_on_the_cpu_has_to_be_meant(tmp_path: Path) -> None:
    ended = run_launcher(tmp_path, "print('ran')", "--lr", "0.1")
    assert ended.returncode == 2
    assert "no GPU was found" in ended.stderr
    assert ended.stdout == ""


# ---- an import of one's own ---------------------------------------------------------------------------------------


def own_script(folder: Path, imports: str) -> Path:
    path = folder / "own.py"
    path.write_text(f"{imports}\nimport runpy\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")
    return path


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("launched")
    words = [*line(), "--mup-recipe", str(recipe_file(folder))]
    return run_script(SCRIPT, words, folder=folder / "ranks", launcher=True).require_success()


@TRAINING
@pytest.mark.parametrize(
    "imports",
    [
        "import mup_megatron.megatron",
        "from megatron.training import pretrain\nimport mup_megatron.megatron",
        "import megatron.training.initialize\nfrom mup_megatron.megatron import optimizer",
    ],
    ids=["first", "after Megatron's", "by way of a part"],
)
def test_the_import_alone_does_the_same_in_any_order(tmp_path: Path, launched: Finished, imports: str) -> None:
    words = [*line(), "--mup-recipe", str(recipe_file(tmp_path))]
    finished = run_script(own_script(tmp_path, imports), words, folder=tmp_path / "ranks").require_success()
    assert finished.losses == launched.losses


@TRAINING
def test_a_script_that_had_its_arguments_validated_before_is_told_so(tmp_path: Path) -> None:
    imports = (
        "from megatron.training import arguments\nvalidate = arguments.validate_args\nimport mup_megatron.megatron\n"
        "arguments.validate_args = validate"
    )
    words = [*line(), "--mup-recipe", str(recipe_file(tmp_path))]
    finished = run_script(own_script(tmp_path, imports), words, folder=tmp_path / "ranks")
    assert finished.codes == [1]
    assert "had imported Megatron's argument parsing before the plug-in" in finished.err[0]


@TRAINING
def test_a_mistake_is_told_in_one_sentence_here_too(tmp_path: Path) -> None:
    script = own_script(tmp_path, "import mup_megatron.megatron")
    words = [*line(tensor_model_parallel_size=2), "--mup-recipe", str(recipe_file(tmp_path)), "--lr", "7"]
    finished = run_script(script, words, 2, folder=tmp_path / "ranks")
    assert finished.codes == [1, 1]
    said = "".join(finished.err)
    assert said.count("these flags say something else") == 1
    assert "Traceback" not in said


def test_without_a_flag_of_ours_no_place_is_taken() -> None:
    assert not hooks.install_if_asked(["--lr", "0.1", "--use-mup"])
    assert not hooks._installed
