"""A plan → a built model of Megatron-Core's: initial weights, multipliers, attention scale. Holds no theory.

Nothing is touched where nothing changes, so that a plan at its base leaves the model as it is.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mup_megatron.architectures.registry import architectures
from mup_megatron.collectives import raise_together
from mup_megatron.errors import InputError
from mup_megatron.live import hooks
from mup_megatron.live.applied import note_applied, plan_applied_to
from mup_megatron.megatron import branches
from mup_megatron.megatron.names import named_modules, named_parameters, require_match, unwrapped
from mup_megatron.megatron.versions import native_mup
from mup_megatron.theory import Acts, Plan, PlanEntry, Property

__all__ = ["applied_plan", "apply_plan", "configure", "softmax_scales"]


def configure(config: Any, plan: Plan) -> None:
    """Puts the plan's attention scale into a TransformerConfig from which a model is about to be built.

    `apply_plan` sets the scale in a built model too; this is for attention that takes it at construction only. An
    unchanged scale stays unset.
    """
    refuse_native(config)
    if plan.changes_softmax_scale:
        config.softmax_scale = plan.softmax_scale


def apply_plan(model_chunks: Sequence[torch.nn.Module], plan: Plan, *, initialize: bool = True) -> None:
    """Makes this rank's part of a freshly built model what the plan says. Collective: every rank has to call it.

    Call it once, before the optimizer is built, on the model as Megatron's own initialisation left it: the stock draw
    is rescaled, never drawn again, so that seeds and layouts give what they gave before.

    Args:
        model_chunks: the rank's models, one for each virtual pipeline stage; wrapped or not.
        plan: for the whole model.
        initialize: False where the weights are about to be loaded from a checkpoint.

    Raises:
        InputError: the model cannot be made what the plan says; the same on every rank, and before anything is changed.
    """
    models = [unwrapped(chunk) for chunk in model_chunks]
    problems = [problem for model in models for problem in _problems(model, plan)]
    if initialize and not problems:
        problems = [problem for model in models for problem in _draw_problems(model)]
    raise_together(problems)
    require_match(models, plan)
    if initialize:
        with torch.no_grad():
            for model in models:
                for name, parameter in named_parameters([model], tied=plan.tied):
                    _initialize(parameter, plan[name], _config_of(model, plan[name]))
    for model in models:
        _set_softmax_scale(model, plan)
        modules = dict(named_modules(model))
        hooks.attach(modules, plan.sites)
        branches.attach(modules, plan.sites)
        note_applied(model, plan)


def applied_plan(chunk: torch.nn.Module) -> Plan | None:
    """Returns the plan that was applied to a model, wrapped or not; None if none was."""
    return plan_applied_to(unwrapped(chunk))


def refuse_native(config: Any) -> None:
    """Raises InputError if Megatron's own μP is on: the two would multiply."""
    if native_mup(config):
        raise InputError(
            "use_mup: Megatron's own μP is on, and the plan would scale everything a second time. "
            "Turn it off (drop --use-mup and the other --mup-* settings of Megatron)."
        )


# ---- what cannot be done right -------------------------------------------------------------------------------------


_OTHER_KINDS = {
    "LLaVAModel": "a multimodal model",
    "MimoModel": "a multimodal model",
}
"""Megatron-Core's models that no architecture is for, some of which look like one: class → what it is."""


def _foreign(model: torch.nn.Module, plan: Plan) -> str | None:
    """Returns why a model is none that the plan is for, as far as its class says; its parameters are compared later."""
    classes = [kind.__name__ for kind in type(model).__mro__]
    own = architectures()[plan.architecture]
    if set(own.live_classes) & set(classes):
        return None
    others = {name: each.description for each in architectures().values() for name in each.live_classes}
    remedy = f"Supported are {', '.join(each.live_classes[0] for each in architectures().values())}."
    if (what := next((others[name] for name in classes if name in others), None)) is not None:
        remedy = "Give the file of the model that is built."
    elif (what := next((_OTHER_KINDS[name] for name in classes if name in _OTHER_KINDS), None)) is None:
        if set(plan.stacks) <= {name for name, _ in model.named_children()}:
            return None
        what = f"a model without a {', '.join(plan.stacks)}"
    return f"the model is a {type(model).__name__}, {what}, and the plan is for {own.description}. {remedy}"


def _problems(model: torch.nn.Module, plan: Plan) -> list[str]:
    from megatron.core.fp8_utils import is_float8tensor

    foreign = _foreign(model, plan)
    if foreign is not None:
        return [foreign]
    config: Any = model.config
    problems = []
    if plan_applied_to(model) is not None:
        problems.append("A plan was applied to this model already. Build the model anew, or apply one plan only.")
    try:
        refuse_native(config)
    except InputError as error:
        problems.append(str(error))
    if config.fp8_param or any(is_float8tensor(p) for p in model.parameters()):
        problems.append(
            "fp8_param: weights that are stored in FP8 cannot be rescaled without loss. "
            "Keep them in higher precision (drop --fp8-param-gather); FP8 arithmetic may stay on."
        )
    if config.fp4_param:
        problems.append(
            "fp4_param: weights that are stored in FP4 cannot be rescaled without loss. "
            "Keep them in higher precision (drop --fp4-param-gather); FP4 arithmetic may stay on."
        )
    if plan.changes_softmax_scale:
        problems += [
            f"{name}: this attention ({type(module).__name__}) has no softmax_scale to set, so it would go on with its "
            "own. Use Megatron's local or Transformer Engine attention, or a base of the target's head size and "
            "attention_multiplier 1."
            for name, module in core_attentions(model)
            if not _scaled_parts(module)
        ]
        if config.flash_decode:
            problems.append(
                "flash_decode: this decoding takes no attention scale and would go on with 1/√d. Turn it off, or "
                "use a base of the target's head size and attention_multiplier 1."
            )
    modules = dict(named_modules(model))
    return [*problems, *_multiplier_problems(modules, plan), *branches.problems(model, modules, plan.sites)]


def _multiplier_problems(modules: Mapping[str, torch.nn.Module], plan: Plan) -> list[str]:
    return [
        f"{name}.weight: a multiplier cannot act through the norm that is fused into this layer. "
        "Use transformer_impl local, or fold the multiplier (init_mult and lr_mult by the same factor)."
        for name in hooks.wanted(plan.sites)
        if hasattr(modules.get(name), "layer_norm_weight")
    ]


# ---- initial weights -----------------------------------------------------------------------------------------------


def _draw_problems(model: torch.nn.Module) -> list[str]:
    """Returns why Megatron's draw cannot be rescaled, if it cannot."""
    config: Any = model.config
    if any(parameter.is_meta for parameter in model.parameters()):
        return [
            "The weights are on the meta device: they will be drawn later, unscaled. Build the model on its device "
            "(drop --init-model-with-meta-device), or pass initialize=False for weights that are loaded."
        ]
    if not config.perform_initialization:
        return [
            "perform_initialization is off, so there is no draw to rescale. Turn it on, or pass initialize=False "
            "for weights that are loaded."
        ]
    return [
        f"{name}: the model was not drawn with Megatron's normal initialiser, so its std is unknown. "
        "Drop --init-method-xavier-uniform or the custom init method; the recipe says what the std is."
        for name in ("embedding_init_method", "init_method", "output_layer_init_method")
        if _std(getattr(config, name)) is None
    ]


def _config_of(model: torch.nn.Module, entry: PlanEntry) -> Any:
    """Returns the configuration that a weight was drawn with: its stack's, where stacks have their own."""
    return getattr(getattr(model, entry.stack, None), "config", model.config)


def stock_std(entry: PlanEntry, config: Any) -> float | None:
    """Returns the std with which Megatron draws a weight; None for another draw than its normal one."""
    # A readout is drawn as other weights are, except by native μP, which is refused.
    if entry.is_embedding:
        return _std(config.embedding_init_method)
    return _std(config.output_layer_init_method if entry.is_residual else config.init_method)


def _std(init_method: Callable[..., Any]) -> float | None:
    """Returns the std of one of Megatron's normal initialisers; None for any other."""
    if isinstance(init_method, functools.partial) and init_method.func is torch.nn.init.normal_:
        return float(init_method.keywords["std"])
    return None


def _initialize(parameter: torch.nn.Parameter, entry: PlanEntry, config: Any) -> None:
    if entry.init_std is None:
        if entry.folded != 1.0 or (entry.init_value is not None and Property.FOLDED in entry.properties):
            assert entry.init_value is not None
            parameter.fill_(entry.init_value)
        return
    drawn = stock_std(entry, config)
    assert drawn is not None
    if entry.init_std != drawn:
        parameter.mul_(entry.init_std / drawn)


# ---- attention -----------------------------------------------------------------------------------------------------


def core_attentions(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Returns (name, module) of what computes attention in each layer of a model that is not wrapped."""
    return [(name, module) for name, module in model.named_modules() if name.endswith("_attention.core_attention")]


def _scaled_parts(core_attention: torch.nn.Module) -> list[Any]:
    """Returns the modules that hold a scale: Megatron's attention itself, or each of Transformer Engine's back ends."""
    return [part for part in core_attention.modules() if isinstance(getattr(part, "softmax_scale", None), float)]


def _layer_coefficient(part: Any) -> float:
    # With apply_query_key_layer_scaling Megatron's own attention divides its scale by the layer's number and multiplies
    # it back inside the softmax.
    coefficient = getattr(getattr(part, "scale_mask_softmax", None), "scale", None)
    return 1.0 if coefficient is None else float(coefficient)


def part_scales(core_attention: torch.nn.Module) -> list[float]:
    """Returns the scale that each part of an attention says it uses; nothing where it has no such attribute."""
    return [part.softmax_scale * _layer_coefficient(part) for part in _scaled_parts(core_attention)]


def softmax_scales(chunk: torch.nn.Module) -> dict[str, float]:
    """Returns the scale that each attention of a live model says it uses, by module name; where back ends differ, the
    first's.
    """
    return {name: scales[0] for name, module in core_attentions(unwrapped(chunk)) if (scales := part_scales(module))}


def _set_softmax_scale(model: torch.nn.Module, plan: Plan) -> None:
    modules: dict[str, Any] = dict(named_modules(model))
    for site in plan.sites:
        if site.acts is not Acts.SCALE or not site.changes:
            continue
        config: Any = model.config
        config.softmax_scale = site.factor
        if site.module not in modules:
            continue
        for part in _scaled_parts(modules[site.module]):
            part.softmax_scale = site.factor / _layer_coefficient(part)
        # Dynamic inference bypasses core_attention and looks for the scale here; without it, it would use 1/√d.
        modules[site.module.rpartition(".")[0]].softmax_scale = site.factor
