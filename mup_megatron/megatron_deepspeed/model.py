"""A plan → a model that the fork has just built: initial weights, multipliers, attention scale. Holds no theory.

As `megatron/model.py` does it for Megatron-Core: what was drawn is multiplied, never drawn again, and nothing is hooked
where a multiplier is 1. It imports nothing of Megatron.
"""

import contextlib
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mup_megatron.architectures.names import READOUT_WEIGHT
from mup_megatron.collectives import gathered, raise_together
from mup_megatron.errors import InputError
from mup_megatron.live import hooks
from mup_megatron.megatron_deepspeed.names import is_pipe, mismatches, named_parameters, unwrapped
from mup_megatron.theory import Acts, Plan, PlanEntry
from mup_megatron.theory.rules import default_softmax_scale


@dataclass(frozen=True, slots=True)
class Drawn:
    """The values by which the fork drew the weights of a model."""

    init_method_std: float
    num_layers: int
    """Of the whole model."""
    tensor_parallel: int

    def std(self, entry: PlanEntry) -> float:
        """Returns the std with which it draws a weight."""
        return self.init_method_std / math.sqrt(2.0 * self.num_layers) if entry.is_residual else self.init_method_std


def apply_plan(chunks: Sequence[torch.nn.Module], plan: Plan, drawn: Drawn, *, initialize: bool) -> None:
    """Makes this rank's part of a freshly built model what the plan says. Collective: every rank has to call it.

    All but the readout's multiplier where the readout is no module of its own: that is `scale_head_input`.

    Args:
        chunks: what this rank holds, wrapped or not.
        plan: for the whole model.
        drawn: how the fork drew the weights.
        initialize: False where the fork left the weights undrawn, because they are about to be loaded.

    Raises:
        InputError: the model cannot be made what the plan says; the same on every rank, and before anything is changed.
    """
    models = [unwrapped(chunk) for chunk in chunks]
    everywhere = set().union(*gathered({name for _, name, _ in named_parameters(models)}))
    raise_together(mismatches(models, plan, drawn.tensor_parallel, everywhere=everywhere))
    raise_together([problem for model in models for problem in _attention_problems(model, plan)])
    if any(site.acts is Acts.BRANCH and site.changes for site in plan.sites):
        raise InputError(
            "residual_multiplier and parametrization.depth: the fork's layers have no place for the multiplier of a "
            "residual branch. Train with Megatron-LM, or take both out of the recipe."
        )
    if initialize:
        for _, name, parameter in named_parameters(models):
            entry = plan[name]
            if entry.init_std is not None and entry.init_std != drawn.std(entry):
                _multiply(parameter, entry.init_std / drawn.std(entry))
    for model in models:
        _set_attention_scale(model, plan)
        hooks.attach(_multiplied_modules(model, plan), plan.sites)


def _multiply(parameter: torch.nn.Parameter, factor: float) -> None:
    with _whole(parameter), torch.no_grad():
        parameter.mul_(factor)


def _whole(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """Within it a parameter is whole that ZeRO-3 keeps in pieces; the first rank's changes stay."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    zero: Any = importlib.import_module("deepspeed").zero
    gathered_parameter: contextlib.AbstractContextManager[Any] = zero.GatheredParameters(parameter, modifier_rank=0)
    return gathered_parameter


# ---- attention -----------------------------------------------------------------------------------------------------


def _attentions(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of what computes attention. By class: DeepSpeed's sequence parallelism puts it elsewhere."""
    known = ("CoreAttention", "FlashSelfAttention", "FlashSelfAttentionTriton")
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ in known]


def _attention_problems(model: torch.nn.Module, plan: Plan) -> list[str]:
    if not plan.changes_softmax_scale:
        return []
    found = _attentions(model)
    remedy = "Use another attention, or a base of the target's head size and attention_multiplier 1."
    problems = [
        f"{name}: the fork's Triton attention ignores the scale that it is given. {remedy}"
        for name, module in found
        if type(module).__name__ == "FlashSelfAttentionTriton"
    ]
    problems += [
        f"{name}: this attention divides by {module.norm_factor:g} and not by the root of the head size, so it is not "
        f"known how to scale it. {remedy}"
        for name, module in found
        if type(module).__name__ == "CoreAttention" and not _is_stock(module, plan)
    ]
    projections = [name for _, name, _ in named_parameters([model]) if name.endswith("linear_qkv.weight")]
    if len(found) != len(projections):
        problems.append(
            f"there are {len(projections)} attention layers and {len(found)} modules that a scale can be set in, so "
            f"some would go on with their own. {remedy}"
        )
    return problems


def _is_stock(core_attention: Any, plan: Plan) -> bool:
    # With query-key layer scaling it divides by the layer's number as well, which the softmax multiplies back.
    coefficient = core_attention.scale_mask_softmax.scale
    scale = (1.0 if coefficient is None else coefficient) / core_attention.norm_factor
    return math.isclose(scale, default_softmax_scale(plan.head_size), rel_tol=1e-9)


def _set_attention_scale(model: torch.nn.Module, plan: Plan) -> None:
    if not plan.changes_softmax_scale:
        return
    for _, module in _attentions(model):
        if type(module).__name__ == "CoreAttention":
            module.norm_factor *= default_softmax_scale(plan.head_size) / plan.softmax_scale
        else:
            module.softmax_scale = plan.softmax_scale


# ---- multipliers ---------------------------------------------------------------------------------------------------


def _multiplied_modules(model: torch.nn.Module, plan: Plan) -> dict[str, torch.nn.Module]:
    """By the plan's names, the modules of a model whose own call uses their weight."""
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    return {
        plan[name].module: owners[id(parameter)]
        for _, name, parameter in named_parameters([model])
        if name != READOUT_WEIGHT or is_pipe(model)  # GPTModel uses the readout's weight alone, never its module
    }
