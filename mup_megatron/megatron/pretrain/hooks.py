"""The places of the plug-in in Megatron-LM's training loop. Each function does one thing around one of Megatron's.

The functions are replaced in Megatron's modules when these are imported, or at once where they have been already, and
only if a command line asks for it. Nothing of Megatron is imported here: the CPU runtime has to come before.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from mup_megatron.errors import InputError
from mup_megatron.megatron.pretrain import flags, model_writer
from mup_megatron.megatron.pretrain.model_writer import Wrapper
from mup_megatron.messages import complain_when_uncaught

if TYPE_CHECKING:
    from mup_megatron.megatron.pretrain.run import Run

_installed = False
_run: "Run | None" = None


def install_if_asked(words: Sequence[str]) -> bool:
    """Takes the places in Megatron's modules if a command line has a flag of ours; returns whether it has."""
    global _installed
    if not flags.asked_for(words):
        return False
    if not _installed:
        path = model_writer.path_in(words)
        if path is not None and not flags.wants_help(words):
            model_writer.begin(path)
        for module, wrappers in (_PLACES if path is None else model_writer.PLACES).items():
            wrapt.register_post_import_hook(partial(_wrap, wrappers), module)
        if not flags.wants_help(words):
            complain_when_uncaught()
        _installed = True
    return True


def require_used() -> None:
    """Raises InputError if a script that was given --mup-recipe came to its end without having met the plug-in."""
    if _run is None or not _run.built:
        raise InputError(
            "--mup-recipe: the script has ended and never built a model through megatron.training, so the recipe was "
            "not applied. Use a script that calls megatron.training's pretrain, or apply the plan "
            'yourself (README, "In your own Megatron-Core code").'
        )


def _wrap(wrappers: Mapping[str, Wrapper], module: ModuleType) -> None:
    for name, wrapper in wrappers.items():
        current = getattr(module, name, None)
        if current is None:
            assert module.__name__ in _DIFFER, f"{module.__name__} has no {name}"
        # `initialize` has the functions of `arguments` under its own name: wrapped already, or from before.
        elif getattr(current, "_self_wrapper", None) is not wrapper:
            setattr(module, name, wrapt.FunctionWrapper(current, wrapper))


def _the_run() -> "Run | None":
    from megatron.training import get_args

    if _run is None and getattr(get_args(), "mup_recipe", None) is not None:
        raise InputError(
            "--mup-recipe: the script had imported Megatron's argument parsing before the plug-in. Put "
            "`import mup_megatron.megatron` at its top, or start it with `python -m mup_megatron.launch`."
        )
    return _run


# ---- arguments -----------------------------------------------------------------------------------------------------


def _add_megatron_arguments(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return flags.add_to(wrapped(*args, **kwargs))


def _validate_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from mup_megatron.megatron.pretrain.run import Run

    def validate(values: Any, defaults: Mapping[str, Any] = MappingProxyType({}), *rest: Any, **more: Any) -> Any:
        global _run
        _run = Run.begin(values)
        if _run is None:
            return wrapped(values, defaults, *rest, **more)
        # Megatron takes a script's defaults where a value is None, which may be what the recipe means.
        result = wrapped(values, {k: v for k, v in defaults.items() if k not in _run.owned}, *rest, **more)
        _run.sign(values)
        return result

    return validate(*args, **kwargs)


# ---- model and optimizer -------------------------------------------------------------------------------------------


def _setup_model_and_optimizer(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    run = _the_run()
    if run is None:
        return wrapped(*args, **kwargs)
    from megatron.training import get_args

    run.prepare(get_args())
    # From 0.19 on a model that is configured in the container is built by its own builder, else by get_model.
    configured = getattr(kwargs.get("cfg_container"), "model", None)
    if configured is not None:
        run.configure(configured.transformer)
        configured.pre_wrap_hooks.append(run.applied)
    chunks, optimizer, scheduler = wrapped(*args, **kwargs)
    run.verify_set_up(chunks, optimizer, scheduler, get_args())
    return chunks, optimizer, scheduler


def _get_model(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    run = _the_run()
    if run is None:
        return wrapped(*args, **kwargs)
    from megatron.training import get_args

    run.prepare(get_args())  # an evaluation builds its model without an optimizer
    chunks = run.applied(wrapped(*args, **kwargs))
    run.verify(chunks, None, None, at_start=False)
    return chunks


def _get_megatron_optimizer(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    run = _the_run()
    if run is None:
        return wrapped(*args, **kwargs)

    from mup_megatron.megatron.versions import let_sgd_resume

    def build(config: Any, model_chunks: Any, config_overrides: Any = None, *rest: Any, **more: Any) -> Any:
        overrides = run.overrides(config, model_chunks, config_overrides)
        optimizer = wrapped(config, model_chunks, overrides, *rest, **more)
        let_sgd_resume(optimizer)
        return optimizer

    return build(*args, **kwargs)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def _load_checkpoint(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    run = _the_run()
    if run is None:
        return wrapped(*args, **kwargs)

    def load(ddp_model: Any, optimizer: Any, opt_param_scheduler: Any, *rest: Any, **more: Any) -> Any:
        with run.loading(optimizer, opt_param_scheduler):
            return wrapped(ddp_model, optimizer, opt_param_scheduler, *rest, **more)

    return load(*args, **kwargs)


def _load_base_checkpoint(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    state = result[0]
    if _run is not None and state is not None:
        from megatron.training import get_args

        _run.found(state.get("args"), get_args())
    return result


def _save_checkpoint(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    run = _the_run()
    if run is None:
        return wrapped(*args, **kwargs)
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name

    values = get_args()
    run.leave_recipe(values.save)  # before, so that no checkpoint is ever without
    result = wrapped(*args, **kwargs)
    folder = get_checkpoint_name(values.save, args[0] if args else kwargs["iteration"], return_base_dir=True)
    if os.path.isdir(folder):
        run.leave_recipe(folder)
    return result


# ---- training ------------------------------------------------------------------------------------------------------


def _train_step(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    run = _the_run()
    if run is None:
        return wrapped(*args, **kwargs)
    from megatron.training import get_args

    forward_step, iterators, chunks, optimizer, scheduler = args[:5]
    iterators = run.stepping(get_args().curr_iteration + 1, iterators)
    result = wrapped(forward_step, iterators, *args[2:], **kwargs)
    run.stepped(chunks, optimizer, scheduler, get_args(), result[0])
    return result


_PLACES: Mapping[str, Mapping[str, Wrapper]] = {
    "megatron.training.arguments": {
        "add_megatron_arguments": _add_megatron_arguments,
        "validate_args": _validate_args,
    },
    "megatron.training.initialize": {"validate_args": _validate_args},
    "megatron.training.checkpointing": {"_load_base_checkpoint": _load_base_checkpoint},
    "megatron.training.training": {
        "setup_model_and_optimizer": _setup_model_and_optimizer,
        "get_model": _get_model,
        "get_megatron_optimizer": _get_megatron_optimizer,
        "load_checkpoint": _load_checkpoint,
        "save_checkpoint": _save_checkpoint,
        "train_step": _train_step,
    },
}
"""Module → its functions, looked up by Megatron at call time, so that replacing them works in any import order.

Some versions lack a name (`initialize` has no validate_args from 0.18 on); none of these is missing in all of them.
"""

_DIFFER = ("megatron.training.initialize", "megatron.training.arguments")
"""The modules whose names differ between versions."""
