"""The rule of depth and the multiplier of branches, carried out: on an entry, and at the places of branches."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from mup_megatron.theory.depth import CompleteP
from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.matching import family_of
from mup_megatron.theory.plan import PlanEntry
from mup_megatron.theory.sites import BRANCH, Place
from mup_megatron.theory.tensors import Property, Tensor
from mup_megatron.theory.widths import Stack

Stacks = Mapping[str, Stack]


def deepened(entry: PlanEntry, ratio: float, rule: CompleteP) -> PlanEntry:
    """Returns the entry of a tensor in a stack that is so many times as deep as the base's."""
    if ratio == 1.0:
        return entry
    step = entry.rules.step
    lr = rule.learning_rate(ratio, step=step)
    return replace(
        entry,
        lr=entry.lr * lr,
        min_lr=entry.min_lr * lr,
        eps=None if entry.eps is None else entry.eps * rule.epsilon(ratio),
        weight_decay=entry.weight_decay * rule.weight_decay(ratio, step=step),
        rule=f"{entry.rule} (depth × {ratio:.4g})",
        depth_ratio=ratio,
    )


def placed(
    base: Iterable[Place],
    target: Iterable[Place],
    *,
    stacks: tuple[Stacks, Stacks],
    tensors: Iterable[Tensor],
    multiplier: float,
    rule: CompleteP | None,
) -> tuple[Place, ...]:
    """Returns the target's residual branches, each with its multiplier; none where nothing is said of them.

    Args:
        base: all places of the base.
        target: those of the target.
        stacks: of base and target.
        tensors: the target's.
        multiplier: as tuned at the base, on every branch.
        rule: None where depth changes nothing.

    Raises:
        PlanError: the target's branches are not known, or not all of them.
    """
    if rule is None and multiplier == 1.0:
        return ()
    branches = [place for place in target if place.carries == BRANCH]
    if not branches:
        raise PlanError(
            "parametrization.depth: the residual branches of this model are not known, so that they cannot be "
            "multiplied. Take depth out of the recipe, and keep the base's number of layers."
        )
    _require_within(branches, tensors)
    named = {place.module: place.stock or 1.0 for place in base if place.carries == BRANCH}
    at_base = {family_of(name): stock for name, stock in named.items()} | named
    found = []
    for place in branches:
        scale = multiplier
        if rule is not None and place.stack is not None:
            before, now = (of_model.get(place.stack, stacks[1][place.stack]).layers for of_model in stacks)
            scale *= rule.branch(now / before)
        own = at_base.get(place.module, at_base.get(family_of(place.module), 1.0))
        stock = (place.stock or 1.0) / own
        found.append(replace(place, scale=scale, stock=None if stock == 1.0 else stock))
    return tuple(found)


def _require_within(branches: Iterable[Place], tensors: Iterable[Tensor]) -> None:
    """Raises PlanError for what writes into the residual stream in none of its branches."""
    known = {place.module for place in branches}
    for tensor in tensors:
        parts = tensor.name.split(".")
        outer = (".".join(parts[:n]) for n in range(1, len(parts)))
        if Property.RESIDUAL in tensor.properties and known.isdisjoint(outer):
            raise PlanError(
                f"{tensor.name}: it writes into the residual stream and is in no branch that is known, so it would go "
                "without residual_multiplier and parametrization.depth. Take both out of the recipe."
            )
