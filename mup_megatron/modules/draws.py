"""With which std a module draws its initial weights, read off by building it on the meta device.

Every operation that writes into a tensor is watched while the module is built, so that any initialiser made of torch's
own draws is understood, at any size, without allocating anything. Not a list of initialisers.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


@dataclass(frozen=True, slots=True)
class Draw:
    """The start of a tensor: at a constant, at random around 0 with a std, or in a way that is not understood."""

    value: float | None = None
    std: float | None = None

    @property
    def understood(self) -> bool:
        """True where it is a constant or a draw with a known std."""
        return (self.value, self.std) != (None, None)

    def times(self, factor: float) -> "Draw":
        """Returns the draw after multiplication."""
        return Draw(
            value=None if self.value is None else self.value * factor,
            std=None if self.std is None else self.std * abs(factor),
        )

    def plus(self, term: float) -> "Draw":
        """Returns the draw after addition; around another mean than 0 it is not understood."""
        return Draw() if self.value is None else Draw(value=self.value + term)

    def cut_off(self, low: float, high: float) -> "Draw":
        """Returns the draw with what lies outside of two bounds moved to them: as it was if next to nothing does."""
        reach = abs(self.value) if self.value is not None else _FAR * (self.std or 0.0)
        return self if low <= -reach and reach <= high else Draw()


_FAR = 4.0
"""Beyond so many standard deviations a normal draw has nothing that matters for its std."""

_UNKNOWN = Draw()

_DRAWS = frozenset({"normal_", "uniform_"})


def build_on_meta(build: Callable[[], ModuleT]) -> tuple[ModuleT, "Watch"]:
    """Returns what `build` returns, with all its tensors on the meta device, and what was written into them.

    Args:
        build: makes the module and initialises its weights. What it raises is not caught.
    """
    recorder = Watch()
    with recorder, _watched_trunc_normal(recorder), torch.device("meta"), _WatchedCalls(recorder), torch.no_grad():
        module = build()
    return module, recorder


class Watch(TorchDispatchMode):
    """Follows what is written into whole tensors, by their storage: a Parameter shares that of what it was made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws: dict[int, Draw] = {}
        # Kept alive, so that no storage takes another's place.
        self._storages: list[torch.UntypedStorage] = []

    def draw_of(self, tensor: torch.Tensor) -> Draw:
        """Returns the last draw into a tensor."""
        return self._draws.get(tensor.untyped_storage()._cdata, _UNKNOWN)

    def note(self, tensor: torch.Tensor, draw: Draw) -> None:
        """Remembers what a tensor was filled with; a few zeros, as a row for padding, say nothing of the whole."""
        storage = tensor.untyped_storage()
        part = tensor.numel() * tensor.element_size() / max(storage.nbytes(), 1)
        if part < 1:
            if draw == self.draw_of(tensor) or (draw.value == 0.0 and part < 0.5):
                return
            draw = _UNKNOWN
        if storage._cdata not in self._draws:
            self._storages.append(storage)
        self._draws[storage._cdata] = draw

    def knows(self, tensor: torch.Tensor) -> bool:
        """Returns whether anything was written into a tensor."""
        return tensor.untyped_storage()._cdata in self._draws

    def note_number(self, tensor: torch.Tensor, value: float) -> None:
        """Remembers that a tensor was made of a number."""
        self.note(tensor, Draw(value=value))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        # A draw leaves all that the meta device holds as it is, and torch takes a millisecond for that.
        idle = name in _DRAWS and args[0].device.type == "meta"
        result = args[0] if idle else func(*args, **(kwargs or {}))
        understood = isinstance(result, torch.Tensor) and self._follow(
            name, func._overloadname, result, args, kwargs or {}
        )
        if not understood:
            for tensor in _written(func, args, kwargs or {}):
                self.note(tensor, _UNKNOWN)
        return result

    def _follow(
        self, name: str, overload: str, result: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Notes what an operation wrote into its result; False for an operation that is not known."""
        if "out" in kwargs:
            return False
        source = self.draw_of(args[0]) if args and isinstance(args[0], torch.Tensor) else _UNKNOWN
        match name.removesuffix("_like").removesuffix("_").removeprefix("new_"):
            case "zero" | "zeros":
                self.note(result, Draw(value=0.0))
            case "ones":
                self.note(result, Draw(value=1.0))
            case "randn":
                self.note(result, Draw(std=1.0))
            case "rand":
                self.note(result, _UNKNOWN)  # its mean is not 0
            case "empty":
                self.note(result, _UNKNOWN)
            case "fill" | "full":
                value = _number(args[1] if len(args) > 1 else kwargs.get("value"))
                self.note(result, _UNKNOWN if value is None else Draw(value=value))
            case "normal" if name == "normal_" or overload == "float_float":
                given = args[1:3] if name == "normal_" else args[:2]
                mean, std = (float(x) for x in (*given, *(0.0, 1.0)[len(given) :]))
                self.note(result, Draw(std=std) if mean == 0.0 else _UNKNOWN)
            case "uniform":
                low, high = (float(x) for x in (*args[1:3], *(0.0, 1.0)[len(args[1:3]) :]))
                self.note(result, Draw(std=(high - low) / math.sqrt(12.0)) if low == -high else _UNKNOWN)
            case "mul" | "div" if not kwargs:
                factor = _number(args[1])
                self.note(result, _UNKNOWN if not factor else source.times(factor if "mul" in name else 1.0 / factor))
            case "add" | "sub" if not kwargs:
                term = _number(args[1])
                self.note(result, _UNKNOWN if term is None else source.plus(term if "add" in name else -term))
            case "sqrt" | "rsqrt" | "reciprocal" | "pow" if source.value is not None and not kwargs:
                power = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}.get(name, _number((*args[1:], None)[0]))
                known = None if power is None or source.value <= 0.0 else source.value**power
                self.note(result, _UNKNOWN if known is None else Draw(value=known))
            case "copy":
                self.note(result, self.draw_of(args[1]))
            case "clone" | "_to_copy":
                self.note(result, source)
            case "clamp" if overload == "default":
                bounds = [_number(x) for x in (*args[1:3], None, None)]
                low = -math.inf if bounds[0] is None else bounds[0]
                self.note(result, source.cut_off(low, math.inf if bounds[1] is None else bounds[1]))
            case "detach":
                pass
            case _:
                return False
        return True


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yields the tensors that an operation writes into, by its schema."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            several = value if isinstance(value, list | tuple) else (value,)
            yield from (tensor for tensor in several if isinstance(tensor, torch.Tensor))


class _WatchedCalls(TorchFunctionMode):
    """Notices what does not get as far as an operation on a tensor.

    Initialisers of torch that leave a tensor alone because it is on the meta device: they ask. Without this their
    tensor would still count as drawn the way it was before. And a number that becomes a tensor.
    """

    def __init__(self, recorder: Watch) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func == _IS_META and _asking_module() == torch.nn.init.__name__:
            self._recorder.note(args[0], _UNKNOWN)
        result = func(*args, **(kwargs or {}))
        # By its name: who pretends that there is a GPU puts functions of their own in the place of torch's.
        if getattr(func, "__name__", "") == "tensor" and args and (value := _number(args[0])) is not None:
            self._recorder.note_number(result, value)
        return result


_IS_META: Any = vars(torch._C.TensorBase)["is_meta"].__get__


def _asking_module() -> str | None:
    """Returns the module whose code called torch, from within a function mode."""
    frame = sys._getframe(2)
    # Where the caller has put torch.device around it, that goes first.
    while frame.f_globals.get("__name__") in ("torch.utils._device", "torch.overrides") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


class _watched_trunc_normal:  # noqa: N801
    """While it is entered, torch's truncated normal draw, which does nothing on the meta device, is recorded as
    well.
    """

    def __init__(self, recorder: Watch) -> None:
        self._recorder = recorder
        self._original: Callable[..., torch.Tensor] = torch.nn.init._no_grad_trunc_normal_

    def __enter__(self) -> None:
        def noted(
            tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
        ) -> torch.Tensor:
            known = mean == 0.0 and a == -b
            self._recorder.note(tensor, Draw(std=std * truncated_std(b / std)) if known else _UNKNOWN)
            return tensor

        torch.nn.init._no_grad_trunc_normal_ = noted

    def __exit__(self, *_: object) -> None:
        torch.nn.init._no_grad_trunc_normal_ = self._original


def truncated_std(bound: float) -> float:
    """Returns the std of a standard normal that is cut off at ±bound."""
    if bound < 0.01:  # all but uniform, and the difference below would be lost in rounding
        return bound * math.sqrt((1.0 - 2.0 * bound * bound / 15.0) / 3.0)
    inside = math.erf(bound / math.sqrt(2.0))
    density = math.exp(-bound * bound / 2.0) / math.sqrt(2.0 * math.pi)
    return math.sqrt(1.0 - 2.0 * bound * density / inside)
