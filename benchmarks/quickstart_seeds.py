"""The quickstart on several seeds, as one table in Markdown.

    python benchmarks/quickstart_seeds.py [--seeds 1 2 3]

Runs `mup-megatron quickstart --seed S --output results/quickstart-S` for each seed; what is there is not repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    for seed in seeds:
        words = ["quickstart", "--seed", str(seed), "--output", str(_folder(seed))]
        subprocess.run([sys.executable, "-m", "mup_megatron", *words], check=True, stdout=subprocess.DEVNULL)
    print("| seed | tuned lr | proxy | wide, transferred | best of grid | regret | optimum moved |")
    print("|---|---|---|---|---|---|---|")
    for seed in seeds:
        summary = json.loads((_folder(seed) / "summary.json").read_text())
        for rule, name in (("mup", "μP"), ("standard", "standard")):
            print(_row(f"{seed}, {name}", summary, summary["target"][rule]))


def _folder(seed: int) -> Path:
    return Path("results") / f"quickstart-{seed}"


def _row(title: str, summary: dict[str, Any], target: dict[str, Any]) -> str:
    shift = target["shift_octaves"]
    edge = " (edge of the grid)" if target["optimum_at_edge"] else ""
    cells = [
        title,
        f"{summary['lr']:.3g}",
        _loss(summary["proxy"]["loss"]),
        _loss(target["transferred"]),
        _loss(target["best"]),
        "" if target["regret"] is None else f"{target['regret']:.3f}",
        "" if shift is None else f"{shift:+.1f} octaves{edge}",
    ]
    return f"| {' | '.join(cells)} |"


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"


if __name__ == "__main__":
    main()
