"""When a mistake can be made with an architecture and a recipe, and changes anything."""

import fnmatch
from collections.abc import Callable

from mup_megatron.architectures.registry import depth_of
from mup_megatron.check.entries import (
    is_convolution,
    is_hidden,
)
from mup_megatron.check.measure.optimizers import rules_of
from mup_megatron.check.mutants.mutant import Context, Select
from mup_megatron.theory import PlanEntry
from mup_megatron.theory.widths import Scaling


def scales_eps(context: Context) -> bool:
    """Returns whether the optimizer has an eps that follows width."""
    return rules_of(context.recipe).eps is not None


def has_second_beta(context: Context) -> bool:
    """Returns whether the optimizer has a second beta."""
    return "adam_beta2" in rules_of(context.recipe).hyperparameters


def is_untied(context: Context) -> bool:
    """Returns whether the readout has a weight of its own."""
    return not context.target.tied


def is_tied(context: Context) -> bool:
    """Returns whether the readout's weight is the embedding's."""
    return context.target.tied


def is_rotary(context: Context) -> bool:
    """Returns whether positions turn queries and keys; those of latent attention they always do."""
    return context.target.position_embedding_type == "rope" or context.target.multi_latent_attention


def has_several_layers(context: Context) -> bool:
    """Returns whether there is more than one layer."""
    return context.target.num_layers > 1


def heads_grow(context: Context) -> bool:
    """Returns whether heads are larger than the base's."""
    return context.base.head_size != context.target.head_size


def changes_softmax_scale(context: Context) -> bool:
    """Returns whether attention needs to be told another scale than it uses by itself."""
    return context.recipe.plan(context.target).changes_softmax_scale


def has_own_softmax_scale(context: Context) -> bool:
    """Returns whether attention has a scale of its own other than 1/√(head size), as with YaRN's factor."""
    return context.target.stock_softmax_scale is not None


def has_one_branch(context: Context) -> bool:
    """Returns whether a layer is one branch, as in a hybrid model, and not two."""
    return any(stack.branches == 1 for stack in context.recipe.plan(context.target).stacks.values())


def has_multiplier(key: str) -> Callable[[Context], bool]:
    """Makes a condition: whether a multiplier of the recipe is other than 1."""
    return lambda context: bool(getattr(context.recipe.moved, key) != 1.0)


def sides_differ(context: Context) -> bool:
    """Returns whether some hidden tensor has an r_in other than its r_out."""
    return any(r.r_in != r.r_out for r in _hidden_ratios(context))


def has_several_ratios(context: Context) -> bool:
    """Returns whether some hidden tensor's side grows otherwise than the hidden size."""
    return any(side != context.r for r in _hidden_ratios(context) for side in (r.r_in, r.r_out))


def any_where(select: Select, when: Callable[[PlanEntry, Context], bool]) -> Callable[[Context], bool]:
    """Makes a condition: whether something holds of a tensor of a kind."""

    def found(context: Context) -> bool:
        return any(select(e) and when(e, context) for e in context.recipe.plan(context.target).entries)

    return found


def _hidden_ratios(context: Context) -> list[Scaling]:
    return [context.ratios[e.name] for e in context.recipe.plan(context.target).entries if is_hidden(e)]


def has_convolutions(context: Context) -> bool:
    """Returns whether channels are convolved, as in layers of a state space."""
    return any(is_convolution(entry) for entry in context.recipe.plan(context.target).entries)


def has_fused_queries(context: Context) -> bool:
    """Returns whether queries, keys and values are made by one weight."""
    return bool(context.fused)


def has_linear_biases(context: Context) -> bool:
    """Returns whether linear layers have biases."""
    return context.target.bias_on_qkv


def has_biases(context: Context) -> bool:
    """Returns whether anything has biases, norms included."""
    return context.target.bias_on_qkv or context.target.normalization == "LayerNorm"


def gains_start_at_1(context: Context) -> bool:
    """Returns whether gains are stored as they are, and not as their distance from 1."""
    return not context.target.apply_layernorm_1p


def has_weight_decay(context: Context) -> bool:
    """Returns whether there is any weight decay."""
    return context.recipe.moved.weight_decay > 0


def weight_decay_follows_rates(context: Context) -> bool:
    """Returns whether weight decay is multiplied where a learning rate is divided."""
    return has_weight_decay(context) and context.recipe.parametrization.weight_decay_exponent > 0


def has_clipping(context: Context) -> bool:
    """Returns whether gradients are clipped."""
    return context.recipe.moved.clip_grad > 0


def depth_differs(context: Context) -> bool:
    """Returns whether there are other layers than at the base."""
    return depth_of(context.base) != depth_of(context.target)


def has_depth_rule(context: Context) -> bool:
    """Returns whether a rule of depth has anything to say."""
    return context.recipe.parametrization.depth is not None and depth_differs(context)


def moves_rates_with_depth(context: Context) -> bool:
    """Returns whether it moves learning rates."""
    deepened = context.recipe.plan(context.target).deepened.values()
    return has_depth_rule(context) and any(each.lr != 1.0 for each in deepened)


def has_own_rates(context: Context) -> bool:
    """Returns whether the recipe gives some of these tensors learning rates of their own."""
    return any(own.lr_mult != 1.0 and not _elsewhere(own.match, context) for own in context.recipe.per_parameter)


def _elsewhere(match: str, context: Context) -> bool:
    return not any(fnmatch.fnmatchcase(name, match) for name in context.ratios)
