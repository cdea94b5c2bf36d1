"""The learning rates of a plan along its schedule, role by role: what logs show."""

from collections import Counter

from mup_megatron.theory import Plan, PlanEntry


def peak_lr_per_role(plan: Plan) -> dict[str, float]:
    """Each role's peak learning rate; where a role has several, each with its ratio to the base's in the label."""
    return lr_per_role(plan, plan.lr)


def lr_per_role(plan: Plan, base_lr: float) -> dict[str, float]:
    """Each role's learning rate when the base's is `base_lr`: peak and floor have one ratio to the base's.

    Labels as in `peak_lr_per_role`.
    """
    return {label: base_lr * (entry.lr / plan.lr) for label, entry in _first_per_lr(plan).items()}


def _first_per_lr(plan: Plan) -> dict[str, PlanEntry]:
    """One parameter for each learning rate of each role."""
    first = {(entry.role, entry.lr): entry for entry in reversed(plan.entries)}
    several = [role for role, count in Counter(role for role, _ in first).items() if count > 1]
    return {
        f"{role} ×{lr / plan.lr:.3g}" if role in several else str(role): entry for (role, lr), entry in first.items()
    }
