"""The numbers in a module's forward pass: the scale of its attentions' logits, and every other factor.

The pass runs on the meta device, and each operation is watched. So what is found is what is in use, whichever
attribute, buffer or formula it comes from. Nothing is allocated.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mup_megatron.modules.draws import Watch
from mup_megatron.modules.names import named_parameters
from mup_megatron.modules.repeats import once
from mup_megatron.modules.tracks import MADE, NO_LONGER, PASSIVE, Track, merged
from mup_megatron.theory import family_of

FUSED_ATTENTION = torch.nn.functional.scaled_dot_product_attention
"""Torch's own, whatever somebody puts in its place later: who does so here imports it first."""


@dataclass(frozen=True, slots=True)
class Softmax:
    """One softmax over products of queries and keys."""

    where: str
    """Name of the module in whose code it is."""
    head_size: int
    scale: float | None
    """What it multiplies the products by; None where that is no number that is known."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A number that an activation is multiplied by, or that is added to it."""

    where: str
    operation: str
    number: float | None
    """None for one that the meta device does not hold."""


@dataclass(frozen=True, slots=True)
class Forward:
    """The record of one pass, in its order."""

    softmaxes: tuple[Softmax, ...]
    factors: tuple[Factor, ...]
    """Without those that are part of a softmax's scale or of the readout's."""
    readout_scale: float | None
    """What the input of the readout is multiplied by; None without a readout, or where that is not known."""
    called: frozenset[str]
    """Names of the modules that took part."""
    summed: Mapping[str, int]
    """Name of a parameter, without the number of its layer → the dimension over which a product with it sums."""
    looked_up: Mapping[str, float | None]
    """Name of a table → what its rows are multiplied by before anything else is done with them; None where that is no
    number that is known."""


def joined(passes: Sequence[Forward]) -> Forward:
    """Returns the record of several passes of one model, one after the other."""
    scales = (each.readout_scale for each in passes if each.readout_scale is not None)
    return Forward(
        softmaxes=tuple(found for each in passes for found in each.softmaxes),
        factors=tuple(found for each in passes for found in each.factors),
        readout_scale=next(scales, None),
        called=frozenset().union(*(each.called for each in passes)),
        summed={name: side for each in passes for name, side in each.summed.items()},
        looked_up={name: factor for each in passes for name, factor in each.looked_up.items()},
    )


def watched_forward(
    model: torch.nn.Module, run: Callable[[], object], watch: Watch, readout: torch.Tensor | None = None
) -> Forward:
    """Runs a pass of a model that is on the meta device, and tells what it did.

    Args:
        model: as `draws.build_on_meta` made it.
        run: calls it. What it raises is not caught.
        watch: of its construction, which knows the values of its constants.
        readout: the weight that computes its output.
    """
    tracker = _Tracker(model, watch, readout)
    hooks = [hook for name, module in model.named_modules() for hook in tracker.hooks(name, module)]
    try:
        with once(model, tracker.factor_of), watch, tracker, _Calls(watch), torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return tracker.found()


_SAME = frozenset(
    "view _unsafe_view reshape _reshape_alias transpose t permute expand unsqueeze squeeze slice select clone "
    "contiguous _to_copy detach alias repeat split split_with_sizes unbind narrow neg flip roll index gather "
    "constant_pad_nd as_strided tril triu index_select unfold diagonal lift_fresh masked_fill tanh "
    "native_dropout clamp clamp_min clamp_max view_as_real view_as_complex _conj unsafe_split "
    "unsafe_split_with_sizes movedim swapaxes slice_scatter pad".split()
)
"""What leaves a factor as it is: tanh too, as a soft cap around a small value does."""
_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
_SOFTMAXES = frozenset({"_softmax", "_safe_softmax", "_log_softmax"})
_NUMBERED = frozenset("mul div add sub rsub pow".split())


class _Tracker(TorchDispatchMode):
    def __init__(self, model: torch.nn.Module, watch: Watch, readout: torch.Tensor | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch
        self._tracks: dict[int, Track] = {}
        self._sharing: dict[int, list[int]] = {}
        # Kept alive, so that no tensor takes another's place.
        self._held: list[torch.Tensor] = []
        self._stack: list[str] = []
        self._called: set[str] = set()
        self._softmaxes: list[Softmax] = []
        self._factors: list[Factor] = []
        self._explained: set[int] = set()
        self._readout_storage = None if readout is None else readout.untyped_storage()._cdata
        self._readout_scale: float | None = None
        self._parameters = {p.untyped_storage()._cdata: (name, p) for name, p in named_parameters(model)}
        self._summed: dict[str, int] = {}
        self._lookups: list[tuple[str, float | None]] = []
        for storage, (_, parameter) in self._parameters.items():
            self._set(parameter, Track(active=True, weight=True, parameter=storage))

    def hooks(self, name: str, module: torch.nn.Module) -> Iterator[Any]:
        def entered(*_: object) -> None:
            self._stack.append(name)
            self._called.add(name)

        def left(*_: object) -> None:
            self._stack.pop()

        yield module.register_forward_pre_hook(entered)
        yield module.register_forward_hook(left)

    def found(self) -> Forward:
        factors = (factor for index, factor in enumerate(self._factors) if index not in self._explained)
        return Forward(
            softmaxes=tuple(self._softmaxes),
            factors=tuple(factors),
            readout_scale=self._readout_scale,
            called=frozenset(self._called),
            summed=self._summed,
            looked_up=self._factors_of_tables(),
        )

    # ---- what is known of tensors

    def factor_of(self, tensor: torch.Tensor) -> Hashable:
        """Returns what is known of a tensor, but for the places where it became so."""
        track = self._of(tensor)
        return track.active, track.weight, track.factor, track.contracted

    def _of(self, tensor: Any) -> Track:
        return self._tracks.get(id(tensor), PASSIVE)

    def _set(self, tensor: torch.Tensor, track: Track) -> None:
        if id(tensor) not in self._tracks:
            self._held.append(tensor)
            self._sharing.setdefault(tensor.untyped_storage()._cdata, []).append(id(tensor))
        self._tracks[id(tensor)] = track

    def _wrote(self, tensor: torch.Tensor, track: Track) -> None:
        """Notes what was written into a view, which is in the whole as well."""
        self._set(tensor, track)
        for other in self._sharing[tensor.untyped_storage()._cdata]:
            self._tracks[other] = track

    def _number(self, value: Any) -> tuple[bool, float | None]:
        """(whether it is a number, which one)."""
        if isinstance(value, bool):
            return False, None
        if isinstance(value, int | float):
            return True, float(value)
        if not isinstance(value, torch.Tensor) or self._of(value).active:
            return False, None
        if value.dim() == 0:
            return True, self._watch.draw_of(value).value if value.device.type == "meta" else float(value)
        # One number in every place; ones and zeros are masks.
        filled = self._watch.draw_of(value).value if value.is_floating_point() else None
        if filled not in (None, 0.0, 1.0):
            return True, filled
        return False, None

    # ---- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].dtype is torch.bool and args[0].device.type == "meta":
            return True  # code asks whether all of a mask is ones, or a batch is one sequence
        args, kwargs = self._in_one_place(name, args, kwargs)
        result = func(*args, **kwargs)
        plain = name if name.startswith("_") else name.removesuffix("_")
        in_place = name.endswith("_") and not name.startswith("__")
        track = self._follow(plain, args, kwargs)
        outputs = result if isinstance(result, list | tuple) else (result,)
        for output in outputs:
            if isinstance(output, torch.Tensor):
                if in_place and track.active:
                    self._wrote(output, track)
                elif not in_place:
                    self._set(output, track)
        return result

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Track:
        tensors = list(_tensors(args))
        tracks = [self._of(tensor) for tensor in tensors]
        active = [track for track in tracks if track.active]
        if name == "copy":
            return self._of(args[1])
        if not active:
            return PASSIVE
        if name in _PRODUCTS:
            return self._product(name, args, kwargs)
        if name in _SOFTMAXES:
            return self._softmax(self._of(args[0]))
        if name == "embedding" and (table := self._of(args[0]).parameter) is not None:
            self._lookups.append((self._parameters[table][0], 1.0))
            return replace(MADE, lookup=len(self._lookups) - 1)
        if name in _NUMBERED and kwargs.get("alpha", 1) == 1:
            return self._numbered(name, args)
        self._note_scalars(name, args, kwargs)
        if name in ("where", "cat", "stack", "maximum", "minimum"):
            logits = next((track for track in active if track.contracted is not None), None)
            return logits or merged(active)
        if name in _SAME:
            return self._of(args[0]) if isinstance(args[0], torch.Tensor) else merged(active)
        return MADE

    def _product(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Track:
        one, other = args[-2:] if name in ("mm", "bmm") else args[1:3]
        a, b = self._of(one), self._of(other)
        for factor, side in ((one, -1), (other, -2)):
            self._note_sum(factor, factor.stride(side))
        for weight, read in ((one, b), (other, a)):
            if self._of(weight).weight and weight.untyped_storage()._cdata == self._readout_storage:
                self._readout_scale = read.factor
                if read.factor is not None:
                    self._explained |= read.parts
        if not (a.active and b.active) or a.weight or b.weight:
            self._note_scalars(name, (), kwargs)
            return MADE
        alpha = kwargs.get("alpha", 1)
        product = a.times(b.factor).times(float(alpha))
        return replace(product, parts=a.parts | b.parts, contracted=int(one.shape[-1]))

    def _note_scalars(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes what an operation is told as a number, which may be a factor: as lerp's weight, addcmul's value."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, float):
                self._factors.append(Factor(self._where, name, value))

    def _note_sum(self, factor: torch.Tensor, stride: int) -> None:
        """Remembers which dimension of a parameter a product sums over: that which has the stride of the one summed."""
        storage = self._of(factor).parameter
        if storage is not None:
            name, parameter = self._parameters[storage]
            if stride in parameter.stride():
                self._summed[family_of(name)] = parameter.stride().index(stride)

    def _noted(self, rows: Track) -> Track:
        """Remembers what rows of a table have been multiplied by so far."""
        if rows.lookup is not None:
            self._lookups[rows.lookup] = (self._lookups[rows.lookup][0], rows.factor)
            self._explained |= rows.parts
        return rows

    def _factors_of_tables(self) -> dict[str, float | None]:
        """Returns the factor of each table; of one that is looked up in several ways none is known."""
        found: dict[str, float | None] = {}
        for name, factor in self._lookups:
            found[name] = factor if found.get(name, factor) == factor else None
        return found

    def _softmax(self, logits: Track) -> Track:
        if logits.contracted is not None:
            self._softmaxes.append(Softmax(self._where, logits.contracted, logits.factor))
            self._explained |= logits.parts
        return MADE

    def _numbered(self, name: str, args: tuple[Any, ...]) -> Track:
        tracks = [self._of(args[0]), self._of(args[1])]
        for own, value in ((tracks[0], args[1]), (tracks[1], args[0])):
            is_number, number = self._number(value)
            if is_number:
                if not (isinstance(args[0], torch.Tensor) and args[0].is_floating_point()) and not own.active:
                    return own
                self._factors.append(Factor(self._where, name, number))
                part = len(self._factors) - 1
                if name == "mul":
                    return self._noted(own.times(number, part))
                if name == "div" and value is args[1]:
                    return self._noted(own.times(1.0 / number if number else None, part))
                return own if name in ("add", "sub") else MADE
        if name in ("add", "sub", "rsub"):
            logits = [track for track in tracks if track.contracted is not None]
            if len(logits) == 2 and logits[0].factor != logits[1].factor:
                return replace(logits[0], factor=None, parts=logits[0].parts | logits[1].parts)
            if logits:
                return replace(logits[0], parts=frozenset().union(*(track.parts for track in logits)))
            return merged([track for track in tracks if track.active])
        if name == "mul":
            if all(track.active for track in tracks):
                product = tracks[0].times(tracks[1].factor)
                return replace(product, parts=tracks[0].parts | tracks[1].parts, **NO_LONGER)
            return tracks[0] if tracks[0].active else tracks[1]
        return tracks[0] if name == "div" and tracks[0].active and not tracks[1].active else MADE

    @property
    def _where(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _in_one_place(self, name: str, args: Any, kwargs: Any) -> Any:
        """Returns arguments with what has values taken to the meta device, where others are: there they meet."""
        if name in _READ_VALUES:
            return args, kwargs
        leaves = tree_leaves((args, kwargs))
        found = {each.device.type for each in leaves if isinstance(each, torch.Tensor) and each.dim()}
        return (args, kwargs) if found != {"cpu", "meta"} else tree_map_only(torch.Tensor, self._taken, (args, kwargs))

    def _taken(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.device.type == "meta":
            return tensor  # a number may be on the CPU anywhere, and is needed
        taken = tensor.to("meta")
        if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            self._watch.note_number(taken, float(tensor.flatten()[0]))
        return taken


_READ_VALUES = frozenset("index index_put index_put_ _unsafe_index copy_ _to_copy".split())
"""What may choose by a mask, whose values say how many there are; and what takes a tensor from one place to another."""


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for argument in args:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


class _Calls(TorchFunctionMode):
    """Spells out torch's fused attention; and notes the value of a number that becomes a tensor."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is FUSED_ATTENTION:
            return _spelled_out(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        place = {"tensor": 0, "new_tensor": 1}.get(getattr(func, "__name__", ""), len(args))
        if place < len(args) and (number := _one_number(args[place])) is not None:
            self._watch.note_number(result, number)
        return result


def _one_number(data: Any) -> float | None:
    """Returns the number that a tensor made of this has in every place; None where there is no such one."""
    if isinstance(data, list | tuple):
        found = {_one_number(each) for each in data}
        return found.pop() if len(found) == 1 else None
    return float(data) if isinstance(data, int | float) else None


def _spelled_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    logits = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.size(-1)) if scale is None else scale)
    if attn_mask is not None and attn_mask.is_floating_point():
        logits = logits + attn_mask
    return torch.softmax(logits, dim=-1) @ value
