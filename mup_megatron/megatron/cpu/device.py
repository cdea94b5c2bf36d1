"""One pretended CUDA device in this process's torch, whose memory and arithmetic are the CPU's. Not about Megatron.

What lies afterwards: `torch.cuda.is_available()` and its relatives, and `Tensor.type()`, which answers
"torch.cuda.FloatTensor" because optimizers compare that name. `Tensor.device` and `Tensor.is_cuda` stay truthful.
A TorchFunctionMode would be tidier than replaced functions, but torch switches modes off inside backward.
"""

import contextlib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.cuda.nvtx
import torch.cuda.random
import torch.utils._device

CPU = torch.device("cpu")

_FACTORIES = (
    "arange asarray as_tensor empty empty_like empty_strided eye full full_like linspace logspace ones ones_like rand "
    "rand_like randint randint_like randn randn_like randperm tensor tril_indices triu_indices zeros zeros_like"
).split()
_TENSOR_FACTORIES = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros".split()

_DO_NOTHING = "empty_cache init ipc_collect reset_peak_memory_stats set_device set_stream synchronize".split()
_DO_NOTHING_NVTX = "mark range_pop range_push".split()
_BYTES = "max_memory_allocated max_memory_reserved memory_allocated memory_reserved".split()


class DeviceProperties(NamedTuple):
    """The properties of the pretended device. Compute capability 0.0: no kernel written for a GPU may be chosen."""

    name: str = "CPU"
    major: int = 0
    minor: int = 0
    total_memory: int = 0
    multi_processor_count: int = 1


class Stream:
    """A queue of work on a device that finishes each operation before it returns: nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else Event()

    def query(self) -> bool:
        return True


class Event:
    """A mark in a stream: always reached. It measures no time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def pretend_device() -> None:
    """Make torch behave as if it had one CUDA device, number 0, that lives on the CPU. Call it once per process."""
    # torch lists its device-aware factories lazily and by identity: fill that cache while they are still the originals,
    # or `with torch.device("meta"):` stops working.
    torch.utils._device._device_constructors()
    _replace_queries()
    _replace_random()
    _replace_streams()
    _replace_placement()
    _replace(torch, "compile", _compile)
    mesh = torch.distributed.device_mesh.DeviceMesh
    _replace(mesh, "from_group", staticmethod(_mesh_on_cpu(mesh.from_group)))
    _replace(torch.distributed, "all_to_all_single", _with_listed_sizes(torch.distributed.all_to_all_single))
    _replace(torch.distributed, "all_gather", _of_any_sizes(torch.distributed.all_gather))
    _replace(torch.distributed, "reduce_scatter", _into_any_sizes(torch.distributed.reduce_scatter))
    _replace_isend()


def _replace(owner: ModuleType | type, name: str, value: Any) -> None:
    assert hasattr(owner, name), f"torch {torch.__version__} has no {owner.__name__}.{name}"
    setattr(owner, name, value)


def _answer(name: str, value: Any) -> Callable[..., Any]:
    """A function of its own per name, whatever its arguments: torch keeps tables keyed by these functions' identity."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return value

    function.__name__ = function.__qualname__ = name
    return function


def _replace_queries() -> None:
    properties = DeviceProperties()
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "_lazy_init": None,
        **dict.fromkeys(_BYTES, 0),
        **dict.fromkeys(_DO_NOTHING),
    }
    for name, value in answers.items():
        _replace(torch.cuda, name, _answer(name, value))
    _replace(torch.cuda, "memory_stats", lambda device=None: {})
    _replace(torch.cuda, "_lazy_call", _lazy_call)
    # torch.accelerator asks torch.cuda, and would go on to the driver that isn't there.
    _replace(torch.accelerator, "is_available", _answer("is_available", False))
    for name in _DO_NOTHING_NVTX:
        _replace(torch.cuda.nvtx, name, _answer(name, None))
    _replace(torch.cuda.nvtx, "range", NoContext)


def _lazy_call(function: Callable[[], None], **kwargs: Any) -> None:
    """torch queues such calls until the device is initialized; this one always is."""
    function()


def _replace_random() -> None:
    """The device's generator is the CPU's: seeding or restoring one is seeding or restoring the other."""
    torch.cuda.default_generators = (torch.default_generator,)
    # torch.cuda.random imported these names for itself.
    for name in ("_lazy_call", "_lazy_init", "current_device", "device_count", "is_initialized"):
        _replace(torch.cuda.random, name, getattr(torch.cuda, name))


def _replace_streams() -> None:
    stream = Stream()
    _replace(torch.cuda, "Stream", Stream)
    _replace(torch.cuda, "Event", Event)
    _replace(torch.cuda, "current_stream", _answer("current_stream", stream))
    _replace(torch.cuda, "default_stream", _answer("default_stream", stream))
    _replace(torch.cuda, "stream", NoContext)
    _replace(torch.cuda, "device", NoContext)
    _replace(torch.Tensor, "record_stream", _answer("record_stream", None))


class NoContext(contextlib.AbstractContextManager[None]):
    """`with torch.cuda.device(n):`, `with torch.cuda.stream(s):` on the only device there is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


def _replace_placement() -> None:
    for name in _FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        _replace(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    _replace(torch.Tensor, "to", _to_cpu(torch.Tensor.to))
    _replace(torch.Tensor, "type", _type(torch.Tensor.type))
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)


def is_pretended(device: Any) -> bool:
    """Returns whether a `device` argument is the pretended device: "cuda", "cuda:0", its number, or a torch.device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if is_pretended(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # pinning is a service of the driver
        return factory(*args, **kwargs)

    return on_cpu


def _to_cpu(to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(to)
    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and is_pretended(args[0]):
            args = (CPU, *args[1:])
        if is_pretended(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    return to_cpu


def _type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


def _mesh_on_cpu(from_group: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's FSDP2 wants weights on the device of its mesh."""

    @functools.wraps(from_group)
    def mesh(group: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return from_group(group, CPU.type if is_pretended(device_type) else device_type, *args, **kwargs)

    return mesh


def _compile(model: Any = None, **kwargs: Any) -> Any:
    """`torch.compile` that leaves the function as it is: compiling for the CPU costs minutes and changes rounding."""
    return model if model is not None else lambda function: function


def _with_listed_sizes(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an all-to-all that takes its split sizes as tensors too.

    Megatron's experts count tokens on the device and make numbers of the counts while they copy them to the host; of
    counts that already are on the host they make none.
    """

    def listed(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(all_to_all_single)
    def with_listed_sizes(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = listed(output_split_sizes), listed(input_split_sizes)
        return all_to_all_single(output, input, *sizes, group=group, async_op=async_op)

    return with_listed_sizes


def _of_any_sizes(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an all-gather of tensors that differ in length, as tokens of experts do: gloo takes one length alone."""

    @functools.wraps(all_gather)
    def of_any_sizes(tensor_list: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        if len({len(each) for each in tensor_list if each.dim()}) < 2:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        longest = max(map(len, tensor_list))
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(found, padded, group=group)
        for own, each in zip(tensor_list, found, strict=True):
            own.copy_(each[: len(own)])

    return of_any_sizes


def _into_any_sizes(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the reverse: sums of pieces that differ in length, each for the rank whose it is."""

    @functools.wraps(reduce_scatter)
    def into_any_sizes(output: Any, input_list: Any, *args: Any, group: Any = None, **more: Any) -> Any:
        if len({len(each) for each in input_list}) < 2:
            return reduce_scatter(output, input_list, *args, group=group, **more)
        whole = torch.cat(list(input_list))
        torch.distributed.all_reduce(whole, group=group)
        output.copy_(whole.split([len(each) for each in input_list])[torch.distributed.get_rank(group)])

    return into_any_sizes


def _replace_isend() -> None:
    """A send that keeps what it sends until it is sent.

    A pipeline frees its outputs with `tensor.data = …` while they are on their way. The memory of a GPU is not used
    again before the stream is done with it; the CPU's is, and another tensor's values arrive. A detached tensor shares
    the memory and keeps it when the original lets go.
    """
    distributed = torch.distributed.distributed_c10d
    original = distributed.isend

    @functools.wraps(original)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(tensor.detach(), *args, **kwargs)

    # P2POp compares the function that it is given with the one of its module.
    _replace(distributed, "isend", isend)
    _replace(torch.distributed, "isend", isend)
