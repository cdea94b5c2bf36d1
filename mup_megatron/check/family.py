"""The models that a target is checked on: of its architecture, at several small widths, and the recipe under stress.

Every dimension that differs between the recipe's base and the target grows with the width here too; what the two share
(a fixed ffn, a fixed number of key/value groups) stays fixed. Head size, ffn ratio, depth and code path are the
target's. Vocabulary and sequence, which no rule depends on, are cut to what a quick run can afford.
"""

from collections.abc import Sequence
from statistics import median

from mup_megatron.check.measurements import Protocol, Quantity, Run
from mup_megatron.errors import InputError
from mup_megatron.models.model_file import ModelFile
from mup_megatron.recipe import Recipe, Schedule
from mup_megatron.theory import Plan, Rule

SMALLEST = 32
"""Below this a width says more about itself than about the limit of many."""
VOCABULARY = 256
SEQUENCE = 32
WARM_UP = 0.25
FLOOR = 0.1
"""Of the peak, at least; else the last steps would have no learning rate to look at."""
DECAY = 0.4
"""How much weight decay alone shrinks a weight over the run, at least: so much that a wrong one shows."""
MOVEMENT = 0.125
"""How far one step at the peak moves a hidden weight, in units of its initial std, at least."""

EPS_SHARE = 0.1
"""The eps of a check, relative to the gradients: it acts, and Adam is Adam still."""
PILOT = Protocol(steps=3, recorded=(3,), spectral=False)
"""How the run is trained that shows how large gradients are."""


def widths_for(target: ModelFile, recipe: Recipe, count: int, *, tensor_parallel: int = 1) -> list[int]:
    """The hidden sizes of a check: small multiples of the least that keeps whole heads and groups, and that so many
    tensor-parallel ranks can share.

    Raises:
        InputError: not even a model of the target's width can be shared so.
    """
    unit = _unit(target, recipe)
    smallest = -(-SMALLEST // unit) * unit
    while True:
        widths = [smallest * 2**i for i in range(count)]
        try:
            for model in models_for(target, recipe, widths).values():
                model.require_tensor_parallel(tensor_parallel)
            return widths
        except InputError:
            if smallest > target.hidden_size:
                raise
            smallest *= 2


def _unit(target: ModelFile, recipe: Recipe) -> int:
    """The hidden size that goes with the least number of heads."""
    heads = 1 if _holds_groups(target, recipe) else target.num_attention_heads // target.query_groups
    if _holds_groups(target, recipe):
        heads = target.query_groups
    size, rest = divmod(target.hidden_size * heads, target.num_attention_heads)
    while rest:
        heads *= 2
        size, rest = divmod(target.hidden_size * heads, target.num_attention_heads)
    return size


def at_width(target: ModelFile, recipe: Recipe, width: int) -> ModelFile:
    """The target's architecture at another hidden size.

    Raises:
        InputError: it cannot be built at that width; says what would fit.
    """
    unit = _unit(target, recipe)
    if width < unit or width % unit:
        raise InputError(
            f"--widths {width}: the target has {target.num_attention_heads} heads of {target.head_size} at hidden_size "
            f"{target.hidden_size}, so a model of its shape needs a multiple of {unit}. Choose such widths."
        )
    heads = target.num_attention_heads * width // target.hidden_size
    ffn = target.ffn_size
    if not _holds_ffn(target, recipe):
        ffn = max(1, round(target.ffn_size * width / target.hidden_size))
    groups = target.query_groups
    if target.group_query_attention and not _holds_groups(target, recipe):
        groups = target.query_groups * heads // target.num_attention_heads
    vocabulary = min(target.vocab_size, VOCABULARY)
    length = min(target.seq_length, SEQUENCE)
    changes = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "kv_channels": target.head_size,
        "ffn_hidden_size": ffn,
        "num_query_groups": groups if target.group_query_attention else 1,
        "vocab_size": vocabulary,
        "make_vocab_size_divisible_by": min(target.make_vocab_size_divisible_by, 32),
        "seq_length": length,
        "max_position_embeddings": length if target.max_position_embeddings is not None else None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    return target.model_copy(update=changes)


def _holds_ffn(target: ModelFile, recipe: Recipe) -> bool:
    base = recipe.megatron_base
    return base.hidden_size != target.hidden_size and base.ffn_size == target.ffn_size


def _holds_groups(target: ModelFile, recipe: Recipe) -> bool:
    base = recipe.megatron_base
    return (
        target.group_query_attention
        and base.num_attention_heads != target.num_attention_heads
        and base.query_groups == target.query_groups
    )


def stressed(recipe: Recipe, *, steps: int, eps: float | None = None) -> Recipe:
    """The recipe with values at which a mistake shows within `steps`.

    The same base, multipliers, overrides and rules. A learning rate that moves weights visibly, a floor above 0, weight
    decay that acts within the run, an eps of the gradients' size; a warm-up and a decay, however short.

    Args:
        recipe: as tuned.
        steps: of the run.
        eps: at the base, if the optimizer has one.
    """
    h = recipe.hyperparameters
    changes: dict[str, float] = {}
    if recipe.parametrization.optimizer == "adam":
        changes["lr"] = max(h.lr, MOVEMENT * h.init_method_std)
        # The mean of the schedule below is a little above half of its peak.
        changes["weight_decay"] = max(h.weight_decay, DECAY / (0.5 * steps * changes["lr"]))
        if eps is not None:
            changes["adam_eps"] = max(h.adam_eps, eps)
    lr = changes.get("lr", h.lr)
    changes["min_lr"] = max(h.min_lr * lr / h.lr, FLOOR * lr)
    return recipe.model_copy(
        update={
            "hyperparameters": h.model_copy(update=changes),
            "schedule": Schedule(lr_decay_style="linear", lr_warmup_fraction=WARM_UP),
        }
    )


def models_for(target: ModelFile, recipe: Recipe, widths: Sequence[int]) -> dict[int, ModelFile]:
    """Width → model."""
    return {width: at_width(target, recipe, width) for width in widths}


def eps_from(pilot: Run, plan: Plan) -> float | None:
    """The eps of a check at the base: a share of the gradients, which follow the base as the rule for eps has it.

    Args:
        pilot: a correct run.
        plan: that it was trained with.
    """
    at_base = [
        value * plan.adam_eps / entry.eps
        for key, value in pilot.values.items()
        if key.quantity is Quantity.GRADIENT and (entry := plan[key.name]).eps is not None and value > 0
    ]
    return EPS_SHARE * median(at_base) if at_base else None


def under_rule(recipe: Recipe, rule: Rule) -> Recipe:
    """The recipe with other rules."""
    own = recipe.parametrization.model_copy(update={"rule": rule.value})
    return recipe.model_copy(update={"parametrization": own})
