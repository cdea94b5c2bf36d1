"""The right plan at one width, in the terms in which mistakes are told."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mup_megatron.architectures.families.attention import QKV
from mup_megatron.architectures.measured import Kind, Measured
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, depth_of, shapes_of
from mup_megatron.check.entries import is_embedding, is_hidden, is_input_role, is_of_experts, is_output_role
from mup_megatron.recipe import PerParameter, Recipe
from mup_megatron.theory import Deepening, Plan, PlanEntry, Sizes
from mup_megatron.theory.matching import counterparts
from mup_megatron.theory.widths import scaling


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
        """Returns the ratio of a tensor's fan_out, as its eps or, with SGD, its learning rate has it."""
        if not (is_input_role(entry) or is_hidden(entry)):
            return 1.0
        stack = self.deepening(entry)
        if entry.eps is not None:
            of_depth = 1.0 if stack is None else stack.eps
            return self.plan.adam_eps * of_depth / entry.eps * math.exp(self.log_share(entry))
        if entry.rules.step == 0:
            # Its rates say nothing of fan_out.
            return self._growth.get(entry.name, entry.width_ratio)
        of_depth = 1.0 if stack is None else stack.lr
        return entry.lr * entry.width_ratio / (self.plan.lr * of_depth * self.own_rate(entry))

    @cached_property
    def _growth(self) -> Mapping[str, float]:
        """The ratio of each tensor's fan_out, by name; none where there is no model file."""
        if self.model is None:
            return {}
        base, target = shapes_of(self.recipe.megatron_base, self.model)
        at_base = counterparts(base.tensors)
        return {t.name: scaling(at_base.of(t.name), t, Sizes(1, 1)).r_out for t in target.tensors}

    def deepening(self, entry: PlanEntry) -> Deepening | None:
        """Returns what depth gives a tensor; None where it has nothing of it."""
        return None if entry.depth_ratio == 1.0 else self.plan.deepened[entry.stack]

    def own(self, entry: PlanEntry) -> PerParameter | None:
        """Returns what the recipe's per_parameter says of a tensor."""
        match = _OVERRIDE.search(entry.rule)
        return None if match is None else self.recipe.per_parameter[int(match[1])]

    def own_rate(self, entry: PlanEntry) -> float:
        """Returns its factor on the learning rate."""
        own = self.own(entry)
        return 1.0 if own is None else own.lr_mult

    @cached_property
    def measured(self) -> Mapping[str, Measured]:
        """The modules that the architecture has measured, by name and in the order of a forward pass; none of a torch
        module.
        """
        model = self.model
        return {} if model is None else {each.module: each for each in architecture_of(model).measured(model)}

    @cached_property
    def weights_of(self) -> Mapping[str, Sequence[str]]:
        """A module → the weights that it computes with itself: those of which it is the innermost measured one, as a
        layer of experts is of theirs; of a torch module its own.
        """
        found: dict[str, list[str]] = {}
        for entry in self.plan.entries:
            around = (module for module in self.measured if f"{entry.module}.".startswith(f"{module}."))
            found.setdefault(max(around, key=len, default=entry.module), []).append(entry.name)
        return found

    def of_kind(self, kind: Kind) -> tuple[str, ...]:
        """Returns the measured modules of a kind."""
        return self._of_kind.get(kind, ())

    @cached_property
    def _of_kind(self) -> Mapping[Kind, tuple[str, ...]]:
        return {kind: tuple(name for name, each in self.measured.items() if each.kind is kind) for kind in Kind}

    @cached_property
    def tables(self) -> Mapping[str, str]:
        """The modules of embeddings → the name of the table; that of tokens is `token_table`'s."""
        return {entry.module: entry.name for entry in self.plan.entries if entry.is_embedding}

    @cached_property
    def fused(self) -> Mapping[str, float]:
        """The weights that make queries, keys and values in one → the queries' share of its rows; none where there is
        no model file.
        """
        tensors = () if self.model is None else shapes_of(self.recipe.megatron_base, self.model)[1].tensors
        return {
            tensor.name: tensor.parts[0].rows / sum(part.rows for part in tensor.parts)
            for tensor in tensors
            if tuple(part.name for part in tensor.parts) == QKV
        }

    @property
    def log_of_experts(self) -> float:
        """The logarithm of the number of experts relative to the base's."""
        base, model = self.recipe.base, self.model
        if model is None or model.num_experts is None or not isinstance(base, ModelFile) or base.num_experts is None:
            return 0.0
        return math.log(model.num_experts / base.num_experts)

    def log_share(self, entry: PlanEntry) -> float:
        """Returns the logarithm of an expert's share of the tokens relative to the base's."""
        base, model = self.recipe.base, self.model
        if model is None or not isinstance(base, ModelFile) or not is_of_experts(entry):
            return 0.0
        return math.log(model.moe_router_topk / base.moe_router_topk) - self.log_of_experts

    @property
    def alpha(self) -> float:
        """The recipe's attention multiplier."""
        return self.recipe.moved.attention_multiplier

    @property
    def depth_at_base(self) -> int | None:
        """Residual branches of the base, if it is a model of Megatron-Core's."""
        return depth_of(self.recipe.base) if isinstance(self.recipe.base, ModelFile) else None


_OVERRIDE = re.compile(r"per_parameter\[(\d+)\]")
