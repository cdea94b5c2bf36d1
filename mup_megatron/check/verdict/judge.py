"""From the measurements of subject, reference and control to a verdict. Knows no framework: who trains is passed in."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mup_megatron.architectures.measured import Measured
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import COORDINATES, DRAWS, Measurements, Quantity, RunProtocol
from mup_megatron.check.verdict.bounds import BEFORE, MOVED, Known, out_of_bounds
from mup_megatron.check.verdict.causes import TOLD, causes
from mup_megatron.check.verdict.causes.bounds import of_bounds
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.comparison import (
    Comparison,
    Finding,
    Mismatch,
    compare,
    findings,
    only_rounding,
    without_gradient,
)
from mup_megatron.check.verdict.verdict import CheckOutcome, Section, Verdict
from mup_megatron.check.verdict.wider import wider_is_better
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

Measure = Callable[[RunProtocol], Measurements]
Later = Callable[[set[str], set[str]], tuple[Section, Cause | None]]
"""Parameters of which nothing can be read, and those that get no gradient in the correct reference → what later steps
show, and why."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The three sides of a check, as functions that measure them."""

    subject: Measure
    reference: Measure
    control: Measure


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The plans and shapes in which causes are looked for."""

    recipe: Recipe
    """Of the check."""
    plans: Mapping[int, Plan]
    """Width → the right plan."""
    models: Mapping[int, ModelFile] | None = None
    """Width → its model file, of an architecture."""
    known: Callable[[], Known] | None = None
    """For bounds, asked after the subject has run; without, what a plan says."""

    @property
    def heads_grow(self) -> bool:
        """True where heads are larger in wider models, as model files say."""
        return len({model.head_size for model in (self.models or {}).values()}) > 1

    @property
    def measured(self) -> tuple[Measured, ...]:
        """The modules that the architecture has measured; none of a torch module."""
        model = None if self.models is None else next(iter(self.models.values()))
        return () if model is None else tuple(architecture_of(model).measured(model))


def judge(
    sides: Sides,
    facts: Expectation,
    *,
    level: Level,
    fingerprint: str,
    extra: Sequence[Callable[[], Section]] = (),
    later: Later | None = None,
    remarks: Sequence[str] = (),
) -> Verdict:
    """Measures and compares.

    Args:
        sides: train and measure, when asked.
        facts: for causes.
        level: how much.
        fingerprint: the recipe's as its user knows it.
        extra: further checks of the longer levels.
        later: of a quick check, what a run shows that goes on.
        remarks: to be told with the verdict.
    """
    begun = time.monotonic()
    subject, reference = sides.subject(levels.EARLY), sides.reference(levels.EARLY)
    control = sides.control(levels.EARLY)
    comparison, control_comparison = compare(subject, reference), compare(control, reference)
    trouble = _trouble(subject, reference)
    of_later: tuple[Cause, ...] = ()
    late: Comparison = {}
    if trouble is not None:
        sections = [trouble]
    else:
        sections = [
            _coordinates(comparison, control_comparison, subject, reference),
            _gradients(comparison, subject, reference),
        ]
        if level is not Level.QUICK:
            of_late, late = _late(sides)
            sections += of_late
            sections += [more() for more in extra]
        elif later is not None:
            section, cause = later(only_rounding(reference), without_gradient(reference.runs))
            sections.append(section)
            of_later = () if cause is None or findings(comparison) else (cause,)
    known = Known(plans=facts.plans, heads_grow=facts.heads_grow) if facts.known is None else facts.known()
    bounds = _bounds(subject, reference, known)
    if trouble is None or (bounds.findings and trouble.outcome is CheckOutcome.NO_VERDICT):
        sections.append(bounds)
    outcome = _overall([section.outcome for section in sections])
    likely: tuple[Cause, ...] = ()
    if outcome is CheckOutcome.FAIL and trouble is None:
        likely = _causes(comparison, late, facts)
    likely = (*likely, *of_later)
    if sections[-1] is bounds:
        have_size = all(c.off is None for key, c in comparison.items() if key.quantity is Quantity.INITIAL)
        drawn = [f for f in bounds.findings if f.key.quantity in DRAWS and have_size]
        # Draws come before all that is computed from them.
        likely = (
            *of_bounds(drawn, known.copying),
            *likely,
            *of_bounds([f for f in bounds.findings if f not in drawn]),
        )[:TOLD]
    return Verdict(
        outcome=outcome,
        level=level,
        fingerprint=fingerprint,
        culprit=_culprit(likely, sections) if outcome is CheckOutcome.FAIL else None,
        causes=likely,
        sections=tuple(sections),
        remarks=tuple(remarks),
        widths=tuple(subject.widths),
        seeds=len(subject.at(subject.widths[0])),
        seconds=time.monotonic() - begun,
        subject=subject,
        reference=reference,
        control=control,
        comparison=comparison,
        control_comparison=control_comparison,
        measured=facts.measured,
        entries=next(iter(facts.plans.values())).by_name,
    )


def _overall(outcomes: Sequence[CheckOutcome]) -> CheckOutcome:
    for outcome in (CheckOutcome.FAIL, CheckOutcome.NO_VERDICT):
        if outcome in outcomes:
            return outcome
    return CheckOutcome.PASS


def _culprit(likely: Sequence[Cause], sections: Sequence[Section]) -> str:
    if likely:
        return likely[0].culprit
    found = [finding for section in sections for finding in section.findings]
    if found:
        return found[0].key.name
    failed = next(section for section in sections if section.outcome is CheckOutcome.FAIL)
    return failed.lines[0].partition(":")[0] if failed.lines else failed.name


def _causes(comparison: Comparison, late: Comparison, facts: Expectation) -> tuple[Cause, ...]:
    """Returns the causes of what is off in the short runs, or of what the long ones alone have found."""
    if findings(comparison):
        return causes(comparison, facts.plans, facts.recipe, facts.models)
    of_late = causes(late, facts.plans, facts.recipe, facts.models)
    later = f"Runs of {levels.EARLY.steps} steps are right: it begins later."
    return tuple(replace(cause, sentence=f"{cause.sentence} {later}") for cause in of_late)


# ---- runs of which nothing can be concluded ------------------------------------------------------------------------


def _trouble(subject: Measurements, reference: Measurements) -> Section | None:
    """Returns what makes a comparison pointless."""
    name = "training"
    if subject.problems:
        random = [problem for problem in subject.problems if "not deterministic" in problem]
        if random:
            remedy = "Turn off what is random in it for the check: differences would be its own."
            return Section(name=name, outcome=CheckOutcome.NO_VERDICT, lines=(random[0], remedy))
        if reference.problems:
            remedy = "The correct reference diverged too: lower the recipe's lr or init_method_std."
            return Section(name=name, outcome=CheckOutcome.NO_VERDICT, lines=(subject.problems[0], remedy))
        where = next(run.problem for run in subject.runs if run.problem is not None)
        lines = (where, f"Seen at {len(subject.problems)} of {len(subject.runs)} runs. The correct reference trains.")
        return Section(name=name, outcome=CheckOutcome.FAIL, lines=lines)
    if reference.problems:
        remedy = "The correct reference diverged: lower the recipe's lr or init_method_std."
        return Section(name=name, outcome=CheckOutcome.NO_VERDICT, lines=(reference.problems[0], remedy))
    if not all(_moves(reference, width) for width in reference.widths):
        remedy = "The correct reference does not move within the check: raise the recipe's lr."
        return Section(name=name, outcome=CheckOutcome.NO_VERDICT, lines=(remedy,))
    still = [run for run in subject.runs if not _moves(subject, run.width)]
    if still:
        line = f"loss: the model does not learn at width {still[0].width}, and the correct reference does."
        return Section(
            name=name,
            outcome=CheckOutcome.FAIL,
            lines=(line, "No weight moves: look for frozen parameters, an optimizer without them, a rate of 0."),
        )
    return None


def _moves(measured: Measurements, width: int) -> bool:
    """Returns whether any activation has changed."""
    updates = [v for run in measured.at(width) for k, v in run.values.items() if k.quantity is Quantity.UPDATE]
    return any(value > 0 for value in updates)


# ---- what holds of every right model --------------------------------------------------------------------------------


def _bounds(subject: Measurements, reference: Measurements, known: Known) -> Section:
    found = out_of_bounds(subject, reference, known)
    of = {quantity: len({k.name for k in subject.keys() if k.quantity is quantity}) for quantity in Quantity}  # noqa: SIM118
    lines = []
    if known.shares_code:
        lines.append(
            f"slopes over width of {of[Quantity.ACTIVATION] + of[Quantity.INSIDE]} values before training (from "
            f"{BEFORE[0]:+g} to {BEFORE[1]:+g} but at readouts), and of how far training moves {of[Quantity.UPDATE]} "
            f"(from {MOVED[0]:+g} to {MOVED[1]:+g})"
        )
    if of[Quantity.EVALUATION]:
        lines.append(f"{of[Quantity.EVALUATION]} activations in evaluation mode, against training's")
    if of[Quantity.POSITION]:
        lines.append("what positions make of queries")
    if of[Quantity.MEAN]:
        lines.append(f"{of[Quantity.MEAN]} draws: mean, shape, independence")
    return _section("bounds", found, lines)


# ---- the checks ----------------------------------------------------------------------------------------------------


def _coordinates(
    comparison: Comparison, control: Comparison, subject: Measurements, reference: Measurements
) -> Section:
    found = [finding for finding in findings(comparison) if finding.key.quantity in COORDINATES]
    missing = sorted({k.name for k in reference.keys() - subject.keys() if k.quantity is Quantity.UPDATE})
    told = [f for f in findings(control) if f.key.quantity is Quantity.UPDATE and f.kind is Mismatch.SLOPE]
    looked = [c for key, c in comparison.items() if key.quantity is Quantity.UPDATE]
    lines = []
    if looked:
        worst = max(looked, key=lambda c: abs(c.slope))
        lines.append(
            f"{len(looked)} updates of {len({c.key.name for c in looked})} activations; furthest from the reference: "
            f"{worst.key.name} after {worst.key.step} steps, slope {worst.subject}, expected {worst.reference}"
        )
    if missing:
        lines.append(f"Not seen in the model: {_some(missing)}")
    if told:
        furthest = max(told, key=lambda f: f.compared.slope)
        lines.append(
            f"Standard parametrization is told apart at {len(told)} of them: {furthest.key.name}, slope "
            f"{furthest.compared.subject}"
        )
    elif not found:
        # More seeds would be the subject's alone, and it is the two others that are too close.
        lines.append(
            "Standard parametrization of the same shape cannot be told from the reference over these widths, so this "
            f"is no pass: add a model of width {2 * subject.widths[-1]} to them (--widths)."
        )
        return Section(name="coordinates", outcome=CheckOutcome.NO_VERDICT, lines=tuple(lines))
    return _section("coordinates", found, lines)


def _gradients(comparison: Comparison, subject: Measurements, reference: Measurements) -> Section:
    found = [finding for finding in findings(comparison) if finding.key.quantity not in COORDINATES]
    missing = sorted(_parameters(reference) - _parameters(subject))
    if missing:
        line = (
            f"{_some(missing)}: in the plan and the reference, and not seen in the model. Give its parameters the "
            "names that the plan has."
        )
        return Section(
            name="gradients and updates", outcome=CheckOutcome.NO_VERDICT, lines=(line,), findings=tuple(found)
        )
    lines = []
    untrained = without_gradient(reference.runs)
    for quantity in (Quantity.LEARNING_RATE, Quantity.EPS, Quantity.WEIGHT_DECAY):
        of_it = [c for key, c in comparison.items() if key.quantity is quantity and key.name not in untrained]
        if of_it:
            names = {c.key.name for c in of_it}
            worst = max(of_it, key=lambda c: max(abs(d) for d in c.deviations.values()))
            by = max(abs(math.expm1(d)) for d in worst.deviations.values())
            lines.append(f"{quantity} of {len(names)} parameters, as they moved: within {by:.2g} of what is expected")
    if rounding := sorted(only_rounding(reference)):
        lines.append(f"Not of {_some(rounding)}: the right gradient is 0, and what is there is rounding")
    if untrained:
        lines.append(f"Not of {_some(sorted(untrained))}: no gradient, in the correct reference either")
    if not lines:
        lines.append(
            "Learning rates, eps and weight decay were not read: an optimizer without a replay, or gradients of which "
            "each rank has a part alone (the distributed optimizer's)"
        )
    return _section("gradients and updates", found, lines if not found else [])


def _parameters(measured: Measurements) -> set[str]:
    return {key.name for key in measured.keys() if key.quantity is Quantity.INITIAL}  # noqa: SIM118


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"


def _late(sides: Sides) -> tuple[list[Section], Comparison]:
    """Returns the sections of the long runs, and their comparison; none of runs that cannot be compared."""
    subject, reference = sides.subject(levels.LATE), sides.reference(levels.LATE)
    name = f"over {levels.LATE.steps} steps"
    trouble = _trouble(subject, reference)
    if trouble is not None:
        return [Section(name="late steps", outcome=trouble.outcome, lines=trouble.lines)], {}
    comparison = compare(subject, reference)
    found = findings(comparison)
    looked = len({key.name for key in comparison})
    late = _section("late steps", found, [f"{looked} parameters and activations {name}, to the floor of the schedule"])
    result = wider_is_better(subject, levels.LATE.recorded)
    outcome = CheckOutcome.PASS if result.holds else CheckOutcome.FAIL
    return [late, Section(name="wider is better", outcome=outcome, lines=result.lines, rows=result.rows)], comparison


def _section(name: str, found: Sequence[Finding], lines: Sequence[str]) -> Section:
    outcome = CheckOutcome.FAIL if found else CheckOutcome.PASS
    return Section(name=name, outcome=outcome, lines=tuple(lines), findings=tuple(found))
