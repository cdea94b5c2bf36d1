"""A plan → a live torch module: initial weights, multipliers, attention scale. Holds no theory.

Nothing is touched where nothing changes, so that a plan at its base leaves a module as it is.
"""

from collections.abc import Iterator

import torch

from mup_megatron.errors import InputError
from mup_megatron.live import hooks
from mup_megatron.live.applied import note_applied
from mup_megatron.modules import weights
from mup_megatron.modules.applied import (
    BRANCH_OUTPUT,
    is_marked,
    leave_mark,
    require_match,
)
from mup_megatron.modules.attention import attention_modules, scale_attribute
from mup_megatron.modules.marker import Mark, marked
from mup_megatron.modules.names import named_modules, named_parameters, unwrapped
from mup_megatron.modules.parameters import TABLES, linear_sides
from mup_megatron.modules.weights import Initialize
from mup_megatron.theory import BRANCH, READOUT, Acts, Place, Plan, PlanEntry, Site


def apply_plan(model: torch.nn.Module, plan: Plan, *, initialize: Initialize = Initialize.RESCALE) -> None:
    """Makes a freshly built module what the plan says. Under ZeRO-3 and FSDP2 every rank has to call it.

    Call it once, on the module that the plan was made for, before the optimizer is built. `fully_shard` may come before
    or after it, FullyShardedDataParallel after it; a module from the meta device is sharded, emptied (`to_empty`) and
    then drawn with `initialize="redraw"`.

    Args:
        model: wrapped or not. Its parameters may be partitioned by `deepspeed.zero.Init`.
        plan: with the names of `model.named_parameters()`, without wrappers.
        initialize: what happens to the weights. "redraw" sets buffers too, by the `reset_parameters()` of the modules
            that have them, or as a Hugging Face model does.

    Raises:
        InputError: the module cannot be made what the plan says; before anything is changed.
    """
    if initialize not in list(Initialize):
        raise InputError(f"initialize is {initialize!r}. Say one of {', '.join(Initialize)}.")
    how = Initialize(initialize)
    _require_order(model, how)
    weights.reshard(model)
    whole, model = model, unwrapped(model)
    require_match(model, plan)
    _require_mark(model, plan, how)
    if any(is_marked(module) or hooks.found(module) for module in model.modules()):
        raise InputError(
            "a plan was applied to this model already, or to the one that it is a copy of. Build the model anew, or "
            "apply one plan only."
        )
    require_scalable(model, plan)
    _require_multipliable(model, plan)
    weights.initialize(model, plan, how)
    if how is Initialize.REDRAW:
        weights.agree(whole)
    set_attention_scale(model, plan)
    hooks.attach(dict(named_modules(model)), [*(site for site, _, _, _ in _uses(model, plan)), *_branches(plan)])
    note_applied(model, plan)
    leave_mark(model, plan, _multipliers(model, plan))


# ---- what cannot be done right -------------------------------------------------------------------------------------


def _require_mark(model: torch.nn.Module, plan: Plan, how: Initialize) -> None:
    """Raises InputError for weights that would be another function, or that are not to be touched.

    A recipe that differs in learning rates alone may go on with them.
    """
    mark = marked(model)
    if mark is None:
        return
    if how is not Initialize.KEEP:
        raise InputError(
            f"the configuration says that the weights were trained with the recipe {mark.fingerprint[:12]}. If they "
            'were loaded, say initialize="keep"; if they are drawn anew, take "mup_megatron" out of the configuration.'
        )
    if mark.fingerprint == plan.fingerprint:
        return
    difference = difference_of(mark, model, plan)
    if difference is not None:
        raise InputError(
            f"the weights were trained with the recipe {mark.fingerprint[:12]}, and the plan is of "
            f"{plan.fingerprint[:12]}: {difference}, so they would be another function. Apply the plan of the recipe "
            "that they were trained with."
        )


def difference_of(mark: Mark, model: torch.nn.Module, plan: Plan) -> str | None:
    """Says in what a plan would make another function of a model than a mark says, in a sentence; None in nothing."""
    return mark.difference(plan.softmax_scale if plan.changes_softmax_scale else None, _multipliers(model, plan))


def _require_order(model: torch.nn.Module, how: Initialize) -> None:
    """Raises InputError for a model that was sharded or emptied too early."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InputError(
                f"{name or type(model).__name__}: wrapped in FullyShardedDataParallel before the plan was applied, so "
                "its weights are in pieces. Call apply_plan first and wrap the model then."
            )
    for name, parameter in named_parameters(model):
        if parameter.is_meta and how is not Initialize.KEEP:
            raise InputError(
                f"{name} is on the meta device, where there is nothing to draw. Call to_empty(device=…) first, after "
                'fully_shard if that is used, and then apply_plan(model, plan, initialize="redraw").'
            )


# ---- attention -----------------------------------------------------------------------------------------------------


def require_scalable(model: torch.nn.Module, plan: Plan) -> None:
    """Raises InputError unless every attention can be told its scale, where the plan changes it."""
    if not plan.changes_softmax_scale:
        return
    found = list(attention_modules(model))
    if not found:
        raise InputError(
            f"the plan's attention scale is {plan.softmax_scale:g}, and the model has no attention that says its "
            "scale. Use attention_multiplier 1 and a base of the target's head size, or give the attention module a "
            "float `scaling` and an integer `head_dim`."
        )
    for name, module, attention in found:
        if attention.scale is None and plan.attention(name).changes:
            raise InputError(
                f"{name}: {type(module).__name__} has no scale to set and would go on with 1/√head_dim. Use "
                "attention_multiplier 1 and a base of the target's head size, or an attention with a `scaling`."
            )


def set_attention_scale(model: torch.nn.Module, plan: Plan) -> None:
    """Tells the attentions of a model the plan's scale."""
    for name, module, attention in attention_modules(model):
        site = plan.attention(name)
        if not site.changes:
            continue
        key = scale_attribute(module)
        assert key is not None
        # A layer may have a scale of its own, as with GPT-2's scale_attn_by_inverse_layer_idx.
        own = 1.0 if attention.scale is None else attention.scale / site.stock
        setattr(module, key, site.factor if own == 1.0 else site.factor * own)


# ---- multipliers ---------------------------------------------------------------------------------------------------


def _require_multipliable(model: torch.nn.Module, plan: Plan) -> None:
    uses = list(_uses(model, plan))
    sites = [site for site, _, _, entry in uses if entry.name == plan.readout]
    if plan.output_multiplier != plan.stock_readout_ratio and sites and all(s.acts is Acts.OUTPUT for s in sites):
        raise InputError(
            f"{plan.readout}: the readout is tied, and no layer of the model computes it, so its multiplier has no "
            "place. Make it a Linear that shares the embedding's weight."
        )
    for site, module, attribute, entry in uses:
        if site.changes and not _is_layer(module, attribute):
            raise InputError(
                f"{entry.name}: {type(module).__name__} has no place for a multiplier of this weight. Take it out of "
                "per_parameter, or give the weight init_mult and lr_mult instead."
            )


def _multipliers(model: torch.nn.Module, plan: Plan) -> dict[str, float]:
    """Name of a weight in a layer that uses it, or of a branch → what has to be multiplied there, if not by 1."""
    weights = {
        f"{site.module}.{attribute}".lstrip("."): site.factor / site.stock
        for site, _, attribute, _ in _uses(model, plan)
        if site.changes
    }
    written = {f"{s.module}.{BRANCH_OUTPUT}": s.factor / s.stock for s in _branches(plan) if s.changes}
    return weights | written


def _branches(plan: Plan) -> list[Site]:
    """Returns the outputs of what writes into the residual stream."""
    return [plan.site(place) for place in plan.places if place.carries == BRANCH]


def _is_layer(module: torch.nn.Module, attribute: str) -> bool:
    """Returns whether a module's own call multiplies its first input by a weight, or looks it up."""
    # Torch's attention multiplies three inputs by one weight, and never calls the layer that holds another one.
    if isinstance(module, torch.nn.MultiheadAttention | torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, TABLES) or linear_sides(module, attribute) is not None


def _uses(model: torch.nn.Module, plan: Plan) -> Iterator[tuple[Site, torch.nn.Module, str, PlanEntry]]:
    """(site, module, attribute, entry) of each weight in each module that uses it.

    A tied table is used twice: where it is looked up it carries its own multiplier, and the readout's where it is read.
    """
    name_of = {id(parameter): name for name, parameter in named_parameters(model)}
    for name, module in named_modules(model):
        acts = Acts.OUTPUT if isinstance(module, TABLES) else Acts.INPUT
        for attribute, parameter in module.named_parameters(recurse=False):
            entry = plan[name_of[id(parameter)]]
            reads_out = acts is Acts.INPUT and (entry.is_embedding or entry.name == plan.readout)
            if not entry.is_vector:
                yield plan.site(Place(name, acts, READOUT if reads_out else entry.name)), module, attribute, entry
