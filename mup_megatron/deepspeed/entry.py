"""The `"mup"` entry of a DeepSpeed configuration, and what the rest of the configuration may say beside it.

Plain values in, plain values out. Nothing of DeepSpeed is imported; what happens with a live engine is in `run.py`.
"""

import math
from collections.abc import Mapping, MutableMapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from mup_megatron.deepspeed.optimizers import DEEPSPEED_OPTIMIZERS, DeepSpeedOptimizer, optimizer_of
from mup_megatron.errors import InputError
from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS
from mup_megatron.modules.weights import Initialize
from mup_megatron.recipe import Recipe
from mup_megatron.theory import optimizers
from mup_megatron.validation import Strict, brief, quoted, validated

KEY = "mup"
AUTO = "auto"
"""What the Hugging Face Trainer and Accelerate fill in; here the recipe does."""

_VALUES = ("lr", "betas", "eps", "weight_decay", "momentum")
"""Of an optimizer: what a recipe says."""

_OTHER_RULES = ("amsgrad", "maximize", "nesterov")
"""Options that make another optimizer of it."""


class Entry(Strict):
    """The content of `"mup"`."""

    recipe: Annotated[str, Field(min_length=1)]
    """Path of the recipe."""
    target: Annotated[str, Field(min_length=1)] | None = None
    """What the model is, where that can't be read off it: see `planning.plan_for`."""
    readout: Annotated[str, Field(min_length=1)] | None = None
    """Name of the weight that computes a torch module's output, where it is tied to an embedding."""
    initialize: bool | Literal["rescale", "redraw", "keep"] = True
    """What happens to the weights: see `modules.Initialize`. True: "rescale"; false: "keep", for weights that were
    loaded."""
    guard: bool = True
    """Compare the live engine with the plan: at start, after each load, and at each step."""
    accept_recipe_change: bool = False
    """Go on from a checkpoint that was trained with another recipe."""

    @property
    def how_to_initialize(self) -> Initialize:
        """The way in which the weights become the plan's."""
        if isinstance(self.initialize, bool):
            return Initialize.RESCALE if self.initialize else Initialize.KEEP
        return Initialize(self.initialize)


def entry_of(config: Mapping[str, Any]) -> Entry | None:
    """Returns the entry of a configuration; None without one.

    Raises:
        InputError: an unknown key, a wrong type.
    """
    return validated(Entry, config[KEY], source=f'"{KEY}"') if has_entry(config) else None


def has_entry(config: Mapping[str, Any]) -> bool:
    """Says if a configuration has the entry.

    Raises:
        InputError: it has one that is written otherwise, which nobody would read.
    """
    for key in config:
        if isinstance(key, str) and key != KEY and key.lower() == KEY:
            raise InputError(f'"{key}": the entry is written "{KEY}". Correct it.')
    return KEY in config


# ---- the types of the rest ----------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> object:
    if value is None or value == AUTO or _is_number(value):
        return value
    raise ValueError(f'should be a finite number or "{AUTO}", found {quoted(value)}. Correct this value.')


def _optimizer_values(params: object) -> object:
    for key in _VALUES if isinstance(params, Mapping) else ():
        assert isinstance(params, Mapping)
        value = params.get(key)
        try:
            for each in value if key == "betas" and isinstance(value, list | tuple) else (value,):
                _number(each)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None
    return params


def _scheduler_values(params: object) -> object:
    for key, value in params.items() if isinstance(params, Mapping) else ():
        several = value if isinstance(value, list | tuple) else (value,)
        if not all(each is None or isinstance(each, bool | str) or _is_number(each) for each in several):
            raise ValueError(
                f"{brief(key, 60)} should be a finite number, a word, or a list of numbers, found {quoted(value)}. "
                "Correct this value."
            )
    return params


class _Section(Strict):
    """A part of a configuration. What is DeepSpeed's own business may be there as well."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)


def _off(value: object) -> object:
    """DeepSpeed takes false for a part that is not there."""
    return None if value is False else value


class OptimizerSection(_Section):
    """The optimizer that DeepSpeed is to make."""

    type: Annotated[str, Field(min_length=1)] | None = None
    params: Annotated[dict[str, Any] | None, BeforeValidator(_optimizer_values)] = None


class SchedulerSection(_Section):
    """The scheduler that DeepSpeed is to make."""

    type: Annotated[str, Field(min_length=1)] | None = None
    params: Annotated[dict[str, Any] | None, BeforeValidator(_scheduler_values)] = None


class _Offload(_Section):
    device: Any = "none"
    super_offload: bool = False
    ratio: float = 1.0


def _stage(value: object) -> object:
    """Returns a ZeRO stage as DeepSpeed reads it: "2" is 2, and true 1."""
    return int(value) if isinstance(value, bool) or (isinstance(value, str) and value.isdecimal()) else value


class _Zero(_Section):
    stage: Annotated[Any, BeforeValidator(_stage)] = 0
    reduce_scatter: Any = True
    zenflow: Annotated[dict[str, Any] | None, BeforeValidator(_off)] = None
    offload_optimizer: Annotated[_Offload | None, BeforeValidator(_off)] = None
    cpu_offload: Any = None
    """DeepSpeed's older word for an `offload_optimizer` to the CPU."""


class _Switch(_Section):
    enabled: bool = False


class _MaybeSwitch(_Section):
    enabled: Any = False


class _TensorParallel(_Section):
    autotp_size: int = 0


class Configuration(_Section):
    """A DeepSpeed configuration: the keys that a recipe or a plan has to do with, each of its type."""

    optimizer: OptimizerSection | None = None
    scheduler: SchedulerSection | None = None
    gradient_clipping: Annotated[float | str | None, BeforeValidator(_number)] = None
    zero_optimization: Annotated[_Zero | None, BeforeValidator(_off)] = None
    fp16: Annotated[_MaybeSwitch | None, BeforeValidator(_off)] = None
    hybrid_engine: Annotated[_Switch | None, BeforeValidator(_off)] = None
    expert_parallel: Annotated[_Switch | None, BeforeValidator(_off)] = None
    tensor_parallel: Annotated[_TensorParallel | None, BeforeValidator(_off)] = None

    @property
    def made_optimizer(self) -> OptimizerSection:
        """The optimizer; without type where there is none."""
        return self.optimizer or OptimizerSection()


def configuration(content: object, *, source: str) -> Configuration:
    """Returns a configuration from plain values; `source` names them in messages.

    Raises:
        InputError: no object, or a key that has to do with a recipe is of another type; names both.
    """
    if not isinstance(content, Mapping):
        raise InputError(f'{source}: expected an object, found {type(content).__name__}. Write {{"key": value, …}}.')
    return validated(Configuration, content, source=source)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def optimizer_params(name: str | None, params: Mapping[str, Any] | None, recipe: Recipe) -> dict[str, Any]:
    """Returns the optimizer's params, with what is absent or "auto" filled in from the recipe.

    Args:
        name: the entry's type.
        params: the entry's params.
        recipe: what they have to agree with.

    Raises:
        InputError: another optimizer than the recipe's, or values that say something else.
    """
    own = optimizer_of(recipe)
    wanted = _wanted(recipe, own)
    if name is None:
        raise InputError(
            f'"optimizer": missing, so DeepSpeed would not make one. Write "optimizer": {{"type": '
            f'"{own.type}"}}; the recipe fills in the values.'
        )
    moved = next((each.type for each in DEEPSPEED_OPTIMIZERS.values() if name.lower() in each.through_mup), None)
    if moved is not None:
        raise InputError(
            f'"optimizer": {name} is μP through microsoft/mup, which would be applied on top of the recipe. Write '
            f'"type": "{moved}" and drop set_base_shapes, MuReadout and mup.init from the script: the '
            "recipe's base says the same."
        )
    if not own.has_type(name):
        raise InputError(
            f'"optimizer": the rules for {brief(name, 40)} are not those that the recipe was made with '
            f'(parametrization.optimizer {recipe.parametrization.optimizer}). Write "type": '
            f'"{own.type}", or give a recipe for {brief(name, 40)}.'
        )
    given = {key: value for key, value in (params or {}).items() if value != AUTO}
    coupled = own.may_be_coupled(name) and given.get("adam_w_mode", True) is False
    if coupled and recipe.moved.weight_decay > 0:
        raise InputError(
            f'"optimizer": {own.coupled_type} with "adam_w_mode": false adds weight decay to the gradient, which the '
            f'recipe\'s decoupled weight_decay does not mean. Write "type": "{own.type}".'
        )
    for key, value in own.fixed.items():
        if (tuned := getattr(recipe.moved, key)) != value:
            raise InputError(
                f"{key}: the recipe's is {tuned}, and DeepSpeed's {own.type} has {value} and no other. Tune with "
                f"{key} {value}, and let the recipe say so."
            )
    if own.leaves_to and given.get("adam_w_mode", True) is False and recipe.moved.weight_decay > 0:
        raise InputError(
            '"optimizer.params.adam_w_mode": false adds weight decay to the gradient, which the recipe\'s decoupled '
            "weight_decay does not mean. Remove it."
        )
    there = {key: why for key, why in own.refused.items() if given.get(key) is not None}
    on = {key: why for key, why in own.switches.items() if given.get(key)}
    for key, why in (there | on).items():
        raise InputError(f'"optimizer.params.{key}": {why}. Remove it.')
    for key in _OTHER_RULES:
        if given.get(key):
            raise InputError(f'"optimizer.params.{key}": the recipe was made for {name} without it. Remove it.')
    for key in _VALUES:
        if key in given and key not in wanted:
            raise InputError(f'"optimizer.params.{key}": {name} has no such value. Remove it.')
        if key in given and not _same(given[key], wanted[key]):
            raise InputError(_other_value(f"optimizer.params.{key}", given[key], wanted[key]))
    return {**given, **wanted}


def _wanted(recipe: Recipe, own: DeepSpeedOptimizer) -> dict[str, Any]:
    h, names = recipe.moved, recipe.optimizers
    eps = {} if all(optimizers()[name].eps is None for name in names) else {"eps": h.adam_eps}
    settings = {key: value for name in names for key, value in group_settings(recipe, name).items()}
    # As JSON has them.
    settings = {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}
    return {"lr": h.lr, **settings, **eps, "weight_decay": h.weight_decay}


def group_settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """Returns what all groups of one of a recipe's optimizers hold: betas, momentum."""
    own = DEEPSPEED_OPTIMIZERS[name].settings or TORCH_OPTIMIZERS[name].settings
    return own(recipe.moved)


def gradient_clipping(given: Any, recipe: Recipe) -> float:
    """Returns the threshold of the gradient norm. `given` is None where the configuration has no such key.

    Raises:
        InputError: the configuration says something else than the recipe.
    """
    wanted = recipe.moved.clip_grad
    if given is not None and given != AUTO and not _same(given, wanted):
        raise InputError(_other_value("gradient_clipping", given, wanted))
    return wanted


def require_horizon(batch: Any, recipe: Recipe) -> None:
    """Raises InputError for a batch that is not of the run that the recipe's values are moved to.

    Args:
        batch: of the configuration; anything but a number is not known yet.
        recipe: of the entry.
    """
    for problem in recipe.run_problems(batch=batch if isinstance(batch, int) else None):
        raise InputError(f'"train_batch_size": {problem}')


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        values = list(given) if isinstance(given, list | tuple) else [given]
        return len(values) == len(wanted) and all(map(_same, values, wanted))
    return isinstance(given, int | float) and float(given) == wanted


def _other_value(key: str, given: Any, wanted: Any) -> str:
    return (
        f'"{key}" is {brief(given)} and the recipe says {wanted}. Remove the key or write "{AUTO}": the recipe decides.'
    )


# ---- the rest ------------------------------------------------------------------------------------------------------


def require_supported(config: Configuration) -> None:
    """Raises InputError for features under which parameters or their groups are not what a plan can be applied to."""
    zero = config.zero_optimization or _Zero()
    offload = zero.offload_optimizer or _Offload()
    wrong = {
        "hybrid_engine": (config.hybrid_engine or _Switch()).enabled,
        "tensor_parallel.autotp_size": (config.tensor_parallel or _TensorParallel()).autotp_size > 1,
        "expert_parallel": (config.expert_parallel or _Switch()).enabled,
        "zero_optimization.zenflow": bool(zero.zenflow),
        "zero_optimization.offload_optimizer.super_offload": offload.super_offload,
        # Its second optimizer has a copy of group 0 that no schedule reaches.
        "zero_optimization.offload_optimizer.ratio": offload.ratio != 1.0,
    }
    for key, found in wrong.items():
        if found:
            raise InputError(f'"{key}" is not supported together with "{KEY}". Remove it.')


def require_possible(config: Configuration, recipe: Recipe) -> None:
    """Raises InputError for what the recipe's optimizer does not go with."""
    own = optimizer_of(recipe)
    if own.goes_everywhere:
        return
    zero = config.zero_optimization or _Zero()
    offload = zero.offload_optimizer or _Offload(device="cpu" if zero.cpu_offload else "none")
    if zero.stage in (1, 2, 3) and recipe.moved.clip_grad > 0:
        raise InputError(
            f'"zero_optimization.stage" {zero.stage}: under ZeRO DeepSpeed clips by the norm of what {own.type} has '
            "orthogonalised, which grows with width, and not of gradients. Tune with clip_grad 0, or write stage 0."
        )
    if zero.stage == 3 and zero.reduce_scatter is not False:
        raise InputError(
            f'"zero_optimization.reduce_scatter": DeepSpeed has {own.type} under stage 3 without it. Write '
            '"reduce_scatter": false.'
        )
    wrong = {
        "fp16": (config.fp16 or _MaybeSwitch()).enabled is True,
        "zero_optimization.offload_optimizer": offload.device not in (None, "none"),
    }
    for key, found in wrong.items():
        if found:
            raise InputError(f'"{key}": not tested together with {own.type}. Remove it, or use bf16 for fp16.')


def drop_auto(config: MutableMapping[str, Any]) -> None:
    """Takes out every "auto" that the recipe fills in, before the Trainer or Accelerate fill in values of their own.

    Nothing without an entry.
    """
    if KEY not in config:
        return
    _drop(config, ("gradient_clipping",))
    for key, values in (("optimizer", _VALUES), ("scheduler", ("warmup_min_lr", "warmup_max_lr"))):
        part = config.get(key)
        content = part.get("params") if isinstance(part, Mapping) else None
        if isinstance(content, MutableMapping):
            _drop(content, values)


def _drop(content: MutableMapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if content.get(key) == AUTO:
            del content[key]
