"""A plan's multipliers → what is multiplied in which weights, so that the model needs none of them.

Which factor goes where and why is `theory/folding.py`, on whole tensors. Here is what that leaves over: the scale of
attention without a query norm, which belongs to some of the rows of a fused tensor.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch

from mup_megatron.errors import InputError
from mup_megatron.live.folds import parts
from mup_megatron.theory import (
    BRANCH,
    READOUT,
    SOFTMAX,
    Acts,
    Fold,
    Place,
    Plan,
    PlanError,
    Tensor,
    fold,
    fold_attention,
    fold_branches,
)

__all__ = ["QUERIES", "Fold", "Rows", "folded", "folds", "part_rows"]

QUERIES = frozenset({"queries", "turned queries"})
"""Names of the parts of a tensor whose product with the keys is the attention logits."""

Rows = tuple[range, ...]


def folds(plan: Plan, tensors: Collection[Tensor], *, carried: Collection[str], softmax_scale: float) -> Sequence[Fold]:
    """Returns what has to be done to a model's weights for one that multiplies by nothing but what it carries.

    Args:
        plan: that the model was trained with.
        tensors: the model's, with the parts of those that are fused.
        carried: the multipliers that the other model has itself, as `Place.carries` names them.
        softmax_scale: of the other model's attention, unless it carries SOFTMAX.

    Raises:
        InputError: a multiplier cannot be folded exactly; names it.
    """
    assert all(entry.folded == 1.0 for entry in plan.entries), "the plan's weights are folded already"
    try:
        folded = plan if BRANCH in carried else fold_branches(plan)
        of_rows: list[Fold] = []
        _require_one_scale(plan)
        if SOFTMAX not in carried:
            if plan.query_norms:
                folded = fold_attention(folded, scale=softmax_scale)
            elif plan.softmax_scale != softmax_scale:
                of_rows = [*_of_queries(plan, tensors, plan.softmax_scale / softmax_scale)]
        kept = {*carried, *([plan.readout] if READOUT in carried and not plan.tied else [])}
        folded = fold(folded, {READOUT, *plan.by_name} - kept)
    except PlanError as error:
        raise InputError(f"{error} Export to an architecture that has such a multiplier itself.") from None
    whole = (Fold(e.name, e.folded, e.fold_offset) for e in folded.entries if (e.folded, e.fold_offset) != (1.0, 0.0))
    return [*whole, *of_rows]


def part_rows(tensor: Tensor, parts: Collection[str]) -> Rows | None:
    """Returns the rows of some of a fused tensor's parts; None where they are all of its rows."""
    if all(part.name in parts for part in tensor.parts):
        return None
    found, start = [], 0
    for _ in range(tensor.runs):
        for part in tensor.parts:
            rows = part.rows // tensor.runs
            if part.name in parts:
                found.append(range(start, start + rows))
            start += rows
    return tuple(found)


def folded(tensor: torch.Tensor, of_tensor: Iterable[Fold]) -> torch.Tensor:
    """Returns a tensor with its folds, at least in single precision."""
    todo = [*of_tensor]
    if not todo:
        return tensor
    found = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    for each in todo:
        for part in parts(found, each):
            part.mul_(each.factor).add_(each.offset)
    return found


def _require_one_scale(plan: Plan) -> None:
    own = {site.factor for site in map(plan.site, _scales(plan))} - {plan.softmax_scale}
    if own:
        raise PlanError(f"Its attentions have several softmax scales ({plan.softmax_scale:g}, {min(own):g}).")


def _scales(plan: Plan) -> Iterator[Place]:
    return (place for place in plan.places if place.acts is Acts.SCALE)


def _of_queries(plan: Plan, tensors: Collection[Tensor], factor: float) -> Iterator[Fold]:
    """Yields a fold of the weight that makes the queries of each attention, and of its bias."""
    for place in _scales(plan):
        attention = place.module.rpartition(".")[0]
        made = [
            tensor
            for tensor in tensors
            if tensor.name.startswith(f"{attention}.") and any(part.name in QUERIES for part in tensor.parts)
        ]
        if not made:
            raise PlanError(f"{attention}: what makes its queries is not known, so that its scale cannot be folded.")
        for tensor in made:
            rows = part_rows(tensor, QUERIES)
            module = tensor.name.rpartition(".")[0]
            yield Fold(tensor.name, factor, rows=rows)
            if f"{module}.bias" in plan.by_name:
                yield Fold(f"{module}.bias", factor, rows=rows)
