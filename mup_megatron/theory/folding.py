"""Moving a multiplier into the weight it multiplies, and back, without changing the function or its training run.

For any θ > 0, (multiplier a/θ, init b·θ, LR c·θ, eps e/θ, weight decay λ/θ) is the same training run for every θ under
AdamW; under SGD it is LR c·θ², weight decay λ/θ² (TP5, Lemma J.1: the abc-symmetry). One thing
does change: a folded weight's gradient is θ times smaller, so it counts differently in the global norm that is clipped.
Fold to export, or to train a model that has no place for a multiplier.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.plan import Plan, PlanEntry
from mup_megatron.theory.sites import BRANCH, READOUT, Place


@dataclass(frozen=True, slots=True)
class Fold:
    """A change of a tensor: rows are multiplied, and shifted where a gain is stored as its distance from 1."""

    tensor: str
    factor: float
    offset: float = 0.0
    rows: tuple[range, ...] | None = None
    """Those that are meant; None for all."""
    side: int = 0
    """Of what rows are counted: 1 for a matrix that is stored as [in, out]."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "tensor": self.tensor,
            "factor": self.factor,
            **({"offset": self.offset} if self.offset else {}),
            **({"rows": [[rows.start, rows.stop] for rows in self.rows]} if self.rows is not None else {}),
            **({"side": self.side} if self.side else {}),
        }


def fold(plan: Plan, names: Collection[str] | None = None) -> Plan:
    """Returns the plan with the multipliers of `names` moved into their weights; all of them by default.

    A tied readout shares its weight with the token embedding. What is folded into that table is taken out of the
    readout's multiplier, and the readout's own multiplier goes into gain and bias of the norm before it. The scale of
    attention is not a weight's: see `fold_attention`.

    Raises:
        PlanError: a name that the plan does not know.
    """
    chosen = {entry.name for entry in plan.entries} | {READOUT} if names is None else set(names)
    if plan.readout is not None and not plan.tied and chosen & {READOUT, plan.readout}:
        chosen |= {READOUT, plan.readout}
    factors = {name: plan[name].multiplier / plan[name].stock_multiplier for name in chosen - {READOUT}}
    output = plan.output_multiplier
    if plan.tied and plan.readout is not None:
        output /= factors.get(plan.readout, 1.0)
    if READOUT in chosen:
        if plan.tied:
            factors |= dict.fromkeys(plan.readout_norm, output)
        output = 1.0
    entries = tuple(moved(entry, factors.get(entry.name, 1.0)) for entry in plan.entries)
    return replace(plan, entries=entries, output_multiplier=output)


def fold_attention(plan: Plan, *, scale: float | None = None) -> Plan:
    """Returns the plan with attention's scale moved into gain and bias of the query norm, another one in its place.

    Args:
        plan: of a model with query norms.
        scale: what attention goes on to use; None for what it uses by itself.

    Raises:
        PlanError: there is no query norm. The scale could only go into the query rows of the fused `linear_qkv`, which
            would need a learning rate of their own.
    """
    left = plan.own_softmax_scale if scale is None else scale
    theta = plan.softmax_scale / left
    if not plan.query_norms:
        raise PlanError(
            "The attention scale cannot be folded: without a query norm it belongs to a part of linear_qkv.weight. "
            "Keep it as softmax_scale, or use qk_layernorm."
        )
    entries = tuple(moved(e, theta if e.name in plan.query_norms else 1.0) for e in plan.entries)
    return replace(plan, entries=entries, softmax_scale=left)


def fold_branches(plan: Plan) -> Plan:
    """Returns the plan with the multiplier of each residual branch moved into what writes it, weights and biases.

    What the model itself multiplies by stays. For export: in training the gradient norm that is clipped would grow with
    depth.

    Raises:
        PlanError: a branch has no such weight.
    """
    factors: dict[str, float] = {}
    places = []
    for place in plan.places:
        if place.carries == BRANCH:
            site = plan.site(place)
            written = writers(plan, place)
            if not written:
                raise PlanError(
                    f"{place.module}: no weight that writes into the residual stream is known. Keep the factor."
                )
            factors |= {entry.name: site.factor / site.stock for entry in written}
            place = replace(place, scale=site.stock)
        places.append(place)
    # The factor was the branch's, not the weight's own, which stays where it is.
    entries = (replace(moved(e, factors.get(e.name, 1.0)), multiplier=e.multiplier) for e in plan.entries)
    return replace(plan, places=tuple(places), entries=tuple(entries))


def writers(plan: Plan, place: Place) -> list[PlanEntry]:
    """Returns the weights and biases that write a residual branch."""
    within = [e for e in plan.entries if e.module == place.module or e.name.startswith(f"{place.module}.")]
    modules = {e.module for e in within if e.is_residual or e.module == place.module}
    return [e for e in within if e.module in modules]


def unfold(plan: Plan) -> Plan:
    """Returns the plan with every folded multiplier back in its place, to rounding.

    Raises:
        PlanError: multipliers of residual branches are folded, which nothing says any more.
    """
    for place in plan.places:
        if place.carries == BRANCH and any(entry.folded != 1.0 for entry in writers(plan, place)):
            raise PlanError(
                f"{place.module}: what writes this branch is folded for export, and its multiplier is not known from "
                "it. Make the plan from the recipe again."
            )
    entries = tuple(moved(entry, 1.0 / entry.folded) for entry in plan.entries)
    scale = plan.softmax_scale * (plan[plan.query_norms[0]].folded if plan.query_norms else 1.0)
    output = plan.output_multiplier * (1.0 if plan.readout is None else plan[plan.readout].folded)
    if plan.tied:
        output *= plan[plan.readout_norm[0]].folded
    return replace(plan, entries=entries, softmax_scale=scale, output_multiplier=output)


def moved(entry: PlanEntry, theta: float) -> PlanEntry:
    """Returns the entry with a factor `theta` moved from its multiplier into its weight."""
    if theta == 1.0:
        return entry
    step = entry.rules.folded(theta)
    # A gain that is stored as its distance from 1 becomes (1 + γ)θ - 1.
    zero_centered = entry.is_gain and entry.fold_offset == entry.init_value
    shift = theta - 1.0 if zero_centered else 0.0
    return replace(
        entry,
        init_std=None if entry.init_std is None else entry.init_std * theta,
        init_value=None if entry.init_value is None else entry.init_value * theta + shift,
        # A norm's gain and bias have no multiplier of their own: they take on that of what follows.
        multiplier=entry.multiplier if entry.is_vector else entry.multiplier / theta,
        lr=entry.lr * step,
        min_lr=entry.min_lr * step,
        eps=None if entry.eps is None else entry.eps / theta,
        weight_decay=entry.weight_decay / step,
        folded=entry.folded * theta,
        fold_offset=entry.fold_offset * theta + shift,
    )
