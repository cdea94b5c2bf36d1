"""CPU seconds of `mup-megatron explain` at GPT-3 175B beyond those at a small model.

python benchmarks/explain_175b.py
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MODELS = Path(__file__).parents[1] / "configs" / "models"


def main() -> None:
    """Explains both targets with a recipe whose base is the 40M proxy of the family."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "r.recipe.yaml"
        _command("recipe", "--base", MODELS / "gpt3_6.7b_proxy_40m.yaml", "--lr", "0.006", "-o", recipe)
        small = _cpu_seconds("explain", MODELS / "gpt3_125m.yaml", "--recipe", recipe, "--format", "json")
        large = _cpu_seconds("explain", MODELS / "gpt3_175b.yaml", "--recipe", recipe, "--format", "json")
    print(f"125M {small:.2f} s, 175B {large:.2f} s, difference {large - small:.2f} s of CPU (medians of 5)")


def _command(*words: object) -> None:
    command = [sys.executable, "-m", "mup_megatron", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _cpu_seconds(*words: object) -> float:
    times = []
    for _ in range(5):
        before = os.times()
        _command(*words)
        after = os.times()
        times.append(after.children_user - before.children_user + after.children_system - before.children_system)
    return statistics.median(times)


if __name__ == "__main__":
    main()
