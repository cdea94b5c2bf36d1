"""The plug-in's places in DeepSpeed's engine, the Hugging Face Trainer and Accelerate.

Methods are replaced when their modules are imported, or at once where they have been already. The engine's construction
is one of them, so it does not matter through whom `deepspeed.initialize` is called. Without an entry everything is
passed on unchanged.
"""

import gc
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import wrapt

from mup_megatron.deepspeed import no_entry, planning, resume, run, versions
from mup_megatron.deepspeed.entry import KEY, drop_auto, has_entry
from mup_megatron.errors import InputError
from mup_megatron.messages import complain_when_uncaught

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]

_installed = False
_required = False
"""The launcher was told that the script trains by a recipe."""
_used = False
_missing: list[str] = []
"""Places that the installed packages do not have. That matters to an engine with an entry, and to no other."""


def require_entry() -> None:
    """From now on every engine that trains has to have the entry: a configuration that lacks it is refused at start."""
    global _required
    _required = True


def require_used() -> None:
    """Raises InputError if no engine with an entry was built, nor one of a model with a plan."""
    if not _used:
        versions.require_complete(_missing)
        raise InputError(
            f'--deepspeed: the script built no engine with a "{KEY}" entry, so nothing was trained by a recipe. Does '
            "it call deepspeed.initialize?"
        )


def install() -> None:
    """Takes the places; the second time it does nothing.

    Raises:
        InputError: an engine with an entry was built before, so the entry had no effect.
    """
    global _installed
    if _installed:
        return
    _require_none_built(sys.modules.get("deepspeed.runtime.engine"))
    for module, places in _PLACES.items():
        wrapt.register_post_import_hook(partial(_wrap, places), module)
    _installed = True


def _wrap(places: Mapping[str, Mapping[str, Wrapper]], module: ModuleType) -> None:
    for class_name, methods in places.items():
        owner = getattr(module, class_name, None)
        for name, wrapper in methods.items():
            if hasattr(owner, name):
                setattr(owner, name, wrapt.FunctionWrapper(getattr(owner, name), wrapper))
            else:
                _missing.append(f"{module.__name__}.{class_name}.{name}")


def _require_none_built(module: ModuleType | None) -> None:
    """An engine may have been built before this package was imported: DeepSpeed passed over its entry in silence."""
    engine = getattr(module, "DeepSpeedEngine", None)
    if engine is None:
        return
    for thing in gc.get_objects():
        # Not isinstance, which wakes modules that load themselves lazily.
        if issubclass(type(thing), engine) and KEY in getattr(vars(thing).get("_config"), "_param_dict", {}):
            raise InputError(
                f'"{KEY}": an engine was built before mup_megatron.deepspeed was imported, so its entry had no effect. '
                "Put `import mup_megatron.deepspeed` at the top of the script."
            )


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------


def _init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    global _used
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    if not _has_entry(bound.arguments):
        no_entry.require_not_forgotten(bound.arguments)
        if _required and planning.plan_applied_to(bound.arguments["model"]) is not None:
            _used = True
        elif _required:
            no_entry.require_no_training(bound.arguments)
        return wrapped(*args, **kwargs)
    complain_when_uncaught(leave=True)
    versions.require_complete(_missing)
    _used = True
    planned = run.before_init(bound.arguments)
    if planned is None:
        return wrapped(*args, **kwargs)
    wrapped(*bound.args, **bound.kwargs)
    run.after_init(instance, planned)
    return None


def _has_entry(arguments: Mapping[str, Any]) -> bool:
    """Returns whether an engine's configuration has the entry.

    Raises:
        InputError: it matters and cannot be seen.
    """
    content = getattr(arguments.get("config_class"), "_param_dict", None)
    if content is not None:
        return has_entry(content)
    given = arguments.get("config")
    if _required or (isinstance(given, Mapping) and KEY in given):
        raise InputError(
            f'"{KEY}": the engine was given no config_class, where the entry is looked for. Call '
            "deepspeed.initialize, or give DeepSpeedEngine config_class=DeepSpeedConfig(config)."
        )
    return False


def _take_model_step(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    planned = run.run_of(instance)
    if planned is not None:
        run.before_step(instance, planned)
    return wrapped(*args, **kwargs)


def _load_checkpoint(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    optimizer = given["load_optimizer_states"] and not given["load_module_only"]
    with resume.around_load(instance, given["load_dir"], given["tag"], optimizer=optimizer):
        return wrapped(*args, **kwargs)


def _save_checkpoint(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if run.run_of(instance) is None:
        return wrapped(*args, **kwargs)
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    given["client_state"] = resume.before_save(instance, given["client_state"])
    result = wrapped(*bound.args, **bound.kwargs)
    resume.after_save(instance, given["save_dir"], given["tag"])
    return result


# ---- those who fill in "auto" --------------------------------------------------------------------------------------


def _trainer_config_process(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    drop_auto(instance.config)
    return wrapped(*args, **kwargs)


def _deepspeed_config_process(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    drop_auto(instance.deepspeed_config)
    return wrapped(*args, **kwargs)


_PLACES: Mapping[str, Mapping[str, Mapping[str, Wrapper]]] = {
    "deepspeed.runtime.engine": {
        "DeepSpeedEngine": {
            "__init__": _init,
            "_take_model_step": _take_model_step,
            "load_checkpoint": _load_checkpoint,
            "save_checkpoint": _save_checkpoint,
        }
    },
    "transformers.integrations.deepspeed": {
        "HfTrainerDeepSpeedConfig": {"trainer_config_process": _trainer_config_process}
    },
    "accelerate.utils.dataclasses": {"DeepSpeedPlugin": {"deepspeed_config_process": _deepspeed_config_process}},
}
"""Module → class → method → what stands around it."""
