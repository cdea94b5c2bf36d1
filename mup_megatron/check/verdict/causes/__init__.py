"""Causes: which mistake explains what is off. It names the culprit and ranks likely causes. Plain numbers and plans.

Initial weights, the first activations and what the optimizer's steps betray (learning rate, eps, weight decay) are
direct: each follows from one rule, in one place. So every hypothesis is a prediction of how far each of these is off at
each width, made from the right plans: "not divided by r_in" says log r_in for the learning rates of hidden weights, and
0 for everything else. Its share is how much of the observed squared deviation it takes away, less what it predicts and
is not there.

An activation is direct only where the weights and activations that it is computed from are as they should be: then
something in the forward pass itself is different. Gradients, updates, spectral norms and overlaps are consequences;
they are asked only where nothing direct is off.
"""

from collections.abc import Mapping, Sequence

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.bounds import of_bounds
from mup_megatron.check.verdict.causes.depth import depth
from mup_megatron.check.verdict.causes.experts import experts
from mup_megatron.check.verdict.causes.forward import forward_pass
from mup_megatron.check.verdict.causes.horizon import horizon
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis
from mup_megatron.check.verdict.causes.initial import initial_weights
from mup_megatron.check.verdict.causes.latent import latents
from mup_megatron.check.verdict.causes.matrices import matrices, routing
from mup_megatron.check.verdict.causes.observed import Observation, observed_of
from mup_megatron.check.verdict.causes.optimizer import eps, rates, schedule, weight_decay
from mup_megatron.check.verdict.causes.plan import plan_mistakes
from mup_megatron.check.verdict.causes.powers import powers
from mup_megatron.check.verdict.causes.ranking import TOLD, Cause, likeliest
from mup_megatron.check.verdict.causes.single import single_parts
from mup_megatron.check.verdict.causes.unexplained import first_deviation, indirect_cause
from mup_megatron.check.verdict.comparison import Comparison
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

__all__ = ["TOLD", "Cause", "causes", "of_bounds"]

SURE = 0.5
"""Below this no hypothesis fits, and what is off first is named before them."""


def causes(
    comparison: Comparison,
    plans: Mapping[int, Plan],
    recipe: Recipe,
    models: Mapping[int, ModelFile] | None,
) -> tuple[Cause, ...]:
    """Likely causes of what is off in a comparison, best first; none if nothing is off.

    Args:
        comparison: of subject and reference.
        plans: width → the right plan.
        recipe: that they were made with.
        models: width → its model file; without, mistakes inside a fused weight have no name of their own.
    """
    if all(compared.off is None for compared in comparison.values()):
        return ()
    at = {width: AtWidth(plan, recipe, None if models is None else models[width]) for width, plan in plans.items()}
    observed = observed_of(comparison, at)
    total = sum(o.weight * o.deviation**2 for o in observed)
    if total == 0:
        return (indirect_cause(comparison, at),)
    told = likeliest(_hypotheses(at, observed), observed, total)
    if told and told[0].share >= SURE:
        return tuple(told)
    return (first_deviation(observed, total), *told[: TOLD - 1])


def _hypotheses(at: Mapping[int, AtWidth], observed: Sequence[Observation]) -> list[Hypothesis]:
    """From those that say most to those that fit anything."""
    return [
        *plan_mistakes(at),
        *experts(at),
        *latents(at),
        *horizon(at),
        *depth(at),
        *forward_pass(at),
        *matrices(at),
        *rates(at),
        *schedule(at),
        *eps(at),
        *weight_decay(at),
        *initial_weights(at),
        *powers(at),
        *routing(at, observed),
        *single_parts(observed),
    ]
