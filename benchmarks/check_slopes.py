"""Slopes over width of correct models, with their intervals, as a check measures them on Megatron-Core.

    python benchmarks/check_slopes.py [--widths 32 64 128 256 512 1024] [--seeds 3]

For a GPT and a Llama-like model of two layers: how far training has moved each output of the last layer, and the
gradients of its weights, beside the same in plain torch (the reference of the check) and in standard parametrization
(its control). Each slope is of log(value) over log(width), with its 95 % interval from the seeds.
"""

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rates.architectures import REPORT

from mup_megatron.check.measure import levels
from mup_megatron.check.measure.measurements import Key, Quantity
from mup_megatron.check.verdict.verdict import Verdict

WIDTHS = (32, 64, 128, 256, 512, 1024)
ARCHITECTURES = ("gpt", "llama")
STEPS = (levels.EARLY.recorded[0], levels.EARLY.recorded[-1])


def main() -> None:
    """Measures and prints a table for each architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--seeds", type=int, default=levels.SEEDS)
    arguments = parser.parse_args()
    from rich.progress import Progress

    from mup_megatron.check.run_megatron import check_megatron
    from mup_megatron.training import ranks

    ranks.preload()
    with Progress() as progress:
        task = progress.add_task("")

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        verdicts = {
            name: check_megatron(
                REPORT[name].target,
                REPORT[name].recipe,
                widths=arguments.widths,
                seeds=arguments.seeds,
                report=report,
            )
            for name in ARCHITECTURES
        }
    for name, verdict in verdicts.items():
        print(f"\n{name}: {verdict.outcome.value}, {verdict.seconds:.0f} s\n")
        print("\n".join(table(verdict)))


def table(verdict: Verdict) -> Sequence[str]:
    """Markdown: one row for each quantity, output and time."""
    lines = ["| what | of | step | Megatron-Core | reference | standard |", "|---|---|---|---|---|---|"]
    for quantity in (Quantity.UPDATE, Quantity.GRADIENT):
        for key, compared in verdict.comparison.items():
            if key.quantity is quantity and key.step in STEPS and _told(key):
                control = verdict.control_comparison[key].subject
                cells = (quantity, f"`{key.name}`", key.step, compared.subject, compared.reference, control)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _told(key: Key) -> bool:
    """The last layer stands for all of them, and a matrix for its bias."""
    first = key.name.startswith("decoder.layers.0")
    return not first and (key.quantity is Quantity.UPDATE or key.name.endswith(".weight"))


if __name__ == "__main__":
    main()
