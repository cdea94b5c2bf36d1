"""The launcher of Megatron-LM scripts: a script sees what torchrun would show it, and a hang ends with its stack."""

import os
from pathlib import Path

import pytest
from support.lm_runs import gpt, run_script
from support.processes import RankFailure

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")


def script(folder: Path, text: str) -> Path:
    folder.mkdir()
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_a_script_runs_as_torchrun_would_run_it(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    path = script(
        tmp_path / "scripts",
        "import os, subprocess, sys\n"
        "import torch\n"
        "import neighbour\n"
        "if __name__ == '__main__':\n"
        "    torch.distributed.init_process_group('gloo')\n"
        "    total = torch.tensor([int(os.environ['RANK'])])\n"
        "    torch.distributed.all_reduce(total)\n"
        "    print(sys.argv[1:], neighbour.NAME, total.item(), os.environ['LOCAL_RANK'], os.environ['EXTRA'])\n"
        "    subprocess.run(['echo', 'from a program'])\n"
        "    sys.exit(3 * total.item() if os.environ['RANK'] == '1' else None)\n",
    )
    (path.parent / "neighbour.py").write_text("NAME = 'beside'\n")
    finished = run_script(path, ["--flag", "x"], 2, folder=tmp_path / "work", environment={"EXTRA": "1"})
    assert finished.codes == [0, 3]
    assert [sorted(text.splitlines()) for text in finished.out] == [
        [f"['--flag', 'x'] beside 1 {rank} 1", "from a program"] for rank in range(2)
    ]
    with pytest.raises(RankFailure, match="rank 1 exited with 3"):
        finished.require_success()


def test_an_exception_is_a_failed_rank_with_its_traceback(tmp_path: Path) -> None:
    path = script(tmp_path / "scripts", "raise KeyError('the reason')\n")
    finished = run_script(path, [], folder=tmp_path / "work")
    assert finished.codes == [1]
    assert "KeyError: 'the reason'" in finished.err[0]


def test_a_hanging_rank_is_killed_and_says_where_it_hung(tmp_path: Path) -> None:
    path = script(
        tmp_path / "scripts",
        "import os, time\n"
        "def hang():\n"
        "    open('pid', 'w').write(str(os.getpid()))\n"
        "    time.sleep(3600)\n"
        "if os.environ['RANK'] == '1':\n"
        "    hang()\n",
    )
    with pytest.raises(RankFailure, match=r"(?s)\Arank 1 still ran after 10 s.*script.py.*in hang"):
        run_script(path, [], 2, folder=tmp_path / "work", timeout_s=10)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "work" / "pid").read_text()), 0)


def test_flags_of_a_model() -> None:
    words = gpt(swiglu=True, hidden_size=128, min_lr=None)
    assert words[words.index("--hidden-size") + 1] == "128"
    assert words[-1] == "--swiglu"
    assert "--min-lr" not in words
