"""Predicates on a plan's entries, for mistakes and for what is said of them."""

from mup_megatron.theory import Plan, PlanEntry, Property, Role


def token_table(plan: Plan) -> str | None:
    """Returns the name of the table of tokens: the tied readout, or the first embedding; None without any."""
    return plan.readout if plan.tied else next((e.name for e in plan.entries if e.is_embedding), None)


def is_any(_: PlanEntry) -> bool:
    """Returns True: every parameter is meant."""
    return True


def is_hidden(entry: PlanEntry) -> bool:
    """Returns whether both sides grow with width."""
    return entry.role is Role.HIDDEN


def is_input_role(entry: PlanEntry) -> bool:
    """Returns whether it is an embedding, bias or gain whose one side grows."""
    return entry.role is Role.INPUT


def is_output_role(entry: PlanEntry) -> bool:
    """Returns whether the side that is multiplied grows with width, and what comes out is of a finite size."""
    return entry.role is Role.OUTPUT


def is_scalar_role(entry: PlanEntry) -> bool:
    """Returns whether no side grows with width."""
    return entry.role is Role.SCALAR


def is_convolution(entry: PlanEntry) -> bool:
    """Returns whether it has a kernel for each channel: its input side is as large at every width."""
    return len(entry.shape) > 2 and entry.role is Role.INPUT


def is_embedding(entry: PlanEntry) -> bool:
    """Returns whether it is a lookup table."""
    return entry.is_embedding


def is_readout(entry: PlanEntry) -> bool:
    """Returns whether it is a readout with a weight of its own."""
    return entry.is_readout


def is_residual(entry: PlanEntry) -> bool:
    """Returns whether it writes into the residual stream."""
    return entry.is_residual


def is_of_experts(entry: PlanEntry) -> bool:
    """Returns whether it is one of several that share the tokens."""
    return entry.is_expert


def is_router(entry: PlanEntry) -> bool:
    """Returns whether it chooses experts."""
    return Property.ROUTER in entry.properties


def is_vector(entry: PlanEntry) -> bool:
    """Returns whether it is a bias or gain."""
    return entry.is_vector


def is_gain(entry: PlanEntry) -> bool:
    """Returns whether it is a norm's gain that grows with width."""
    return entry.is_gain and entry.role is Role.INPUT


def is_plain_bias(entry: PlanEntry) -> bool:
    """Returns whether it is a vector that is added."""
    return entry.is_vector and not entry.is_gain


def is_bias(entry: PlanEntry) -> bool:
    """Returns whether it is a bias that grows with width."""
    return is_plain_bias(entry) and entry.role is Role.INPUT


def is_not_hidden(entry: PlanEntry) -> bool:
    """Returns whether one side, or none, grows with width."""
    return entry.role is not Role.HIDDEN


def is_linear_bias(entry: PlanEntry) -> bool:
    """Returns whether it is a bias, and not a norm's."""
    return is_plain_bias(entry) and "norm" not in entry.name


def is_matrix(entry: PlanEntry) -> bool:
    """Returns whether it is neither bias nor gain."""
    return not entry.is_vector
