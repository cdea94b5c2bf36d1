"""The right plan at one width, in the terms in which mistakes are told."""

import re
from dataclasses import dataclass
from functools import cached_property

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import depth_of
from mup_megatron.check.entries import is_embedding, is_hidden, is_input_role, is_output_role
from mup_megatron.recipe import PerParameter, Recipe
from mup_megatron.theory import Plan, PlanEntry


@dataclass(frozen=True)
class AtWidth:
    """The right plan at one width, in the terms of hypotheses."""

    plan: Plan
    recipe: Recipe
    model: ModelFile | None

    @cached_property
    def r(self) -> float:
        """The width of the residual stream relative to the base's."""
        for entry in self.plan.entries:
            if is_output_role(entry):
                return entry.width_ratio
        return next((self.r_out(entry) for entry in self.plan.entries if is_embedding(entry)), 1.0)

    def r_out(self, entry: PlanEntry) -> float:
        """The ratio of a tensor's fan_out, as its eps or, with SGD, its learning rate has it."""
        if not (is_input_role(entry) or is_hidden(entry)):
            return 1.0
        if entry.eps is not None:
            return self.plan.adam_eps / entry.eps
        return entry.lr * entry.width_ratio / (self.plan.lr * self.own_rate(entry))

    def own(self, entry: PlanEntry) -> PerParameter | None:
        """Returns what the recipe's per_parameter says of a tensor."""
        match = _OVERRIDE.search(entry.rule)
        return None if match is None else self.recipe.per_parameter[int(match[1])]

    def own_rate(self, entry: PlanEntry) -> float:
        """Its factor on the learning rate."""
        own = self.own(entry)
        return 1.0 if own is None else own.lr_mult

    @property
    def alpha(self) -> float:
        """The recipe's attention multiplier."""
        return self.recipe.hyperparameters.attention_multiplier

    @property
    def depth_at_base(self) -> int | None:
        """Residual branches of the base, if it is a model of Megatron-Core's."""
        return depth_of(self.recipe.base) if isinstance(self.recipe.base, ModelFile) else None


_OVERRIDE = re.compile(r"per_parameter\[(\d+)\]")
