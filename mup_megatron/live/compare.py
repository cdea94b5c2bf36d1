"""Compares what is live with the plan, in plain values: parameters, groups, hooks, attention scale. Changes nothing.

How values are got at is each adapter's affair, as is the remedy where it depends on the framework.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mup_megatron.live.hooks import Hooks
from mup_megatron.live.problems import Problem, number
from mup_megatron.theory import Plan, PlanEntry, Property, Site
from mup_megatron.theory.matching import family_of

CLOSE = 1e-6
"""Relative: live values are the plan's very numbers, at worst through a tensor of single precision."""


def close(found: float | None, expected: float | None) -> bool:
    """Returns whether a live value is the planned one; None, for what is not there, is close to itself alone."""
    if found is None or expected is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=CLOSE)


# ---- parameters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Remedies:
    """Remedies for parameters that are not the plan's, in a framework's terms: whole sentences."""

    unknown: str
    """Where the plan has no such parameter."""
    missing: str
    """Where the model has none."""
    shape: str


def parameter_problems(
    held: Mapping[str, tuple[int, ...]],
    plan: Plan,
    remedies: Remedies,
    *,
    everywhere: Collection[str] | None = None,
    tensor_parallel: int = 1,
    own_names: Mapping[str, str] | None = None,
) -> list[str]:
    """Returns where model and plan do not have the same parameters and shapes, in sentences.

    Args:
        held: {global name: global shape} of what this rank holds.
        plan: for the whole model.
        remedies: what to do.
        everywhere: the names that all ranks hold; those of `held` where there is one.
        tensor_parallel: by which a vocabulary is padded further.
        own_names: {global name: what the framework calls it}, where that differs.
    """
    own = own_names or {}
    problems = [
        f"{own.get(name, name)}: the model has this parameter, the plan has not. {remedies.unknown}"
        for name in held
        if name not in plan.by_name
    ]
    everywhere = held if everywhere is None else everywhere
    # What only some versions have, all of its layers have or none.
    kinds = {family_of(name) for name in everywhere}
    problems += [
        f"{entry.name}: the plan has this parameter, the model has not. {remedies.missing}"
        for entry in plan.entries
        if entry.name not in everywhere
        and not (Property.OPTIONAL in entry.properties and family_of(entry.name) not in kinds)
    ]
    for name, shape in held.items():
        if name in plan.by_name and shape != (expected := padded_shape(plan[name], tensor_parallel)):
            both = f"{own[name]} ({name})" if own.get(name, name) != name else name
            problems.append(f"{both}: the model's shape is {shape}, the plan's {expected}. {remedies.shape}")
    return problems


def site_problems(modules: Collection[str], sites: Iterable[Site], remedy: str) -> list[str]:
    """Returns which of the plan's factors have nowhere to act, in sentences.

    Args:
        modules: the global names of what all ranks hold, as far as sites have them.
        sites: the plan's.
        remedy: what to do, in a sentence.
    """
    return [
        f"{site.module}: a factor has to act here ({site.reason}), and the model has no such module. {remedy}"
        for site in sites
        if site.changes and site.module not in modules
    ]


def padded_shape(entry: PlanEntry, tensor_parallel: int = 1) -> tuple[int, ...]:
    """Returns a parameter's global shape as it is built at a tensor parallelism."""
    if entry.padded_to is None:
        return entry.shape
    multiple = entry.padded_to * tensor_parallel
    return (-(-entry.shape[0] // multiple) * multiple, *entry.shape[1:])


# ---- an optimizer's groups -----------------------------------------------------------------------------------------

Cause = Callable[[str, float | None], str]
"""From a quantity and the value that was found to the sentence that says why, and what to do."""


def value_problems(
    name: str, planned: Mapping[str, float | None], live: Mapping[str, float | None], cause: Cause | str
) -> Iterator[Problem]:
    """Yields where values that an optimizer or scheduler holds are not the planned ones.

    Args:
        name: of the parameter or group; "schedule" for what belongs to none.
        planned: quantity → value; None for what the plan's optimizer has not.
        live: likewise; None for what is not there.
        cause: of all that is wrong, or what says it for each.
    """
    for quantity, expected in planned.items():
        found = live[quantity]
        if expected is not None and not close(found, expected):
            why = cause if isinstance(cause, str) else cause(quantity, found)
            yield Problem(name, quantity, number(expected), number(found), why)


def group_problems(groups: Mapping[str, int], rebuild: str) -> Iterator[Problem]:
    """Yields the parameters that are not in one group of the optimizer.

    Args:
        groups: name of each parameter that is trained → in how many groups it is.
        rebuild: a sentence on what to do where there is none.
    """
    for name, count in groups.items():
        if count == 0:
            cause = f"No group of the optimizer holds it, so it would stay as it is. {rebuild}"
            yield Problem(name, "optimizer group", "one", "none", cause)
        elif count > 1:
            cause = "Each of them would update it. Add it to one group only, and build the optimizer once."
            yield Problem(name, "optimizer group", "one", str(count), cause)


# ---- multipliers ---------------------------------------------------------------------------------------------------


def hook_problems(found: Iterable[tuple[str, Hooks]], wanted: Mapping[str, Hooks]) -> Iterator[Problem]:
    """Yields where a multiplier is missing, acts twice, has another factor or stands where none should.

    Args:
        found: (global name, its hooks) of each module that is here, also of those without hooks.
        wanted: the hooks of the plan's sites.
    """
    for name, hooks in found:
        right = wanted.get(name, [])
        if hooks != right:
            yield Problem(name, "multiplier", _listed(right), _listed(hooks), _hook_cause(hooks, right))


def _listed(hooks: Hooks) -> str:
    return " and ".join(f"{number(factor)} on its {acts}" for acts, factor in hooks) or "none"


def _hook_cause(found: Hooks, wanted: Hooks) -> str:
    if not found:
        return "The hook is gone: the layer was built anew or copied without it. Apply the plan to the final model."
    if not wanted:
        return "The plan has no multiplier here. Another plan was applied to this model; build it anew."
    if len(found) > 1:
        return "The plan was applied more than once. Apply it once, to a freshly built model."
    return "Another recipe's plan was applied to this model. Build it anew with this one."


# ---- attention -----------------------------------------------------------------------------------------------------


def scale_problem(
    name: str,
    expected: float | None,
    said: Sequence[float],
    cause: Callable[[Sequence[float]], str],
    *,
    measured: float | None = None,
    precision: float = CLOSE,
    must_be_known: bool = False,
) -> Problem | None:
    """Returns why an attention does not multiply its logits by the expected scale; None where it does.

    Args:
        name: of the module.
        expected: the scale that it should use; None for one that should not be there.
        said: what it, or each of its parts, says that it uses; compared exactly.
        cause: called with those of `said` that are wrong.
        measured: what it was seen to compute with; NaN for what is no scale, None where it was not measured.
        precision: relative, of `measured`.
        must_be_known: whether an attention that says nothing and was not measured is a problem.
    """
    wrong = [scale for scale in said if not close(scale, expected)]
    if measured is not None and expected is not None and not math.isclose(measured, expected, rel_tol=precision):
        return Problem(name, "softmax scale", number(expected), number(measured), cause(wrong))
    if wrong:
        return Problem(name, "softmax scale", number(expected), number(wrong[0]), cause(wrong))
    if must_be_known and expected is not None and measured is None and not said:
        return Problem(name, "softmax scale", number(expected), "unknown", cause(wrong))
    return None
