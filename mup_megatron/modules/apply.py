"""A plan → a live torch module: initial weights, multipliers, attention scale. Holds no theory.

What the library drew is multiplied, never drawn again, so that seeds give what they gave before; and nothing is touched
where nothing changes, so that a plan at its base leaves a module as it is. Under ZeRO-3 each parameter is put together
for the moment.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.modules.attention import attention_modules, scale_attribute
from mup_megatron.modules.draws import Watch
from mup_megatron.modules.hooks import ScaledInput, ScaledOutput
from mup_megatron.modules.marker import marked
from mup_megatron.modules.names import named_buffers, named_modules, named_parameters, unwrapped
from mup_megatron.modules.shapes import TABLES, linear_sides
from mup_megatron.theory import Plan, PlanEntry
from mup_megatron.validation import brief

_MARK = "_mup_applied"
"""Attribute of a model, not of its tensors: `Applied`. It goes with copies and pickles, to which the plan is applied
just as well.
"""


@dataclass(frozen=True, slots=True)
class Applied:
    """What a plan has left in a model."""

    fingerprint: str
    """Of the recipe."""
    scales: Mapping[str, float | None]
    """Of each of its attentions, by name; None where it has none that can be told."""
    softmax_scale: float | None
    """None where attention keeps its own."""
    multipliers: Mapping[str, float]
    """What the forward pass multiplies weights by, where that is not 1; by the name in the layer that uses them, of
    which a tied table has two."""

    @property
    def changes_function(self) -> bool:
        """Whether the model computes something else with these weights than it would without the plug-in."""
        return self.softmax_scale is not None or bool(self.multipliers)

    def within(self, name: str) -> "Applied":
        """What of it is in a submodule, by the names there."""
        start = f"{name}."
        scales, multipliers = (
            {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
            for found in (self.scales, self.multipliers)
        )
        return Applied(
            fingerprint=self.fingerprint,
            scales=scales,
            softmax_scale=self.softmax_scale if scales else None,
            multipliers={key: factor for key, factor in multipliers.items() if factor is not None},
        )


_applied: "weakref.WeakKeyDictionary[torch.nn.Module, Plan]" = weakref.WeakKeyDictionary()


class Initialize(StrEnum):
    """What happens to the weights."""

    RESCALE = "rescale"
    """What the library drew is multiplied to the plan's std."""
    REDRAW = "redraw"
    """Weights are drawn anew, for a module whose own initialisation did not take place: `deepspeed.zero.Init`, or the
    meta device and `to_empty`, whose buffers are set anew as well."""
    KEEP = "keep"
    """They are left alone: they are loaded, or about to be."""


def apply_plan(model: torch.nn.Module, plan: Plan, *, initialize: Initialize = Initialize.RESCALE) -> None:
    """Makes a freshly built module what the plan says. Under ZeRO-3 and FSDP2 every rank has to call it.

    Call it once, on the module that the plan was made for, before the optimizer is built and before FSDP; or after
    `fully_shard` and `to_empty` of a module from the meta device, with `initialize="redraw"`.

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
    model = unwrapped(model)
    require_match(model, plan)
    _require_mark(model, plan, how)
    if any(hasattr(module, _MARK) or _factors(module) for module in model.modules()):
        raise InputError(
            "a plan was applied to this model already, or to the one that it is a copy of. Build the model anew, or "
            "apply one plan only."
        )
    require_scalable(model, plan)
    _require_multipliable(model, plan)
    if how is Initialize.RESCALE:
        _require_drawn(model, plan)
    if how is Initialize.REDRAW:
        _reset_buffers(model)
    padding = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            _initialize(parameter, plan[name], how, padding.get(id(parameter)))
    set_attention_scale(model, plan)
    _hook_multipliers(model, plan)
    _applied[model] = plan
    applied = Applied(
        fingerprint=plan.fingerprint,
        scales={name: attention.scale for name, _, attention in attention_modules(model)},
        softmax_scale=plan.softmax_scale if plan.changes_softmax_scale else None,
        multipliers=_multipliers(model, plan),
    )
    for name, module in named_modules(model):
        if not name:
            setattr(module, _MARK, applied)
        elif hasattr(type(module), "save_pretrained"):  # a model within the model, which may be saved by itself
            setattr(module, _MARK, applied.within(name))


def applied_plan(model: torch.nn.Module) -> Plan | None:
    """The plan that was applied to a module, if any was."""
    return _applied.get(unwrapped(model))


def applied_to(model: torch.nn.Module) -> Applied | None:
    """What plans have left in a module or in parts of it, or in the one that it is a copy of."""
    own: dict[str, Applied] = {}
    for name, module in named_modules(unwrapped(model)):
        found = getattr(module, _MARK, None)
        if found is not None and not any(not outer or name.startswith(f"{outer}.") for outer in own):
            own[name] = found
    if "" in own or not own:
        return own.get("")
    return Applied(
        fingerprint=next(iter(own.values())).fingerprint,
        scales={f"{name}.{key}": scale for name, part in own.items() for key, scale in part.scales.items()},
        softmax_scale=next((part.softmax_scale for part in own.values() if part.softmax_scale is not None), None),
        multipliers={f"{name}.{key}": factor for name, part in own.items() for key, factor in part.multipliers.items()},
    )


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO-3 has left nothing of it on this rank."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def require_match(model: torch.nn.Module, plan: Plan) -> None:
    """Raises InputError unless module and plan have the same parameters and shapes."""
    held = {name: whole_shape(parameter) for name, parameter in named_parameters(model)}
    problems = [f"{name}: the model has this parameter, the plan has not" for name in held if name not in plan.by_name]
    problems += [
        f"{e.name}: the plan has this parameter, the model has not" for e in plan.entries if e.name not in held
    ]
    problems += [
        f"{entry.name}: the model's shape is {held[entry.name]}, the plan's {entry.shape}"
        for entry in plan.entries
        if entry.name in held and held[entry.name] != entry.shape
    ]
    if problems:
        more = f"; and {len(problems) - 1} more like this" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}. Make the plan from the model that is trained.")


# ---- initial weights -----------------------------------------------------------------------------------------------


def _factor(entry: PlanEntry) -> float:
    """What the library's draw is multiplied by."""
    if entry.init_std is None:
        return 1.0
    assert entry.library_std is not None, entry.name
    return 1.0 if entry.init_std == entry.library_std else entry.init_std / entry.library_std


def _require_drawn(model: torch.nn.Module, plan: Plan) -> None:
    """Raises InputError if weights that are to be multiplied are not what the library draws: loaded, or changed
    since.
    """
    wrong = []
    for name, parameter in named_parameters(model):
        entry = plan[name]
        if _factor(entry) == 1.0:
            continue
        with whole(parameter, change=False), torch.no_grad():
            # In one pass: a copy in fp32 of the largest embedding may not fit.
            precise = torch.float64 if parameter.dtype is torch.float64 else torch.float32
            norm = torch.linalg.vector_norm(parameter.detach(), dtype=precise).item()
        found = norm / math.sqrt(math.prod(entry.shape))
        assert entry.library_std is not None
        # Six standard errors of the root mean square of so many draws, and half precision's rounding.
        allowed = entry.library_std * (6.0 / math.sqrt(2.0 * math.prod(entry.shape)) + 4e-3)
        if abs(found - entry.library_std) > allowed:
            wrong.append(f"{brief(name, 60)} has an RMS of {found:.4g}, drawn would be {entry.library_std:.4g}")
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(
            f'{wrong[0]}{more}: not as the library draws it, so it cannot be rescaled. Say `initialize: "keep"` for '
            'weights that were loaded, `"redraw"` for a model built inside deepspeed.zero.Init.'
        )


def _initialize(parameter: torch.nn.Parameter, entry: PlanEntry, how: Initialize, padding: int | None) -> None:
    if how is Initialize.RESCALE and _factor(entry) != 1.0:
        with whole(parameter):
            parameter.mul_(_factor(entry))
    elif how is Initialize.REDRAW:
        with whole(parameter):
            if not is_sharded(parameter):
                _draw(parameter, entry, padding)
                return
            # The whole tensor on each rank: what torch draws into shards is the same in each where there is no GPU.
            from torch.distributed.tensor import DTensor, distribute_tensor

            part = parameter.data
            assert isinstance(part, DTensor)
            drawn = torch.empty(entry.shape, dtype=part.dtype, device=part.to_local().device)
            _draw(drawn, entry, padding)
            part.copy_(distribute_tensor(drawn, part.device_mesh, part.placements))


def _draw(tensor: torch.Tensor, entry: PlanEntry, padding: int | None) -> None:
    if entry.init_std is None:
        assert entry.init_value is not None
        tensor.fill_(entry.init_value)
        return
    tensor.normal_(0.0, entry.init_std)
    if padding is not None:
        tensor[padding].zero_()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a rank's part of a tensor, of FSDP2 or of tensor parallelism."""
    return type(tensor.data).__name__ == "DTensor"


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
    scale = plan.softmax_scale if plan.changes_softmax_scale else None
    difference = mark.difference(scale, _multipliers(model, plan))
    if difference is not None:
        raise InputError(
            f"the weights were trained with the recipe {mark.fingerprint[:12]}, and the plan is of "
            f"{plan.fingerprint[:12]}: {difference}, so they would be another function. Apply the plan of the recipe "
            "that they were trained with."
        )


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
        if is_sharded(parameter) and how is Initialize.RESCALE:
            raise InputError(
                f"{name}: fully_shard was called before apply_plan. Call apply_plan first and fully_shard then; or for "
                'a model from the meta device: fully_shard, to_empty, apply_plan(model, plan, initialize="redraw").'
            )


def _reset_buffers(model: torch.nn.Module) -> None:
    """Sets the buffers of a model whose own initialisation did not take place, as each of its modules does it.

    Raises:
        InputError: one that nothing sets, or a constant that was left on the meta device; names it.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return  # deepspeed.zero.Init leaves buffers alone
    with Watch() as watch, torch.no_grad():
        _reset(model, getattr(model, "_init_weights", None))
    missing = [name for name, buffer in named_buffers(model) if buffer.numel() and not watch.knows(buffer)]
    missing += [
        f"{name}.{attribute}".lstrip(".")
        for name, module in named_modules(model)
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"{', '.join(missing[:3])}{more}: no weight, and nothing sets it again after to_empty. Give its module a "
            "reset_parameters() that does, or build the model on a real device."
        )


def _reset(module: torch.nn.Module, initialise: Callable[[torch.nn.Module], object] | None) -> None:
    """Calls what sets the buffers of each module: its own `reset_parameters`, or the Hugging Face model's."""
    for child in module.children():
        _reset(child, getattr(child, "_init_weights", None) or initialise)
    if not any(True for _ in module.buffers(recurse=False)):
        return
    if initialise is not None:
        initialise(module)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()


@contextlib.contextmanager
def whole(parameter: torch.nn.Parameter, *, change: bool = True) -> Iterator[None]:
    """Within it a parameter is whole that ZeRO-3 keeps in pieces; with `change`, what the first rank makes of it
    stays.
    """
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    context: Any = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if change else None)
    with context:
        yield


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
        if attention.scale is None:
            raise InputError(
                f"{name}: {type(module).__name__} has no scale to set and would go on with 1/√head_dim. Use "
                "attention_multiplier 1 and a base of the target's head size, or an attention with a `scaling`."
            )


def set_attention_scale(model: torch.nn.Module, plan: Plan) -> None:
    """Tells the attentions of a model the plan's scale."""
    if not plan.changes_softmax_scale:
        return
    stock = plan.own_softmax_scale
    for _, module, attention in attention_modules(model):
        key = scale_attribute(module)
        assert key is not None
        # A layer may have a scale of its own, as with GPT-2's scale_attn_by_inverse_layer_idx.
        own = 1.0 if attention.scale is None else attention.scale / stock
        setattr(module, key, plan.softmax_scale if own == 1.0 else plan.softmax_scale * own)


# ---- multipliers ---------------------------------------------------------------------------------------------------


def _require_multipliable(model: torch.nn.Module, plan: Plan) -> None:
    readers = [module for module, _, entry in _owners(model, plan) if entry.name == plan.readout]
    if plan.output_multiplier != plan.stock_readout_ratio and readers and all(isinstance(m, TABLES) for m in readers):
        raise InputError(
            f"{plan.readout}: the readout is tied, and no layer of the model computes it, so its multiplier has no "
            "place. Make it a Linear that shares the embedding's weight."
        )
    for module, attribute, entry in _owners(model, plan):
        if _multiplier(module, entry, plan) != 1.0 and not _is_layer(module, attribute):
            raise InputError(
                f"{entry.name}: {type(module).__name__} has no place for a multiplier of this weight. Take it out of "
                "per_parameter, or give the weight init_mult and lr_mult instead."
            )


def _hook_multipliers(model: torch.nn.Module, plan: Plan) -> None:
    for module, _, entry in _owners(model, plan):
        factor = _multiplier(module, entry, plan)
        if factor == 1.0:
            continue
        if isinstance(module, TABLES):
            module.register_forward_hook(ScaledOutput(factor))
        else:
            module.register_forward_pre_hook(ScaledInput(factor))


def require_applied(model: torch.nn.Module, plan: Plan) -> None:
    """Raises InputError unless a model still is what `apply_plan` made of it, but for the values of its weights."""
    require_match(model, plan)
    require_kept(model)


def require_kept(model: torch.nn.Module) -> None:
    """Raises InputError if a multiplier or a scale of attention that a plan has left in a model is gone.

    Something may have been replaced since: a readout or an embedding of another size, an attention.
    """
    applied = applied_to(model)
    if applied is None:
        return
    model = unwrapped(model)
    modules = dict(named_modules(model))
    for key, factor in applied.multipliers.items():
        layer = key.rpartition(".")[0]
        # Another one may have been put around the layer, as LoRA does.
        inside = [module for name, module in modules.items() if name == layer or name.startswith(f"{layer}.")]
        if not any(factor in _factors(module) for module in inside):
            raise InputError(
                f"{key}: its multiplier {factor:g} is gone: the layer was replaced after the plan was applied. "
                "Change the model first, and apply the plan then."
            )
    live = {name: found.scale for name, _, found in attention_modules(model)}
    wrong = [name for name, scale in live.items() if applied.scales.get(name) != scale]
    if applied.softmax_scale is not None:
        wrong += [name for name in applied.scales if name in modules and name not in live]
    if wrong:
        raise InputError(
            f"{wrong[0]}: its attention scale is not what the plan has made it: it was changed or replaced after the "
            "plan was applied. Change the model first, and apply the plan then."
        )


def _factors(module: torch.nn.Module) -> list[float]:
    """The multipliers that a module has."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook.factor for hook in hooks if isinstance(hook, ScaledInput | ScaledOutput)]


def _multipliers(model: torch.nn.Module, plan: Plan) -> dict[str, float]:
    """Name of a weight in a layer that uses it → what has to be multiplied there, where that is not 1."""
    names = {id(module): name for name, module in named_modules(model)}
    return {
        f"{names[id(module)]}.{attribute}".lstrip("."): factor
        for module, attribute, entry in _owners(model, plan)
        if (factor := _multiplier(module, entry, plan)) != 1.0
    }


def _multiplier(module: torch.nn.Module, entry: PlanEntry, plan: Plan) -> float:
    """What has to be multiplied where a module uses a weight: a table that is the readout as well has two factors."""
    if isinstance(module, TABLES):
        return entry.multiplier
    factor = plan.output_multiplier if entry.is_embedding else entry.multiplier
    return factor / plan.stock_readout_ratio if entry.name == plan.readout else factor


def _is_layer(module: torch.nn.Module, attribute: str) -> bool:
    """Whether a module's own call multiplies its first input by a weight, or looks it up."""
    # Torch's attention multiplies three inputs by one weight, and never calls the layer that holds another one.
    if isinstance(module, torch.nn.MultiheadAttention | torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, TABLES) or linear_sides(module, attribute) is not None


def _owners(model: torch.nn.Module, plan: Plan) -> Iterator[tuple[torch.nn.Module, str, PlanEntry]]:
    """(module, attribute, entry) of each weight in each module that uses it: a tied table's twice."""
    name_of = {id(parameter): name for name, parameter in named_parameters(model)}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            entry = plan[name_of[id(parameter)]]
            if not entry.is_vector:
                yield module, attribute, entry
