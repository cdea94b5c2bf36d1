"""How much activations of Hugging Face models move in training, and how large gradients are, as models get wider.

    python benchmarks/hf_coordinates.py [--seeds 4] [--cases gpt2 bert …] [-o results/hf-coordinates.csv]

The slopes of log(RMS) over log(width) with the plan, with standard parametrization, and with microsoft/mup from the
same weights; per module and parameter in the CSV file, as ranges per location in two tables in Markdown. Models, batch
and measurement are those of `tests/huggingface/test_hf_coordinates.py`, which holds bounds.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.hf_coordinates import (
    CASES,
    STEPS,
    Case,
    eps_slopes,
    gradient_slopes,
    mean,
    plans_of,
    standard_error,
    update_slopes,
    with_mup,
)

GRADIENT = "gradient"


@dataclass(frozen=True, slots=True)
class Row:
    """One activation after one step, or one parameter's first gradient."""

    case: str
    location: str
    name: str
    step: int
    mup: float
    standard_error: float | None
    """Over the seeds, of the column before it."""
    standard: float | None
    microsoft_mup: float | None
    eps: float | None
    """The slope of the plan's eps, of a parameter."""


def main() -> None:
    """Measures each case, prints the tables and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="how many; at least 2")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("-o", "--output", type=Path, default=Path("results/hf-coordinates.csv"))
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.cases:
        print(name, file=sys.stderr)
        rows += measured(name, CASES[name], range(arguments.seeds))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(*update_table(rows), "", *gradient_table(rows), sep="\n")


def measured(name: str, case: Case, seeds: Sequence[int]) -> Iterator[Row]:
    """All rows of a case."""
    plans, standard_plans = plans_of(case), plans_of(case, "standard")
    of_seeds = [update_slopes(case, plans, seed) for seed in seeds]
    ours, errors = mean(of_seeds), standard_error(of_seeds)
    standard = mean([update_slopes(case, standard_plans, seed) for seed in seeds])
    oracle = mean([update_slopes(case, plans, seed, start=with_mup) for seed in seeds])
    for (step, module), slope in ours.items():
        key = (step, module)
        location, _, of = module.partition(": ")
        yield Row(name, location, of, step, slope, errors[key], standard[key], oracle[key], None)
    eps = eps_slopes(plans)
    for parameter, slope in gradient_slopes(case, plans, seeds).items():
        yield Row(name, GRADIENT, parameter, 0, slope, None, None, None, eps[parameter])


def update_table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each case and location."""
    steps = [f"{what}, step {step}" for what in ("μP", "standard") for step in STEPS]
    yield f"| model | output of | {' | '.join(steps)} | largest standard error | distance from microsoft/mup |"
    yield "|" + "---|" * (len(steps) + 4)
    updates = [row for row in rows if row.location != GRADIENT]
    for case, location in dict.fromkeys((row.case, row.location) for row in updates):
        own = [row for row in updates if (row.case, row.location) == (case, location)]
        at = {step: [row for row in own if row.step == step] for step in STEPS}
        cells = [
            case,
            location,
            *(_range([row.mup for row in at[step]]) for step in STEPS),
            *(_range([row.standard for row in at[step] if row.standard is not None]) for step in STEPS),
            f"{max(row.standard_error or 0.0 for row in own):.2f}",
            f"{max(abs(row.mup - row.microsoft_mup) for row in own if row.microsoft_mup is not None):.0e}",
        ]
        yield f"| {' | '.join(cells)} |"


def gradient_table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each case and slope of eps."""
    yield "| model | slope of eps | parameters | slope of the first gradient | furthest |"
    yield "|---|---|---|---|---|"
    gradients = [row for row in rows if row.location == GRADIENT]
    for case, eps in dict.fromkeys((row.case, _rounded(row.eps)) for row in gradients):
        own = [row for row in gradients if (row.case, _rounded(row.eps)) == (case, eps)]
        furthest = max(own, key=lambda row: abs(row.mup - (row.eps or 0.0)))
        yield f"| {case} | {eps:+.0f} | {len(own)} | {_range([row.mup for row in own])} | `{furthest.name}` |"


def _rounded(eps: float | None) -> float:
    assert eps is not None
    return round(eps, 3) + 0.0


def _range(slopes: Sequence[float]) -> str:
    low, high = f"{min(slopes):+.2f}", f"{max(slopes):+.2f}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
