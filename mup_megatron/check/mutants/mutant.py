"""One deliberate mistake, and of which run it is made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mup_megatron.architectures.families.attention import QKV
from mup_megatron.architectures.measured import Kind, Measured
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, shapes_of
from mup_megatron.recipe import Recipe
from mup_megatron.theory import ModelShape, Plan, PlanEntry
from mup_megatron.theory.matching import counterparts
from mup_megatron.theory.widths import Scaling, Sizes, scaling


@dataclass(frozen=True)
class Context:
    """The run of which a mistake is made."""

    base: ModelFile
    target: ModelFile
    """At this width."""
    recipe: Recipe
    """Of the check: under stress."""
    width: int

    @property
    def r(self) -> float:
        """The width of the residual stream relative to the base's."""
        return self.target.hidden_size / self.base.hidden_size

    @cached_property
    def ratios(self) -> Mapping[str, Scaling]:
        """The sizes of each tensor at base and target, by global name."""
        base, target = self._shapes
        at_base = counterparts(base.tensors)
        return {p.name: scaling(at_base.of(p.name), p, Sizes(1, 1)) for p in target.tensors}

    @cached_property
    def fused(self) -> frozenset[str]:
        """The weights that make queries, keys and values in one."""
        return frozenset(t.name for t in self._shapes[1].tensors if tuple(part.name for part in t.parts) == QKV)

    @cached_property
    def measured(self) -> tuple[Measured, ...]:
        """The modules that the architecture has measured."""
        return tuple(architecture_of(self.target).measured(self.target))

    @property
    def readouts(self) -> frozenset[str]:
        """The modules that compute the model's logits."""
        return frozenset(each.module for each in self.measured if each.kind is Kind.READOUT)

    @property
    def branches(self) -> Mapping[str, str]:
        """The branches of the family that the last one is of → what each is computed from first, as of an MLP."""
        every = [each for each in self.measured if each.kind is Kind.BRANCH]
        return {each.module: each.reads[0] for each in every if each.panel == every[-1].panel}

    @cached_property
    def _shapes(self) -> tuple[ModelShape, ModelShape]:
        return shapes_of(self.base, self.target)


PlanChange = Callable[[Plan, Context], Plan]


ModelChange = Callable[[Sequence[Any], Plan, Context], None]


OptimizerChange = Callable[[Any, Sequence[Any], Plan, Context], None]


SchedulerChange = Callable[[Any, Any, Plan, Context], None]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake."""

    name: str
    what: str
    """In one sentence."""
    cause: tuple[str, ...]
    """Names in `causes/` that count as right."""
    plan: PlanChange | None = None
    """Gives the plan that is built; the reference keeps the right one."""
    model: ModelChange | None = None
    """(chunks, plan, context): after the run was built."""
    optimizer: OptimizerChange | None = None
    """(optimizer, chunks, plan, context): likewise."""
    scheduler: SchedulerChange | None = None
    """(scheduler, optimizer, plan, context): likewise."""
    when: Callable[[Context], bool] = lambda _: True
    """Whether it can be made with this architecture, and changes anything."""
    trains_alike: bool = False
    """Whether the first steps of a run may be what they are without it."""

    def mistaken(self, plan: Plan, recipe: Recipe, model: ModelFile) -> tuple[Plan, Callable[[Any], None]]:
        """Returns the plan that a run of a check is built with, and what is done to it afterwards.

        Args:
            plan: the right one.
            recipe: of the check.
            model: of one width.
        """
        context = Context(base=recipe.megatron_base, target=model, recipe=recipe, width=model.hidden_size)
        if self.plan is not None:
            plan = self.plan(plan, context)
        return plan, self.tamper(plan, context)

    def tamper(self, plan: Plan, context: Context) -> Callable[[Any], None]:
        """Returns the change to a run after it was built, before its first step.

        Args:
            plan: that it was built with.
            context: of which run.
        """

        def tampered(built: Any) -> None:
            if self.model is not None:
                self.model(built.chunks, plan, context)
            if self.optimizer is not None:
                self.optimizer(built.optimizer, built.chunks, plan, context)
            if self.scheduler is not None:
                self.scheduler(built.scheduler, built.optimizer, plan, context)
            if self.optimizer is not None or self.scheduler is not None:
                # So that the first step has the rates of its groups as they are now.
                built.scheduler.step(increment=0)

        return tampered


Select = Callable[[PlanEntry], bool]


Factor = Callable[[PlanEntry, Scaling, Context], float]
