"""The gallery of mistakes, docs/mistakes.md: each is made in a small real model, checked, and told.

    python benchmarks/mistake_gallery.py [--only NAME …] [--jobs 2] [-o results/mistakes] [--docs docs]

Shows the mistakes of `mup_megatron.check.mutants` and of the exam (`benchmarks/exam/mistakes`); it has none of its own.
Of each: the loss and the coordinate that is furthest off, right and wrong, and the lines that `check` prints. What
`quick` does not find is looked at by `standard`. Finished checks are lines of `checks.jsonl`, and are not made again
while the code of the check is the same. The page and its pictures are written once no mistake is missing; with
`--only` the rows of these are printed instead.
"""

import argparse
import functools
import io
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import check_exam
import check_rates
from many_runs import KeptRuns, counting, forked_workers

from mup_megatron.check.measure import levels
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.mutants import MUTANTS, Mutant
from mup_megatron.check.mutants.depth import DEPTH
from mup_megatron.check.mutants.experts import EXPERTS
from mup_megatron.check.mutants.forward import FORWARD
from mup_megatron.check.mutants.horizon import HORIZON
from mup_megatron.check.mutants.initial import INITIAL
from mup_megatron.check.mutants.latent import LATENT
from mup_megatron.check.mutants.matrices import MATRICES
from mup_megatron.check.mutants.optimizer import OPTIMIZER
from mup_megatron.check.mutants.rates import RATES
from mup_megatron.check.mutants.rules import RULES

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = "mistakes.md", "mistakes"
WIDTHS = (32, 64, 128)
SEEDS = 2
FIRST_SEED = 1
PANELS = 4
"""Of a group's picture: the mistakes whose coordinates are furthest off."""
SEEN = math.log(1.25)
"""The deviation below which coordinates do not tell a mistake from two seeds."""
ALIKE = 0.02
"""The share by which two losses may differ and still look alike."""
DECIMALS = 3
"""Of a loss, as it is told and compared."""


@dataclass(frozen=True)
class Group:
    """A section of the page."""

    key: str
    """The name of its picture."""
    title: str
    teaches: str
    """What its mistakes have in common, in a few sentences."""
    mutants: Sequence[Mutant] = ()
    exam: Callable[[Any], bool] = lambda _: False
    """Which mistakes of the exam are of it: a predicate of `exam.mistakes.Mistake`."""


def _of_hugging_face(mistake: Any) -> bool:
    return bool(getattr(mistake.right, "base", None))


GROUPS = (
    Group(
        "forward",
        "The forward pass",
        "Multipliers and the scale of attention are in no weight. A wrapper, a rewritten module or a checkpoint that "
        "is loaded elsewhere loses them, or has them twice. The first output that is not what its weights and its "
        "input give is at fault, and whatever comes after it only follows.",
        FORWARD,
    ),
    Group(
        "code",
        "A model's own code",
        "No plan is broken here, and nothing that a recipe could say mends it: the code of the model, or of its loss, "
        "has a power of width of its own. The reference runs the same code, so it is held against what is true of "
        "every right model: sizes before training do not follow width.",
        exam=lambda mistake: mistake.breaks == "transfer",
    ),
    Group(
        "plan",
        "The plan and the recipe",
        "Here the run does faithfully what it is told, and it is told the wrong thing: for another width, by one ratio "
        "for all tensors, without the overrides. Several values are off at once, each by a power of a ratio, and the "
        "first cause is the one that explains all of them.",
        RULES,
    ),
    Group(
        "rates",
        "Learning rates and their schedule",
        "The commonest kind: something between the plan and the step writes learning rates of its own, as a scheduler "
        "that has one peak for all groups. What the groups say is then no evidence, so a check reads the rate from how "
        "far the weights moved.",
        RATES,
    ),
    Group(
        "optimizer",
        "eps, betas, clipping, weight decay",
        "The loss of the first steps hardly shows most of these. They are read from single steps too: a step of Adam "
        "has one η, one ε and one λ that explain every element, and what they leave over is another optimizer.",
        OPTIMIZER,
    ),
    Group(
        "loop",
        "The training loop",
        "The plan is carried out, and what the optimizer is given is not the gradient of the loss: it was summed, "
        "clipped elsewhere, left from before, or does not reach a part of the model.",
        exam=lambda mistake: mistake.where == "training loop" and mistake.breaks == "plan",
    ),
    Group(
        "initial",
        "Initial weights",
        "Found before the first step. What was drawn with another std, another shape, or from the same numbers as its "
        "neighbour trains all the same, and stays in the run until its end.",
        INITIAL,
    ),
    Group(
        "hugging-face",
        "Models of Hugging Face's",
        "What is done to a model after the plan was applied to it, and what a library does by itself: groups of a "
        "trainer, tied or resized tables, a layer that is built or loaded anew.",
        exam=_of_hugging_face,
    ),
    Group(
        "experts",
        "Experts and routers",
        "The fan-in of an expert is its own, not that of all together, a router is a readout, and an expert's "
        "gradients are of its share of the tokens.",
        EXPERTS,
    ),
    Group(
        "latent",
        "Latents",
        "A bottleneck that keeps its size is neither a hidden matrix nor a readout by its name; the sides decide.",
        LATENT,
    ),
    Group(
        "matrices",
        "Muon",
        "An optimizer that steps whole matrices has rules of its own, and leaves tables, gains and biases to Adam: "
        "both can be given the other's.",
        MATRICES,
    ),
    Group(
        "depth",
        "Depth",
        "Under a [rule of depth](depth.md), what writes into the residual stream has one factor, in its multiplier or "
        "in its draw.",
        DEPTH,
    ),
    Group(
        "horizon",
        "Batch and tokens",
        "A recipe that is [moved to another run](horizon.md) is moved once, and all of its values are.",
        HORIZON,
    ),
)


@dataclass(frozen=True)
class Entry:
    """A mistake, and the right set-up in which it is made."""

    name: str
    what: str
    group: str
    model: str
    """A key of `check_rates`'s architectures, or of the exam's subjects."""

    @property
    def of_exam(self) -> bool:
        """True where it is none of the library's, which `--mutant` knows."""
        return self.name not in MUTANTS

    def right(self) -> Any:
        """Returns the set-up without the mistake: an `exam.setups.Setup`."""
        from exam.mistakes import MISTAKES
        from exam.setups import Megatron

        if self.name in MISTAKES:
            return MISTAKES[self.name].right
        architecture = _architectures()[self.model]
        return Megatron(target=architecture.target, recipe=architecture.recipe, widths=WIDTHS)

    def wrong(self) -> Any:
        """Returns the set-up with the mistake."""
        from exam.mistakes import MISTAKES

        if self.name in MISTAKES:
            return MISTAKES[self.name].wrong
        return replace(self.right(), mutant=MUTANTS[self.name])

    def correct_runs(self, setup: Any) -> str:
        """Returns what a set-up is compared with: a mistake in a model's own code is in its reference too."""
        from exam.setups import Modules

        return setup.key if isinstance(setup, Modules) else f"Megatron-Core, {self.model}"


def _architectures() -> Mapping[str, Any]:
    return {name: each for series in check_rates.SERIES.values() for name, each in series.architectures.items()}


def entries() -> list[Entry]:
    """Returns all mistakes in the order of the page, those of the library on the first architecture that can have them.

    Imports Megatron, on a CPU.
    """
    from mup_megatron.training import ranks

    ranks.enable_cpu()
    from exam.mistakes import MISTAKES

    contexts = {name: architecture.context() for name, architecture in _architectures().items()}

    def of(group: Group) -> list[Entry]:
        own = [
            Entry(m.name, m.what, group.key, next(name for name, context in contexts.items() if m.when(context)))
            for m in group.mutants
        ]
        exam = [Entry(m.name, m.what, group.key, m.subject) for m in MISTAKES.values() if group.exam(m)]
        return [*own, *exam]

    return [entry for group in GROUPS for entry in of(group)]


# ---- checking ------------------------------------------------------------------------------------------------------


def compared(entry: Entry, output: Path) -> dict[str, Any]:
    """Returns what a check of a mistake measured and said, with the losses of the right set-up from the same seeds.

    Args:
        entry: the mistake.
        output: the folder of finished checks; those that it has are not made again.
    """
    check = _found(entry, output)
    if "losses" not in check:
        return check
    return {**check, "losses": {**check["losses"], "right": _found_right(entry, output)["losses"]}}


def compared_all(alike: Sequence[Entry], output: Path) -> None:
    """Checks mistakes that are compared with the same correct runs, in this process."""
    for entry in alike:
        compared(entry, output)


_code = functools.cache(check_rates.code_of_check)


def _key(entry: Entry) -> list[Any]:
    return [_code(), entry.name, entry.model, SEEDS, list(WIDTHS)]


def _key_of_right(entry: Entry) -> list[Any]:
    return [_code(), "right", entry.correct_runs(entry.right()), SEEDS, list(WIDTHS)]


def _found(entry: Entry, output: Path) -> dict[str, Any]:
    kept = KeptRuns(output / "checks.jsonl")
    return kept.found(_key(entry)) or kept.add(_key(entry), **_checked(entry, output))


def _found_right(entry: Entry, output: Path) -> dict[str, Any]:
    kept = KeptRuns(output / "checks.jsonl")
    row = kept.found(_key_of_right(entry))
    if row is None:
        verdict = _verdict(entry.right(), check_exam.LEVELS[0], output)
        sizes = [[key.quantity.value, key.name, key.step, values] for key, values in _sizes(verdict.subject).items()]
        told = {"outcome": verdict.outcome.value, "losses": _mean_losses(verdict), "sizes": sizes}
        row = kept.add(_key_of_right(entry), **told)
    return row


def _verdict(setup: Any, level: str, output: Path) -> Any:
    from exam.setups import Extent

    extent = Extent(level=level, seed=FIRST_SEED, seeds=SEEDS, processes=1)
    return check_exam.verdict_on(setup, extent, output / "references")


def _attempts(entry: Entry) -> Iterator[tuple[str, Any]]:
    """Yields levels and set-ups with the mistake, until one is told to fail: the last has the widths that a check has
    by default, where it is of a model file.
    """
    from exam.setups import Megatron

    for level in check_exam.LEVELS:
        yield level, entry.wrong()
    if isinstance(entry.wrong(), Megatron):
        yield check_exam.LEVELS[0], replace(entry.wrong(), widths=None)


def _checked(entry: Entry, output: Path) -> dict[str, Any]:
    from mup_megatron.check.verdict.verdict import CheckOutcome
    from mup_megatron.errors import InputError

    for level, setup in _attempts(entry):
        try:
            verdict = _verdict(setup, level, output)
        except InputError as error:
            return {"name": entry.name, "level": level, "outcome": "refused", "told": [str(error)]}
        if verdict.outcome is CheckOutcome.FAIL:
            break
    closest = _closest(verdict)
    right = _sizes(verdict.reference)
    if entry.correct_runs(entry.wrong()) != entry.correct_runs(entry.right()):
        right = _read_sizes(_found_right(entry, output)["sizes"])
    return {
        "name": entry.name,
        "level": level,
        "outcome": verdict.outcome.value,
        "widths": list(verdict.widths),
        "told": _told(verdict, entry.model),
        "quantity": None if closest is None else closest.shown.key.quantity.value,
        "losses": {"wrong": _mean_losses(verdict)},
        "coordinate": _furthest(_sizes(verdict.subject), right, verdict.widths),
    }


def _told(verdict: Any, model: str) -> list[str]:
    """Returns lines that `check` prints: the first, the finding closest to what is at fault, and the first cause."""
    from mup_megatron.check.report.report import sentence, text

    lines = [line.strip() for line in text(verdict, title=model, files=()).splitlines()]
    closest = _closest(verdict)
    others = [line for section in _failed_sections(verdict) for line in section.lines]
    causes = [line for line in lines if line.startswith("1. ")]
    chosen = [lines[0], *(others[:1] if closest is None else [sentence(closest)]), *causes[:1]]
    assert set(chosen) <= set(lines), chosen
    return chosen


def _failed_sections(verdict: Any) -> list[Any]:
    return [section for section in verdict.sections if section.outcome == "fail"]


def _closest(verdict: Any) -> Any:
    """Returns the told finding that is closest to what is at fault: a `report.Alike`; None if there is no finding."""
    from mup_megatron.check.report.report import TOLD, alike

    groups = [group for section in _failed_sections(verdict) for group in alike(section.findings)[:TOLD]]
    return min(groups, key=lambda group: _distance(group, verdict.culprit or ""), default=None)


def _distance(group: Any, culprit: str) -> tuple[bool, int]:
    """Returns how far a finding is from the cause: of something else, and how late in the order of consequences."""
    from mup_megatron.check.verdict.comparison import ORDER

    names = {finding.key.name.removesuffix(".weight") for finding in group.findings}
    quantity = group.shown.key.quantity
    return culprit.removesuffix(".weight") not in names, ORDER.index(quantity) if quantity in ORDER else -1


def _mean_losses(verdict: Any) -> list[float]:
    """Returns the loss of each step at the widest of the usual widths here, seeds averaged."""
    runs = [run.losses for run in verdict.subject.at(WIDTHS[-1])]
    return [math.fsum(of_step) / len(of_step) for of_step in zip(*runs, strict=True)]


def _sizes(runs: Any) -> dict[Any, list[float]]:
    """Returns the sizes of outputs and how far training moved them, at each width; without what is 0."""
    from mup_megatron.check.measure.measurements import COORDINATES

    keys = [key for key in sorted(runs.keys()) if key.quantity in COORDINATES]
    sizes = {key: [runs.typical(key, width) for width in runs.widths] for key in keys}
    return {key: of_key for key, of_key in sizes.items() if all(of_key)}


def _read_sizes(rows: Sequence[Any]) -> dict[Any, list[float]]:
    from mup_megatron.check.measure.measurements import Key, Quantity

    return {Key(Quantity(quantity), name, step): sizes for quantity, name, step, sizes in rows}


def _furthest(
    wrong: Mapping[Any, Sequence[float]], right: Mapping[Any, Sequence[float]], widths: Sequence[int]
) -> dict[str, Any] | None:
    """Returns the coordinate that is furthest off, over width; None if all look right."""
    most, chosen = SEEN, None
    for key in sorted(wrong.keys() & right.keys()):
        off = max(abs(math.log(w / r)) for w, r in zip(wrong[key], right[key], strict=True))
        if off > most:
            most, chosen = off, key
    if chosen is None:
        return None
    sides = {"wrong": list(wrong[chosen]), "right": list(right[chosen])}
    return {"widths": list(widths), "name": chosen.name, "step": chosen.step, "off": most, **sides}


# ---- telling -------------------------------------------------------------------------------------------------------


def row(entry: Entry, check: Mapping[str, Any]) -> str:
    """Returns the row of a mistake.

    Args:
        entry: the mistake.
        check: the line of its check.
    """
    shown = [_cell(f"`{line}`") for line in check["told"]]
    if check["level"] != check_exam.LEVELS[0]:
        shown.insert(0, f"with `--level {check['level']}`:")
    if _is_wider(check):
        shown.insert(0, f"with widths {', '.join(map(str, check['widths']))}:")
    mark = " (exam)" if entry.of_exam else ""
    return f"| **`{entry.name}`**{mark}<br>{_cell(entry.what)} | {_run(check)} | {'<br>'.join(shown)} |"


def _is_wider(check: Mapping[str, Any]) -> bool:
    return check.get("widths", [*WIDTHS]) != [*WIDTHS]


def _final_losses(check: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the last loss of a mistake and of the right set-up, as they are told."""
    wrong, right = (round(check["losses"][side][-1], DECIMALS) for side in ("wrong", "right"))
    return wrong, right


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def _run(check: Mapping[str, Any]) -> str:
    if check["outcome"] == "refused":
        return "no run: refused"
    (wrong, right), coordinate = _final_losses(check), check["coordinate"]
    said = [f"loss {wrong:.{DECIMALS}f}, right {right:.{DECIMALS}f}"]
    if coordinate is not None:
        what = "is" if coordinate["step"] == 0 else f"moved in {coordinate['step']} steps by"
        ends = {side: " → ".join(f"{coordinate[side][i]:.2g}" for i in (0, -1)) for side in ("wrong", "right")}
        said.append(f"`{coordinate['name']}` {what} {ends['wrong']}, right {ends['right']}")
    return "<br>".join(said)


def page(every: Sequence[Entry], checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the page.

    Args:
        every: all mistakes, in its order.
        checks: name → the line of its check.
    """
    sections = [section(group, [entry for entry in every if entry.group == group.key], checks) for group in GROUPS]
    head = _HEAD.format(**_counts(every, checks)).split("\n\n")
    return "\n\n".join([*map(_wrapped, head), *sections]) + "\n"


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 125, break_long_words=False, break_on_hyphens=False)


_HEAD = """# A gallery of mistakes

{number} mistakes that somebody can make, each made in a small real model, with what its run looked like and what
`mup-megatron check` says. `python benchmarks/mistake_gallery.py` makes them on one CPU and writes this page. They are
the library's own ([check](check.md#mutants)), and, marked as such, of the [exam's](results/README.md) those in a
model's own code, in the training loop and around Hugging Face's models: the rest of the exam are of the same kinds.

None of them crashes. Of the {ran} that run at all, {alike} end within {percent} % of the loss that the width {wide} has
without the mistake, from the same seeds, and {below} end below it: **the loss at one width does not show a mistake; how
things follow width does.** Of {unseen} no output is as much as a quarter off in training at any width: a plot of
coordinates would not show them either. They are found in what weights, gradients or steps say{evaluated}.

The first column says what was done. The second has, with and without it, the loss at width {wide} after the steps of
the check, and of all outputs the one that is furthest off, at the narrowest → the widest width, which are {narrow} and
{wide} where the row names no others: its size (RMS) before training, or how far so many steps moved it. The third has
lines of what `check` prints: the verdict with what is at fault, the finding that is closest to it, and the first cause
with the share of the deviation that it explains.

These checks are smaller than one is by default: {seeds} seeds and the {number_of_widths} widths {widths}, against
{usual_seeds} seeds and {usual_widths} widths. {missed}

A check uses [values at which mistakes act](check.md#how-it-works), so its losses are no examples of good runs. Pictures
show up to {panels} mistakes of their group, those that are furthest off and of one output no two, red as it ran, grey
as is right. To see one on a model of your own: `mup-megatron check target.yaml --recipe R --mutant NAME`, with a name
that is not marked. One of the exam runs in its own model alone: `python benchmarks/check_exam.py --part mistakes --only
NAME`."""


def _counts(every: Sequence[Entry], checks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    ran = [checks[entry.name] for entry in every if checks[entry.name]["outcome"] != "refused"]
    losses = [_final_losses(check) for check in ran]
    unseen = [check for check in ran if check["coordinate"] is None]
    evaluated = [check["name"] for check in unseen if check["quantity"] == Quantity.EVALUATION.value]
    return {
        "number": len(every),
        "ran": len(ran),
        "alike": sum(abs(wrong / right - 1) < ALIKE for wrong, right in losses),
        "below": sum(wrong < right for wrong, right in losses),
        "unseen": len(unseen),
        "evaluated": f", {_listed(evaluated)} in outputs under eval()" if evaluated else "",
        "seeds": SEEDS,
        "usual_seeds": levels.SEEDS,
        "widths": ", ".join(map(str, WIDTHS)),
        "number_of_widths": len(WIDTHS),
        "usual_widths": levels.WIDTHS,
        "narrow": WIDTHS[0],
        "wide": WIDTHS[-1],
        "panels": PANELS,
        "percent": f"{100 * ALIKE:g}",
        "missed": _missed(every, checks),
    }


def _missed(every: Sequence[Entry], checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns sentences on the mistakes that the first attempt has not found."""
    failed = [checks[entry.name] for entry in every if _failed(checks[entry.name])]
    of = {
        "It took the level `standard` to find {}.": [c for c in failed if c["level"] != check_exam.LEVELS[0]],
        "It took the widths that a check has by default to find {}.": [c for c in failed if _is_wider(c)],
        "Not found at all here: {}; the exam has how often they are.": [
            checks[entry.name] for entry in every if checks[entry.name]["outcome"] not in ("fail", "refused")
        ],
    }
    return " ".join(told.format(_listed([c["name"] for c in found])) for told, found in of.items() if found)


def _failed(check: Mapping[str, Any]) -> bool:
    return bool(check["outcome"] == "fail")


def _listed(names: Sequence[str]) -> str:
    *most, last = (f"`{name}`" for name in names)
    return f"{', '.join(most)} and {last}" if most else last


def section(group: Group, of_group: Sequence[Entry], checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a section of the page: what is to be learned, the picture, and a row for each mistake."""
    lines = [f"## {group.title}", "", _wrapped(group.teaches), ""]
    if shown(of_group, checks):
        lines += [f"![{group.title}]({PICTURES}/{group.key}.png)", ""]
    lines += ["| what was done | the run | what `check` says |", "|---|---|---|"]
    return "\n".join([*lines, *(row(entry, checks[entry.name]) for entry in of_group)])


def shown(of_group: Sequence[Entry], checks: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the checks of a group that its picture shows: those furthest off, and of one output no two."""
    seen = [check for entry in of_group if (check := checks[entry.name]).get("coordinate") is not None]
    by_output = {check["coordinate"]["name"]: check for check in sorted(seen, key=_off)}
    return sorted(by_output.values(), key=_off, reverse=True)[:PANELS]


def _off(check: Mapping[str, Any]) -> float:
    return float(check["coordinate"]["off"])


def picture(of_picture: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns a PNG: a panel for each check, of its coordinate over width, wrong and right."""
    import matplotlib.figure
    from matplotlib.ticker import LogLocator

    figure = matplotlib.figure.Figure(figsize=(3.1 * PANELS, 2.7), layout="constrained")
    panels = figure.subplots(1, PANELS, squeeze=False)[0]
    for axes in panels[len(of_picture) :]:
        axes.set_axis_off()
    for axes, check in zip(panels, of_picture, strict=False):
        coordinate = check["coordinate"]
        for side, color in (("right", "#8a929b"), ("wrong", "#c0271c")):
            axes.plot(coordinate["widths"], coordinate[side], "o-", color=color, label=side)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(coordinate["widths"], [str(width) for width in coordinate["widths"]])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(check["name"], fontsize=9, fontweight="bold")
        what = "before training" if coordinate["step"] == 0 else f"moved in {coordinate['step']} steps"
        axes.set_xlabel(f"{_short(coordinate['name'])}\n{what}", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"…{name[-33:]}"


def _make(todo: Sequence[Entry], output: Path, jobs: int) -> None:
    """Makes checks in so many processes, those that share correct runs in one."""
    by_correct_runs: dict[str, list[Entry]] = {}
    for entry in todo:
        by_correct_runs.setdefault(entry.correct_runs(entry.wrong()), []).append(entry)
    with counting("checks", len(todo)) as advance, forked_workers(jobs, output / "checks.log") as pool:
        longest_first = sorted(by_correct_runs.values(), key=len, reverse=True)
        pending = {pool.submit(compared_all, alike, output): len(alike) for alike in longest_first}
        for future, number in pending.items():
            future.result()
            advance(number)


def main(given: Sequence[str] | None = None) -> None:
    """Makes the checks that are missing, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="print the rows of these mistakes")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/mistakes"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is written")
    arguments = parser.parse_args(given)
    every = entries()
    if arguments.only:
        unknown = sorted({*arguments.only} - {entry.name for entry in every})
        if unknown:
            parser.error(f"--only: no such mistake: {', '.join(unknown)}. docs/{PAGE} has all names")
        every = [entry for entry in every if entry.name in arguments.only]
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    kept = KeptRuns(output / "checks.jsonl")
    todo = [entry for entry in every if None in (kept.found(_key(entry)), kept.found(_key_of_right(entry)))]
    if todo:
        _make(todo, output, arguments.jobs)
    checks = {entry.name: compared(entry, output) for entry in every}
    if arguments.only:
        print("\n".join(row(entry, checks[entry.name]) for entry in every))
        return
    (arguments.docs / PICTURES).mkdir(parents=True, exist_ok=True)
    for group in GROUPS:
        of_picture = shown([entry for entry in every if entry.group == group.key], checks)
        if of_picture:
            (arguments.docs / PICTURES / f"{group.key}.png").write_bytes(picture(of_picture))
    (arguments.docs / PAGE).write_text(page(every, checks), encoding="utf-8")


if __name__ == "__main__":
    main()
