"""The example of a training loop of one's own: it trains, and stops where one of its calls is left out."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_megatron_core.py"


def run(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)


def test_it_trains() -> None:
    done = run(EXAMPLE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:5]] == [f"step {step}" for step in range(5)]
    assert sum(" tensors at lr " in line for line in lines) > 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("apply_plan([model], plan)", "initial std"),
        ("    config_overrides=config_overrides(chunks, plan, optimizer_config),", "max_lr"),
    ],
    ids=["apply_plan", "config_overrides"],
)
@pytest.mark.slow  # what the guard says of either is in megatron/test_guard.py
def test_without_a_call_it_stops_before_the_first_step(call: str, named: str, tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert text.count(call) == 1
    script = tmp_path / "without.py"
    script.write_text(text.replace(call, ""), encoding="utf-8")
    done = run(script)
    assert done.returncode != 0
    assert "InputError" in done.stderr
    assert named in done.stderr
    assert "step 0" not in done.stdout
