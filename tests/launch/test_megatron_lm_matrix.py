"""tools/megatron-lm-matrix: what it reads off a run, and what it keeps. The runs themselves need a checkout."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "megatron-lm-matrix"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("megatron_lm_matrix", str(TOOL))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setitem(sys.modules, loader.name, module)
        loader.exec_module(module)
    return module


def test_losses_are_read_as_megatron_prints_them(tool: ModuleType) -> None:
    lines = [
        f" [2026-01-01 00:00:00] iteration {i:8d}/ {6:8d} | consumed samples: {8 * i:12d} | learning rate: 1.0E-03 | "
        f"lm loss: 6.{i}00000E+00 | loss scale: 1.0 | grad norm: 0.871 |\n"
        for i in (1, 2)
    ]
    said = "".join([*lines, " validation loss at iteration 2 on validation set | lm loss value: 6.1E+00 |\n"])
    assert tool.losses_in(said) == {1: "6.100000E+00", 2: "6.200000E+00"}


def test_of_a_resumed_run_the_mean_of_two_iterations_is_left_out(tool: ModuleType) -> None:
    whole = {iteration: str(iteration) for iteration in range(1, 7)}
    assert set(tool.continued(whole)) == {4, 6}


def test_rows_of_other_versions_stay_in_the_file(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "matrix.csv"
    older, newer = tool.Row("0.16.1", "TP2", "as it should be"), tool.Row("0.19.0", "TP2", "FAILED: ended with 1")
    tool.write(path, [newer])
    tool.write(path, [older])
    assert tool.read(path) == [older, newer]
    again = tool.Row("0.19.0", "TP2", "as it should be", "6.1", "6.0", "one process", "0.0e+00")
    tool.write(path, [again])
    assert tool.read(path) == [older, again]


def test_only_what_a_run_writes_may_change_in_a_checkout(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    before = tool.digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("2")
    (tmp_path / "helpers_cpp.so").write_text("2")
    assert tool.digest(tmp_path) == before
    (tmp_path / "a.py").write_text("2")
    assert tool.digest(tmp_path) != before


def test_what_is_no_checkout_is_named(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{tmp_path}: no pretrain_gpt.py in it" in done.stderr
