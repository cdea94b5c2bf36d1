"""The recipe under stress: with values at which a mistake shows within a few steps, and a right model trains."""

from dataclasses import dataclass
from statistics import median

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.measure.measurements import MeasuredRun, Quantity, RunProtocol
from mup_megatron.check.measure.optimizers import PILOT_RATE, clamped, from_gradients, stressed_values
from mup_megatron.recipe import HuggingFaceBase, ModuleBase, PerParameter, Recipe, Schedule
from mup_megatron.theory import Plan, Rule

WARM_UP = 0.25
FLOOR = 0.1
"""Of the peak, at least; else the last steps would have no learning rate to look at."""
MOST_FLOOR = 0.5
"""Of the peak: else there is no decay."""
STDS = (0.01, 0.1)
MULTIPLIERS = (0.1, 10.0)
"""Between which values are taken as they are."""
_MULTIPLIERS = ("embedding_multiplier", "output_multiplier", "attention_multiplier", "residual_multiplier")
LEAST_CLIP = 0.01
"""Below, what is left of gradients comes near the smallest numbers."""
PILOT = RunProtocol(steps=3, recorded=(3,), spectral=False)
"""How the run is trained that shows how large gradients are."""


@dataclass(frozen=True)
class Pilot:
    """A short correct run, which shows how large gradients are."""

    run: MeasuredRun
    recipe: Recipe
    plan: Plan


def pilot_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe that a pilot trains with, under the rules that are right."""
    return under_rule(stressed(recipe, steps=PILOT.steps, rate=PILOT_RATE), Rule.MUP)


def stressed_after(pilot: Pilot, recipe: Recipe, *, steps: int) -> Recipe:
    """Returns the recipe under stress for a run of so many steps, with the gradients of a pilot."""
    found = pilot.run.values.items()
    gradients = [(value, pilot.plan[key.name]) for key, value in found if key.quantity is Quantity.GRADIENT]
    return stressed(recipe, steps=steps, **from_gradients(gradients, pilot.plan, pilot.recipe))


def stressed(recipe: Recipe, *, steps: int, eps: float | None = None, rate: float | None = None) -> Recipe:
    """Returns the recipe with values at which a mistake shows within `steps`, and a right model trains.

    The same base, overrides and rules: whether the plan is carried out is checked, not whether its values are good. So
    a value at which nothing would be seen is brought to where it acts, and one at which nothing would train to where it
    does. A learning rate that moves weights visibly, a floor above 0, weight decay that acts within the run, an eps of
    the gradients' size; a warm-up and a decay, however short.

    Args:
        recipe: as tuned.
        steps: of the run.
        eps: as in `stressed_values`.
        rate: likewise.
    """
    h = recipe.moved
    changes: dict[str, float] = {name: clamped(getattr(h, name), MULTIPLIERS) for name in _MULTIPLIERS}
    changes["init_method_std"] = clamped(h.init_method_std, STDS)
    if h.clip_grad > 0:
        changes["clip_grad"] = max(h.clip_grad, LEAST_CLIP)
    std = _std(recipe.base, changes["init_method_std"])
    changes |= stressed_values(recipe, steps=steps, std=std, eps=eps, rate=rate)
    lr = changes["lr"]
    changes["min_lr"] = clamped(h.min_lr * lr / h.lr, (FLOOR * lr, MOST_FLOOR * lr))
    # What a run has is what shows: the recipe's own values are those that its horizon moves there.
    return recipe.with_moved(changes).model_copy(
        update={
            "per_parameter": tuple(_tempered(own) for own in recipe.per_parameter),
            "schedule": Schedule(lr_decay_style="linear", lr_warmup_fraction=WARM_UP),
        }
    )


def _std(base: ModelFile | HuggingFaceBase | ModuleBase, tuned: float) -> float:
    """Returns how large weights are at the base, by and large."""
    if not isinstance(base, ModuleBase):
        return tuned
    drawn = [parameter.init_std for parameter in base.parameters.values() if parameter.init_std]
    return max(tuned, median(drawn)) if drawn else tuned


def _tempered(own: PerParameter) -> PerParameter:
    """Returns an override that leaves its tensor trainable, and is one still. What starts at 0 does."""
    factors = {name: getattr(own, name) for name in ("lr_mult", "init_mult", "multiplier")}
    return own.model_copy(update={name: clamped(x, MULTIPLIERS) for name, x in factors.items() if x > 0})


def under_rule(recipe: Recipe, rule: Rule) -> Recipe:
    """Returns the recipe with other rules."""
    own = recipe.parametrization.model_copy(update={"rule": rule.value})
    return recipe.model_copy(update={"parametrization": own})
