"""Any torch module in training, for a check: what is seen of it, and one step at a time. Plain torch and DeepSpeed.

What is looked at is found by a forward pass: every module that holds a weight and gives a tensor, every block of a list
of layers, what it adds to its input, and the logits of every attention, which belong to no module. They are read off
the calls of softmax and of torch's fused attention.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mup_megatron.check import batches
from mup_megatron.check.measuring import At
from mup_megatron.check.reference import clipped, replay_for
from mup_megatron.check.replay import Replay
from mup_megatron.collectives import gathered
from mup_megatron.recipe import Recipe
from mup_megatron.training.ranks import world_size

Batch = Callable[[int, int], Any]
"""(step, width) → what the loss is computed from, the first dimension of its tensors over samples. Step -1 is the
batch on which activations are compared."""
Loss = Callable[[Any, Any], Tensor]
"""(model or engine, batch) → loss."""

LOGITS = "attention_logits"
ADDED = "added"
"""What a block adds to its input: in a residual stream the sum of all hides what one adds."""
_SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_MASKED_BELOW = -1e4
"""What no logit is, but for the masks that are added to them."""


class ModuleTrainee:
    """A module with a torch optimizer; a `Trainee`. One process, or several that do the same.

    Args:
        model: in training mode.
        optimizer: None trains nothing.
        recipe: of the check; says which optimizer it should be, and where gradients are clipped.
        width: of the model.
        batch: gives batches.
        loss: gives the loss of one.
        scheduler: stepped after the optimizer.
        alone: the other ranks, if there are any, do something else meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        recipe: Recipe,
        *,
        width: int,
        batch: Batch,
        loss: Loss,
        scheduler: Any = None,
        alone: bool = False,
    ) -> None:
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._alone = alone
        self._recipe, self._width, self._batch, self._loss = recipe, width, batch, loss
        self._sight = Sight(model)
        self._seen: list[tuple[str, nn.Module, At]] | None = None
        self._norm: float | None = None

    def modules(self) -> Iterable[tuple[str, nn.Module, At]]:
        """Layers, blocks and attention logits, as a forward pass comes by them."""
        if self._seen is None:
            self._seen = self._sight.seen(self.forward)
        return self._seen

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All of them."""
        return self._model.named_parameters()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """As clipped; 0 for what is not trained."""
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def gradient_norm(self) -> float | None:
        """Before clipping."""
        return self._norm

    def replay(self) -> Replay | None:
        """Of the recipe's optimizer, whatever this one is."""
        return None if self._optimizer is None else replay_for(self._recipe)

    def forward(self) -> None:
        """On the batch for comparisons."""
        with self._sight:
            self._loss(self._model, self._batch(batches.PROBE, self._width))

    def step(self, step: int) -> float:
        """One step of training."""
        loss = self._loss(self._model, self._batch(step, self._width))
        self._model.zero_grad()
        if loss.requires_grad:
            loss.backward()
        self._norm = clipped(self._model, self._recipe.hyperparameters.clip_grad)
        if self._optimizer is not None:
            self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        return float(loss.detach())

    def whole(self, _name: str, shard: Tensor) -> Tensor | None:
        """There are no shards."""
        return shard

    def gathered(self, value: Any) -> list[Any]:
        """Of all ranks, if there are others."""
        return [value] if self._alone else gathered(value)

    def head_sizes(self) -> dict[str, int]:
        """Of attention logits, by name, where they can be seen."""
        return self._sight.head_sizes

    def close(self) -> None:
        """Nothing is kept."""


class EngineTrainee:
    """A DeepSpeed engine of any ZeRO stage; a `Trainee`. Every rank holds whole copies of the parameters.

    Args:
        engine: in single precision.
        recipe: of the check.
        width: of the model.
        batch: gives whole batches, of which each rank takes its share.
        loss: gives the loss of one.
    """

    def __init__(self, engine: Any, recipe: Recipe, *, width: int, batch: Batch, loss: Loss) -> None:
        self._engine, self._recipe = engine, recipe
        self._width, self._batch, self._loss = width, batch, loss
        self._sight = Sight(engine.module)
        self._seen: list[tuple[str, nn.Module, At]] | None = None
        self._live: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self._copies = {name: nn.Parameter(_copy(p), requires_grad=False) for name, p in self._live.items()}
        self._gradients: dict[int, Tensor] = {}
        self._norm: float | None = None

    def modules(self) -> Iterable[tuple[str, nn.Module, At]]:
        """Layers, blocks and attention logits, as a forward pass comes by them."""
        if self._seen is None:
            self._seen = self._sight.seen(self.forward)
        return self._seen

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Copies, brought up to date after each step."""
        return self._copies.items()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Averaged over ranks, and clipped as the recipe says, because DeepSpeed shows what it has before it clips.

        None where DeepSpeed does not give it.
        """
        return self._gradients.get(id(parameter))

    def gradient_norm(self) -> float | None:
        """Before clipping, which is done here after DeepSpeed's gradients were seen."""
        return self._norm

    def replay(self) -> Replay | None:
        """Of the recipe's optimizer, whatever this one is."""
        return replay_for(self._recipe)

    def forward(self) -> None:
        """On the batch for comparisons."""
        with self._sight:
            self._loss(self._engine, self._share(batches.PROBE))

    def step(self, step: int) -> float:
        """One step of training."""
        loss = self._loss(self._engine, self._share(step))
        if loss.requires_grad:
            self._engine.backward(loss)
            self._gradients = self._clipped()
            self._engine.step()
        with torch.no_grad():
            for name, parameter in self._live.items():
                self._copies[name].copy_(_copy(parameter))
        return math.fsum(gathered(float(loss.detach()))) / world_size()

    def whole(self, _name: str, shard: Tensor) -> Tensor | None:
        """Every rank has all of it."""
        return shard

    def gathered(self, value: Any) -> list[Any]:
        """Of all ranks."""
        return gathered(value)

    def head_sizes(self) -> dict[str, int]:
        """Of attention logits, by name, where they can be seen."""
        return self._sight.head_sizes

    def close(self) -> None:
        """Lets the engine go."""
        self._engine.destroy()

    def _share(self, step: int) -> Any:
        """This rank's samples, where the engine is."""
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        return _share(self._batch(step, self._width), rank, world_size(), self._engine.device)

    def _clipped(self) -> dict[int, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        found = {}
        for name, parameter in self._live.items():
            if not parameter.requires_grad:
                found[name] = torch.zeros_like(self._copies[name])
            elif (gradient := safe_get_full_grad(parameter)) is not None:
                found[name] = gradient.detach().float().clone().view_as(self._copies[name])
        norm = self._norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in found.values()))
        clip = self._recipe.hyperparameters.clip_grad
        factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
        return {id(self._copies[name]): factor * gradient for name, gradient in found.items()}


def _copy(parameter: nn.Parameter) -> Tensor:
    """A whole one, in single precision."""
    from mup_megatron.modules.apply import whole

    with whole(parameter, change=False):
        return parameter.detach().float().clone()


def _share(batch: Any, rank: int, ranks: int, device: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.chunk(ranks)[rank].to(device)
    if isinstance(batch, Mapping):
        return {key: _share(value, rank, ranks, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_share(value, rank, ranks, device) for value in batch)
    return batch


# ---- what is looked at ---------------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> list[str]:
    """The names of what stands in lists of layers."""
    return [
        f"{name}.{index}".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, _ in module.named_children()
    ]


class Sight(TorchFunctionMode):
    """Within it, attention logits and what blocks add pass through modules of their own, so that hooks see them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._blocks = frozenset(blocks(model))
        self._taps: dict[str, nn.Module] = {}
        self._inside: list[str] = []
        self._calls: Counter[str] = Counter()
        self._hooks: list[Any] = []
        self._summed: dict[tuple[int, ...], int] = {}
        self.head_sizes: dict[str, int] = {}
        """Of logits, by name: over how many products each is a sum, where that can be seen."""

    def __enter__(self) -> "Sight":
        self._inside, self._calls, self._summed = [], Counter(), {}
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
        if function is functional.scaled_dot_product_attention:
            self._show(_fused_logits(*args, **kwargs), args[0].shape[-1])
        elif function in _SOFTMAX:
            x = args[0] if args else kwargs["input"]
            if x.dim() > 2 and x.is_floating_point():
                self._show(x.masked_fill(x < _MASKED_BELOW, 0.0), self._summed.get(tuple(x.shape)))
        result = function(*args, **kwargs)
        if function in _PRODUCTS and args:
            self._summed[tuple(result.shape)] = args[0].shape[-1]
        elif function is torch.einsum and isinstance(args[0], str):
            self._summed[tuple(result.shape)] = _summed_over(*args)
        return result

    def seen(self, forward: Callable[[], None]) -> list[tuple[str, nn.Module, At]]:
        """What gives a tensor in a forward pass: modules with weights, blocks and what they add, attention logits."""
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

    def _show(self, logits: Tensor, head_size: int | None) -> None:
        where = self._inside[-1] if self._inside else ""
        count = self._calls[where]
        self._calls[where] += 1
        name = ".".join(part for part in (where, LOGITS, str(count) if count else "") if part)
        if head_size is not None:
            self.head_sizes[name] = head_size
        self._taps.setdefault(name, nn.Identity())(logits)

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda _module, _args: self._inside.append(name)

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._inside.pop()
            result = output[0] if isinstance(output, tuple) and output else output
            both = isinstance(result, Tensor) and args and isinstance(args[0], Tensor)
            if name in self._blocks and both and result.shape == args[0].shape and result.is_floating_point():
                self._taps.setdefault(f"{name}.{ADDED}", nn.Identity())(result - args[0])

        return hook


def _fused_logits(query: Tensor, key: Tensor, *_rest: Any, scale: float | None = None, **_others: Any) -> Tensor:
    if key.dim() > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    return query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)


def _summed_over(equation: str, *operands: Any) -> int:
    """How many products each element of an einsum is a sum over."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    tensors = operands[0] if operands and isinstance(operands[0], list | tuple) else operands
    sizes = {
        letter: size
        for term, tensor in zip(inputs.split(","), tensors, strict=False)
        if "." not in term
        for letter, size in zip(term, tensor.shape, strict=True)
    }
    return math.prod(size for letter, size in sizes.items() if letter not in output)
