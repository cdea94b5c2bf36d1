"""The parts of a torch module that are looked at: found by a forward pass, whatever the module is.

Every module that holds a weight and gives a tensor, every block of a list of layers, what it adds to its input, and the
logits of every attention, which belong to no module. They are read off the calls of softmax and of torch's fused
attention.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mup_megatron.check.measure.measurements import LOGITS, LOSS_INPUT, WITHOUT_MEAN, Quantity
from mup_megatron.check.measure.trainee import At
from mup_megatron.modules.forward import FUSED_ATTENTION

ADDED = "added"
"""What a block adds to its input: in a residual stream the sum of all hides what one adds."""
_SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_)
_NONLINEAR = {
    getattr(owner, name): name
    for name in ("gelu", "silu", "relu", "tanh", "sigmoid", "softplus", "elu", "mish", "hardswish", "leaky_relu")
    for owner in (functional, torch, Tensor)
    if hasattr(owner, name)
}
_NORMS = {functional.layer_norm: 4, functional.rms_norm: 3, functional.group_norm: 4, functional.batch_norm: 7}
"""Functions → which of their arguments is eps."""
_LOSSES = (functional.cross_entropy, functional.nll_loss, functional.mse_loss, functional.l1_loss)
_EPS = 1e-2
"""What is added that is less is an eps."""
_MASKED_BELOW = -1e4
"""What no logit is, but for the masks that are added to them."""


def blocks(model: nn.Module) -> list[str]:
    """Returns the names of what stands in lists of layers and has matrices.

    A norm in a list is none: its input less its output is what is left of two things of one size, and follows width.
    """
    return [
        f"{name}.{index}".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, child in module.named_children()
        if any(parameter.dim() > 1 for parameter in child.parameters())
    ]


def copying(model: nn.Module) -> dict[str, str]:
    """The modules of a model that copy the layer which they are given, weights too → how their class is called."""
    kinds = (nn.TransformerEncoder, nn.TransformerDecoder)
    return {name: f"nn.{kind.__name__}" for name, m in model.named_modules() for kind in kinds if isinstance(m, kind)}


class Sight(TorchFunctionMode):
    """Within it, attention logits and what blocks add pass through modules of their own, so that hooks see them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._blocks = frozenset(blocks(model))
        self._taps: dict[str, nn.Module] = {}
        self._queries: dict[str, nn.Module] = {}
        self._inside: list[str] = []
        self._calls: Counter[str] = Counter()
        self._hooks: list[Any] = []
        self._summed: dict[tuple[int, ...], tuple[int, Tensor | None]] = {}
        """Of the results of products, by shape: over how many products each is a sum, and of what."""
        self._losses: list[float] = []
        self._passes = self._count = 0
        self._deep = 0
        self.head_sizes: dict[str, int] = {}
        """Of logits, by name: over how many products each is a sum, where that can be seen."""
        self.beside: dict[tuple[Quantity, str], tuple[float, float]] = {}
        """What the last forward pass computed between modules: (sum, count); of `INSIDE` a sum of squares."""

    def __enter__(self) -> "Sight":
        self._inside, self._calls, self._summed = [], Counter(), {}
        self._losses, self._passes, self._count, self.beside = [], 0, 0, {}
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name)))
            self._hooks.append(module.register_forward_hook(self._leaving(name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        while self._hooks:
            self._hooks.pop().remove()

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is FUSED_ATTENTION:
            self._show(_fused_logits(*args, **kwargs), args[0].shape[-1], args[0])
        elif function in _SOFTMAX:
            x = args[0] if args else kwargs["input"]
            if x.dim() > 2 and x.is_floating_point():
                size, queries = self._summed.get(tuple(x.shape), (None, None))
                self._show(x.masked_fill(x < _MASKED_BELOW, 0.0), size, queries)
        elif function in _SUMS:
            self._note_summands(args)
        elif function in _NONLINEAR and args:
            self._note(args[0], self._named(_NONLINEAR[function]))
        elif function in _NORMS:
            place = _NORMS[function]
            eps = kwargs.get("eps", args[place] if len(args) > place else None)
            if isinstance(eps, float):
                self._constant("eps", eps)
        elif function in _LOSSES and args and self._deep == 0:
            self._tap(LOSS_INPUT, args[0])
        self._deep += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self._deep -= 1
        if function in _PRODUCTS and args:
            self._summed[tuple(result.shape)] = (args[0].shape[-1], args[0])
        elif function is torch.einsum and isinstance(args[0], str):
            self._summed[tuple(result.shape)] = (_summed_over(*args), _queries_of(*args))
        elif function in _LOSSES and self._deep == 0 and result.dim() == 0:
            self._losses.append(float(result.detach()))
        return result

    def take(self, loss: Any) -> None:
        """Takes note of what came out at the end."""
        of_each = len(self._losses) / self._passes if self._passes else 0.0
        if self._passes > 1 and of_each == 1.0 and isinstance(loss, Tensor) and loss.numel() == 1:
            mean = sum(self._losses) / len(self._losses)
            if mean > 0:
                self.beside[Quantity.SUMMED, "loss"] = (float(loss.detach()) / mean, 1.0)

    def queries(self) -> list[tuple[str, nn.Module, int]]:
        """Returns what stands for the queries of each attention that was seen."""
        return [(name, tap, -2) for name, tap in self._queries.items()]

    def seen(self, forward: Callable[[], None]) -> list[tuple[str, nn.Module, At]]:
        """Returns what gives a tensor in a pass: modules with weights, blocks and what they add, attention logits."""
        wanted = {
            name for name, module in self._model.named_modules() if name and any(True for _ in module.parameters(False))
        }
        wanted |= set(blocks(self._model))
        found: dict[str, tuple[nn.Module, At]] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, _args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) and output else output
                if isinstance(first, Tensor) and first.is_floating_point():
                    found[name] = module, "output"

            return hook

        hooks = [m.register_forward_hook(note(name)) for name, m in self._model.named_modules() if name in wanted]
        try:
            with torch.no_grad():
                forward()
        finally:
            for hook in hooks:
                hook.remove()
        found |= {name: (tap, "input") for name, tap in self._taps.items()}
        return [(name, module, at) for name, (module, at) in found.items()]

    def _show(self, logits: Tensor, head_size: int | None, queries: Tensor | None) -> None:
        name = self._named(LOGITS)
        if head_size is not None:
            self.head_sizes[name] = head_size
        self._taps.setdefault(name, nn.Identity())(logits)
        if len(logits) > 1:
            self._note(logits.detach() - logits.detach().mean(0, keepdim=True), f"{name}.{WITHOUT_MEAN}")
        self._place(name)
        if queries is not None:
            self._queries.setdefault(name, nn.Identity())(queries)

    def _tap(self, what: str, x: Any) -> None:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0:
            name = self._named(what, "")
            self._taps.setdefault(name, nn.Identity())(x)
            self._place(name)

    def _named(self, what: str, where: str | None = None) -> str:
        """With where it is computed, and a number from the second time on."""
        place = (self._inside[-1] if self._inside else "") if where is None else where
        count = self._calls[f"{place}.{what}"]
        self._calls[f"{place}.{what}"] += 1
        return ".".join(part for part in (place, what, str(count) if count else "") if part)

    def _note_summands(self, args: Sequence[Any]) -> None:
        if len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            one, other = args[0], args[1]
            # Numbered whatever their sizes, which may be alike at one width alone.
            names = self._named("summand"), self._named("summand")
            # Of tensors of one size: what is broadcast is a bias, or a mask, or a table of positions.
            if one.dim() > 1 and one.dim() == other.dim() and one.shape[1:] == other.shape[1:]:
                for name, x in zip(names, (one, other), strict=True):
                    self._note(x, name)
        elif len(args) > 1 and isinstance(args[1], float) and 0 < args[1] < _EPS:
            self._constant("eps", args[1])

    def _note(self, x: Any, name: str) -> None:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1:
            with torch.no_grad():
                squares = x.detach().masked_fill(x < _MASKED_BELOW, 0.0).double().square().sum().item()
            self.beside[Quantity.INSIDE, name] = (squares, x.numel())
            self._place(name)

    def _place(self, name: str) -> None:
        self._count += 1
        self.beside[Quantity.PLACE, name] = (self._count, 1.0)

    def _constant(self, what: str, value: float) -> None:
        name = self._named(what)
        self.beside[Quantity.CONSTANT, name] = (value, 1.0)
        self._place(name)

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            self._passes += not name
            self._inside.append(name)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._inside.pop()
            result = output[0] if isinstance(output, tuple) and output else output
            both = isinstance(result, Tensor) and args and isinstance(args[0], Tensor)
            if name in self._blocks and both and result.shape == args[0].shape and result.is_floating_point():
                self._taps.setdefault(f"{name}.{ADDED}", nn.Identity())(result - args[0])
                self._place(f"{name}.{ADDED}")
            self._place(name)

        return hook


def _fused_logits(query: Tensor, key: Tensor, *_rest: Any, scale: float | None = None, **_others: Any) -> Tensor:
    if key.dim() > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    return query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)


def _summed_over(equation: str, *operands: Any) -> int:
    """Returns how many products each element of an einsum is a sum over."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    tensors = operands[0] if operands and isinstance(operands[0], list | tuple) else operands
    sizes = {
        letter: size
        for term, tensor in zip(inputs.split(","), tensors, strict=False)
        if "." not in term
        for letter, size in zip(term, tensor.shape, strict=True)
    }
    return math.prod(size for letter, size in sizes.items() if letter not in output)


def _queries_of(equation: str, *operands: Any) -> Tensor | None:
    """The operand of an einsum that has the last dimension but one of its result, which is moved to the same place."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    tensors = operands[0] if operands and isinstance(operands[0], list | tuple) else operands
    for term, tensor in zip(inputs.split(","), tensors, strict=False):
        if len(output) > 1 and "." not in term and output[-2] in term:
            result: Tensor = tensor.movedim(term.index(output[-2]), -2)
            return result
    return None
