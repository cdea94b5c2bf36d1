"""The start of a module's weights under a plan: what its library drew is multiplied, or drawn anew.

What was drawn is not drawn again unless it is asked for, so that seeds give what they gave before. Under ZeRO-3 each
parameter is put together for the moment; under FSDP2 and tensor parallelism each rank changes its own part.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import StrEnum
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.live.weights import is_drawn_with
from mup_megatron.modules.draws import Watch
from mup_megatron.modules.names import named_buffers, named_modules, named_parameters
from mup_megatron.theory import Plan, PlanEntry
from mup_megatron.validation import brief


class Initialize(StrEnum):
    """The ways in which a plan gets its initial weights."""

    RESCALE = "rescale"
    """What the library drew is multiplied to the plan's std."""
    REDRAW = "redraw"
    """Weights are drawn anew, for a module whose own initialisation did not take place: `deepspeed.zero.Init`, or the
    meta device and `to_empty`, whose buffers are set anew as well."""
    KEEP = "keep"
    """They are left alone: they are loaded, or about to be."""


_HALF_PRECISION = 4e-3
"""Relative: how far half precision's rounding may move a root mean square."""


def initialize(model: torch.nn.Module, plan: Plan, how: Initialize) -> None:
    """Makes a module's weights start as the plan says, and its buffers too where they are drawn anew.

    Raises:
        InputError: weights are not what the library draws, or nothing sets a buffer, or a weight that keeps its
            library's start; before a weight is drawn.
    """
    if how is Initialize.RESCALE:
        _require_drawn(model, plan)
    if how is Initialize.REDRAW:
        _reset_rest(model, {name: parameter for name, parameter in named_parameters(model) if _keeps(plan[name])})
    padding = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            _initialize(parameter, plan[name], how, padding.get(id(parameter)))


def agree(model: torch.nn.Module) -> None:
    """Gives all ranks of data parallelism the first one's weights: it makes them alike when it wraps, and not later."""
    for module in model.modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            first = torch.distributed.get_global_rank(module.process_group, 0)
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.data, first, group=module.process_group)


def reshard(model: torch.nn.Module) -> None:
    """Has FSDP2 drop the whole weights that a forward pass may have left in a model: they are copies of its own."""
    for module in model.modules():
        # By its name: to import it takes long.
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def _keeps(entry: PlanEntry) -> bool:
    """Returns whether a tensor keeps its library's start, which the plan cannot draw."""
    return entry.init_std is None and entry.init_value is None


def _factor(entry: PlanEntry) -> float:
    """Returns what the library's draw is multiplied by."""
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
        # In pieces it may never have been drawn at all: it was on the meta device, and emptied.
        if entry.init_std is None or (_factor(entry) == 1.0 and not is_sharded(parameter)):
            continue
        with gathered_parameter(parameter, change=False), torch.no_grad():
            # In one pass: a copy in fp32 of the largest embedding may not fit.
            precise = torch.float64 if parameter.dtype is torch.float64 else torch.float32
            norm: Any = torch.linalg.vector_norm(parameter.detach(), dtype=precise)
            whole = norm.full_tensor() if is_sharded(norm) else norm
        rms = whole.item() / math.sqrt(math.prod(entry.shape))
        assert entry.library_std is not None
        if not is_drawn_with(rms, entry.library_std, math.prod(entry.shape), rounding=_HALF_PRECISION):
            wrong.append(f"{brief(name, 60)} has an RMS of {rms:.4g}, drawn would be {entry.library_std:.4g}")
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(
            f'{wrong[0]}{more}: not as the library draws it, so it cannot be rescaled. Say `initialize: "keep"` for '
            'weights that were loaded, `"redraw"` after to_empty or deepspeed.zero.Init.'
        )


def _initialize(parameter: torch.nn.Parameter, entry: PlanEntry, how: Initialize, padding: int | None) -> None:
    if how is Initialize.RESCALE and _factor(entry) != 1.0:
        with gathered_parameter(parameter):
            parameter.mul_(_factor(entry))
    elif how is Initialize.REDRAW and not _keeps(entry):
        with gathered_parameter(parameter):
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
    """Returns whether it is a rank's part of a tensor, of FSDP2 or of tensor parallelism."""
    return type(tensor.data).__name__ == "DTensor"


def _reset_rest(model: torch.nn.Module, kept: Mapping[str, torch.nn.Parameter]) -> None:
    """Sets what the plan does not, in a model whose own initialisation did not take place, as each module does it.

    Args:
        model: the model.
        kept: its parameters that keep their library's start, by name.

    Raises:
        InputError: a buffer or parameter that nothing sets, or a constant that was left on the meta device; names it.
    """
    in_pieces = [name for name, parameter in kept.items() if is_sharded(parameter) or hasattr(parameter, "ds_id")]
    if in_pieces:
        raise InputError(
            f"{_listed(in_pieces)}: it keeps its library's own start, which cannot be drawn into pieces. Build the "
            "model on a real device, apply the plan, and shard it then."
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return  # deepspeed.zero.Init leaves buffers alone
    with Watch() as watch, torch.no_grad():
        _reset(model, getattr(model, "_init_weights", None), {id(parameter) for parameter in kept.values()})
    unset = (*named_buffers(model), *kept.items())
    missing = [name for name, tensor in unset if tensor.numel() and not watch.knows(tensor)]
    missing += [
        f"{name}.{attribute}".lstrip(".")
        for name, module in named_modules(model)
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    ]
    if missing:
        raise InputError(
            f"{_listed(missing)}: the plan does not set it, and nothing sets it again after to_empty. Give its module "
            "a reset_parameters() that does, or build the model on a real device."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(brief(name, 60) for name in names[:2]) + more


def _reset(
    module: torch.nn.Module, initialise: Callable[[torch.nn.Module], object] | None, kept: Collection[int]
) -> None:
    """Calls what sets the buffers of each module, and the parameters of these identities: its own `reset_parameters`,
    or the Hugging Face model's.
    """
    for child in module.children():
        _reset(child, getattr(child, "_init_weights", None) or initialise, kept)
    own = (*module.buffers(recurse=False), *(p for p in module.parameters(recurse=False) if id(p) in kept))
    if not own:
        return
    if initialise is not None:
        initialise(module)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()


@contextlib.contextmanager
def gathered_parameter(parameter: torch.nn.Parameter, *, change: bool = True) -> Iterator[None]:
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


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Returns a parameter's shape, also where ZeRO-3 has left nothing of it on this rank."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
