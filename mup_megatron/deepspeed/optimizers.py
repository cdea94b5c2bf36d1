"""The optimizers as a DeepSpeed configuration names them.

To add one, `register` it here, in `modules/optimizers.py`, which says what its parameters are called, and its rules in
`theory.optimizers`.
"""

from dataclasses import dataclass

from mup_megatron.by_optimizer import ByOptimizer

__all__ = ["DEEPSPEED_OPTIMIZERS", "DeepSpeedOptimizer", "register"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedOptimizer:
    """An optimizer in DeepSpeed's terms, whose types are the same in small letters."""

    type: str
    """What to write into a configuration."""
    coupled_type: str | None = None
    """Another type that is the same optimizer, unless `"adam_w_mode": false` adds weight decay to the gradient."""
    through_mup: tuple[str, ...] = ()
    """DeepSpeed's types that are the same through microsoft/mup, in small letters."""

    def has_type(self, name: str) -> bool:
        """Returns whether this is the optimizer of a type."""
        return name.lower() == self.type.lower() or self.may_be_coupled(name)

    def may_be_coupled(self, name: str) -> bool:
        """Returns whether a type is the one that may add weight decay to the gradient."""
        return self.coupled_type is not None and name.lower() == self.coupled_type.lower()


DEEPSPEED_OPTIMIZERS = ByOptimizer[DeepSpeedOptimizer]("DeepSpeed")
"""The optimizers that DeepSpeed knows, by their names in a recipe."""
register = DEEPSPEED_OPTIMIZERS.register

register("adam", DeepSpeedOptimizer(type="AdamW", coupled_type="Adam", through_mup=("muadam", "muadamw")))
register("sgd", DeepSpeedOptimizer(type="SGD", through_mup=("musgd",)))
