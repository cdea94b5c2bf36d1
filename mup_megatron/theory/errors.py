"""The exception of this package; it imports nothing, so it cannot be `mup_megatron.errors.InputError`."""


class PlanError(ValueError):
    """A plan cannot be made from what was given. The message names the parameter and the remedy."""
