"""Every layer of a target, once and without training: what starts each parameter, and which group it is in.

The models that are trained have a few layers. What a plan says of depth, and what only one layer of many has wrong, is
seen in one model of the target's whole depth, built as all others are: its names, its initial weights and its
optimizer's groups are compared with the plan directly.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mup_megatron.check.measure.measurements import Grouped
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.verdict import CheckOutcome, Section, Verdict
from mup_megatron.theory import Plan, PlanEntry

if TYPE_CHECKING:
    from torch import Tensor


NAME = "every layer"
CERTAIN = 6.0
"""Standard errors of a std that are not called a mistake, with so many tensors."""
LEAST = 0.005
"""Relative, likewise."""
EXACT = 1e-4
"""Relative: what is set and not drawn."""
TOLD = 5


def at_depth(
    plan: Plan,
    width: int,
    parameters: "Iterable[tuple[str, Tensor]]",
    groups: Mapping[str, Grouped],
    gathered: Callable[[Any], list[Any]],
) -> Section:
    """Compares a model that was just built with its plan. Collective.

    Args:
        plan: the right one.
        width: of the model.
        parameters: by the plan's names, this rank's part of them.
        groups: likewise; what is missing is not compared.
        gathered: the values of all ranks.
    """
    squares = {name: (p.detach().double().square().sum().item(), p.numel()) for name, p in parameters}
    sums: dict[str, tuple[float, float]] = {}
    held: dict[str, set[Grouped]] = {}
    for of_rank, groups_of_rank in gathered((squares, dict(groups))):
        for name, (square, count) in of_rank.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + square, before[1] + count)
        for name, values in groups_of_rank.items():
            held.setdefault(name, set()).add(values)
    wrong = [
        problem
        for entry in plan.entries
        for problem in _wrong(entry, sums.get(entry.name), held.get(entry.name, set()))
    ]
    if not wrong:
        line = (
            f"{len(plan.entries)} parameters of {plan.num_layers} layers, {width} wide: names, initial weights"
            f"{' and groups of the optimizer' if held else ''} are the plan's"
        )
        return Section(name=NAME, outcome=CheckOutcome.PASS, lines=(line,))
    more = [f"… and {len(wrong) - TOLD} more"] if len(wrong) > TOLD else []
    return Section(name=NAME, outcome=CheckOutcome.FAIL, lines=(*wrong[:TOLD], *more))


def _wrong(entry: PlanEntry, sums: tuple[float, float] | None, groups: set[Grouped]) -> Iterable[str]:
    if sums is None:
        yield f"{entry.name}: in the plan, and not in the model"
        return
    square, count = sums
    found = math.sqrt(square / count) if count else 0.0
    if entry.init_value is not None:
        if not math.isclose(found, abs(entry.init_value), rel_tol=EXACT, abs_tol=1e-7):
            yield f"{entry.name}: starts at {found:.4g} (root mean square), expected {entry.init_value:.4g}"
    elif entry.init_std is not None:
        allowed = CERTAIN / math.sqrt(2 * max(count, 1)) + LEAST
        if not abs(found - entry.init_std) <= allowed * entry.init_std:
            yield f"{entry.name}: initial weight, std {found:.4g}, expected {entry.init_std:.4g}"
    for group in groups:
        expected = {"lr": entry.lr, "min_lr": entry.min_lr, "eps": entry.eps, "weight_decay": entry.weight_decay}
        for what, value in expected.items():
            own = getattr(group, what)
            if own is not None and value is not None and not math.isclose(own, value, rel_tol=EXACT, abs_tol=1e-30):
                yield f"{entry.name}: {what} {own:.4g} in the optimizer, expected {value:.4g}"


def with_depth(verdict: Verdict, section: Section) -> Verdict:
    """Returns the verdict with this section; where nothing else failed, it says what is at fault."""
    sections = (*verdict.sections, section)
    if section.outcome is CheckOutcome.PASS or verdict.outcome is CheckOutcome.FAIL:
        return replace(verdict, sections=sections)
    name, _, what = section.lines[0].partition(": ")
    cause = Cause(
        name="layer-differs",
        sentence=f"{name}: {what}, in the model of full depth alone. Look for what treats this layer by itself.",
        culprit=name,
        share=1.0,
    )
    return replace(verdict, outcome=CheckOutcome.FAIL, culprit=name, causes=(cause,), sections=sections)
