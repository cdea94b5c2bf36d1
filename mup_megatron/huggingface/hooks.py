"""The plug-in's places in transformers: when a model is saved, and when the Trainer has made its optimizer."""

import logging
from collections import OrderedDict
from types import ModuleType
from typing import Any
from weakref import WeakSet

import wrapt
from transformers import PreTrainedModel

from mup_megatron.errors import InputError
from mup_megatron.modules.applied import applied_plan, applied_to, require_kept
from mup_megatron.modules.marker import KEY, marked, marker
from mup_megatron.modules.names import unwrapped
from mup_megatron.modules.optimizer_check import check_optimizer

_log = logging.getLogger(__name__)
_installed = False
_told: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose saving was warned of."""


def install() -> None:
    """Takes the places; the second time it does nothing."""
    global _installed
    if _installed:
        return
    _wrap(_save_pretrained, "save_pretrained", PreTrainedModel)
    _wrap(_from_pretrained, "from_pretrained", PreTrainedModel)
    wrapt.register_post_import_hook(_wrap_trainer, "transformers.trainer")
    _installed = True


def _wrap(wrapper: Any, name: str, owner: Any) -> None:
    # As it stands in the class: a class method is to be called on whichever class somebody has.
    setattr(owner, name, wrapt.FunctionWrapper(vars(owner)[name], wrapper))


def _wrap_trainer(module: ModuleType) -> None:
    _wrap(_create_optimizer, "create_optimizer", module.Trainer)


def _save_pretrained(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    applied = applied_to(instance)
    if applied is None:
        return wrapped(*args, **kwargs)
    require_kept(instance)
    config = instance.config
    before = getattr(config, KEY, None)
    setattr(config, KEY, marker(applied.fingerprint, applied.softmax_scale, applied.multipliers))
    try:
        result = wrapped(*args, **kwargs)
    finally:
        if before is None:
            delattr(config, KEY)
        else:
            setattr(config, KEY, before)
    if applied.changes_function and instance not in _told:
        _told.add(instance)  # the Trainer saves at every checkpoint
        _log.warning(
            "This model computes with %s, which the saved weights do not hold: loaded without mup_megatron it is "
            'another function. Call apply_plan(model, plan, initialize="keep") after loading it; "%s" in its '
            "config.json says which recipe.",
            applied.told(),
            KEY,
        )
    return result


def _from_pretrained(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    if (mark := marked(model)) is not None and mark.changes_function:
        model.register_forward_pre_hook(_warn_once_without_plan)
    return result


def _warn_once_without_plan(model: Any, args: Any) -> None:
    """Forward pre-hook: a loaded model is used, and whoever has not applied its plan by now has forgotten it."""
    model._forward_pre_hooks = OrderedDict(
        (key, hook) for key, hook in model._forward_pre_hooks.items() if hook is not _warn_once_without_plan
    )
    mark = marked(model)
    if mark is not None and applied_to(model) is None:
        _log.warning(
            "This model was trained with the recipe %s, with multipliers or a scale of attention that its weights do "
            "not hold, and no plan was applied to it since it was loaded: it is another function. Call "
            'apply_plan(model, plan, initialize="keep").',
            mark.fingerprint[:12],
        )


def _create_optimizer(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    given = args[0] if args else kwargs.get("model")  # the wrapped one, where it is made after wrapping
    model = unwrapped(instance.model if given is None else given)
    plan = applied_plan(model)
    require_kept(model)
    if plan is not None:
        if not getattr(instance, "is_deepspeed_enabled", False):  # there the engine's guard looks
            check_optimizer(instance.optimizer, plan, model)
    elif (mark := marked(model)) is not None:
        effect = ", so it is another function" if mark.changes_function else ""
        raise InputError(
            f"the model was trained with the recipe {mark.fingerprint[:12]}, and no plan was applied to it since it "
            f'was loaded{effect}. Call apply_plan(model, plan, initialize="keep") before the Trainer is made.'
        )
    return result
