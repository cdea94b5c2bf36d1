"""The learning rates of a plan along Megatron's schedule, role by role: what logs show. Changes nothing."""

from collections import Counter
from typing import Any

from mup_megatron.theory import Plan, PlanEntry


def peak_lr_per_role(plan: Plan) -> dict[str, float]:
    """Each role's peak learning rate; where a role has several, each with its ratio to the base's in the label."""
    return {label: entry.lr for label, entry in _first_per_lr(plan).items()}


def lr_per_role(plan: Plan, scheduler: Any) -> dict[str, float]:
    """Each role's learning rate at this moment, by Megatron's own schedule; labels as in `peak_lr_per_role`."""
    return {
        label: scheduler.get_lr({"max_lr": entry.lr, "min_lr": entry.min_lr})
        for label, entry in _first_per_lr(plan).items()
    }


def _first_per_lr(plan: Plan) -> dict[str, PlanEntry]:
    """One parameter for each learning rate of each role."""
    first = {(entry.role, entry.lr): entry for entry in reversed(plan.entries)}
    several = [role for role, count in Counter(role for role, _ in first).items() if count > 1]
    return {
        f"{role} ×{lr / plan.lr:.3g}" if role in several else str(role): entry for (role, lr), entry in first.items()
    }
