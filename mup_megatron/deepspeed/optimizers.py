"""The optimizers as a DeepSpeed configuration names them.

To add one, `register` it here, in `modules/optimizers.py`, which says what its parameters are called, and its rules in
`theory.optimizers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mup_megatron.by_optimizer import ByOptimizer
from mup_megatron.recipe import Hyperparameters, Recipe

__all__ = ["DEEPSPEED_OPTIMIZERS", "DeepSpeedOptimizer", "optimizer_of", "register"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedOptimizer:
    """An optimizer in DeepSpeed's terms, whose types are the same in small letters."""

    type: str
    """What to write into a configuration."""
    coupled_type: str | None = None
    """Another type that is the same optimizer, unless `"adam_w_mode": false` adds weight decay to the gradient."""
    through_mup: tuple[str, ...] = ()
    """DeepSpeed's types that are the same through microsoft/mup, in small letters."""
    leaves_to: tuple[str, ...] = ()
    """Those that DeepSpeed itself steps the rest of the parameters with."""
    flag: str | None = None
    """The attribute of a parameter by which DeepSpeed sees whether this one steps it, or one of those."""
    settings: Callable[[Hyperparameters], dict[str, Any]] | None = None
    """What a recipe says of it that its groups hold; None where that is what torch's hold."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters of a recipe that have to have these values, because DeepSpeed's has no others."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Params of a configuration that are not to be there, whatever they say → why."""
    switches: Mapping[str, str] = field(default_factory=dict)
    """Those that are not to be on → why."""
    goes_everywhere: bool = True
    """Whether it goes with fp16, offloading, pipelines, and clipping under ZeRO."""

    def has_type(self, name: str) -> bool:
        """Returns whether this is the optimizer of a type."""
        return name.lower() == self.type.lower() or self.may_be_coupled(name)

    def may_be_coupled(self, name: str) -> bool:
        """Returns whether a type is the one that may add weight decay to the gradient."""
        return self.coupled_type is not None and name.lower() == self.coupled_type.lower()


DEEPSPEED_OPTIMIZERS = ByOptimizer[DeepSpeedOptimizer]("DeepSpeed")
"""The optimizers that DeepSpeed knows, by their names in a recipe."""
register = DEEPSPEED_OPTIMIZERS.register


def optimizer_of(recipe: Recipe) -> DeepSpeedOptimizer:
    """Returns a recipe's optimizer as DeepSpeed has it.

    Raises:
        InputError: DeepSpeed does not have it, or not beside the others of the recipe.
    """
    known = DEEPSPEED_OPTIMIZERS[recipe.parametrization.optimizer]
    if not {*recipe.optimizers} <= {recipe.parametrization.optimizer, *known.leaves_to}:
        return DEEPSPEED_OPTIMIZERS.only(recipe.optimizers)
    return known


register("adam", DeepSpeedOptimizer(type="AdamW", coupled_type="Adam", through_mup=("muadam", "muadamw")))
register("sgd", DeepSpeedOptimizer(type="SGD", through_mup=("musgd",)))
register(
    "muon",
    DeepSpeedOptimizer(
        type="Muon",
        leaves_to=("adam",),
        flag="use_muon",
        settings=lambda h: {"momentum": h.muon_momentum},
        fixed={
            "muon_scale_mode": "shape_scaling",
            "muon_extra_scale_factor": 1.0,
            "muon_nesterov": True,
            "muon_num_ns_steps": 5,
            "muon_coefficient_type": "simple",
        },
        refused={
            "muon_lr": "the recipe has one lr, and the plan says what follows for each parameter",
            "adam_lr": "the recipe has one lr, and the plan says what follows for each parameter",
            "nesterov": "DeepSpeed does not read it for Muon, whose momentum is Nesterov's always",
            "ns_steps": "DeepSpeed does not read it for Muon, which has 5 iterations always",
        },
        switches={"per_head_muon": "the plan's rates are for whole matrices"},
        goes_everywhere=False,
    ),
)
