"""Any torch module in training, for a check: what is seen of it, and one step at a time. Plain torch and DeepSpeed.

What is looked at is found by a forward pass: every module that holds a weight and gives a tensor, every block of a list
of layers, what it adds to its input, and the logits of every attention, which belong to no module. They are read off
the calls of softmax and of torch's fused attention.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mup_megatron.check.measure import batches
from mup_megatron.check.measure.measurements import WITHOUT_MEAN, Quantity
from mup_megatron.check.measure.measuring import At
from mup_megatron.check.measure.replay import Replay
from mup_megatron.check.reference.megatron import clipped, replay_for
from mup_megatron.check.verdict.bounds import LOSS_INPUT
from mup_megatron.collectives import gathered
from mup_megatron.errors import InputError
from mup_megatron.modules.forward import FUSED_ATTENTION
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


class _Seen:
    """What a trainee says of its forward passes, from what its `Sight` has seen of them."""

    _sight: "Sight"

    def queries(self) -> Iterable[tuple[str, nn.Module, int]]:
        """As attention takes them in."""
        return self._sight.queries()

    def beside(self) -> Mapping[tuple[Quantity, str], tuple[float, float]]:
        """What was computed between modules."""
        return self._sight.beside


class ModuleTrainee(_Seen):
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
        refuse_low_precision(model)
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._alone = alone
        self._recipe, self._width, self._batch, self._loss = recipe, width, batch, loss
        self._norm: float | None = None
        self._sight = Sight(model)
        self._seen: list[tuple[str, nn.Module, At]] | None = None

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

    def replay(self) -> Replay | None:
        """Of the recipe's optimizer, whatever this one is."""
        return None if self._optimizer is None else replay_for(self._recipe)

    def forward(self) -> None:
        """On the batch for comparisons."""
        with self._sight:
            self._sight.take(self._loss(self._model, self._batch(batches.PROBE, self._width)))

    def evaluate(self) -> bool:
        """Likewise in evaluation mode; of the correct side that is not asked, which shares the code."""
        if self._alone:
            return False
        with self._sight, evaluating(self._model):
            _as_far_as_it_goes(lambda: self._loss(self._model, self._batch(batches.PROBE, self._width)))
        return True

    def repeat(self, index: int) -> bool:
        """On sequences of one token each, if there are any tokens."""
        batch = self._batch(batches.PROBE, self._width)
        repeated = of_one_token(batch, index)
        if self._alone or repeated is None:
            return False
        with self._sight:
            self._loss(self._model, repeated)
        return True

    def gradient_norm(self) -> float | None:
        """Of the last step, before clipping."""
        return self._norm

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


class EngineTrainee(_Seen):
    """A DeepSpeed engine of any ZeRO stage; a `Trainee`. Every rank holds whole copies of the parameters.

    Args:
        engine: in single precision.
        recipe: of the check.
        width: of the model.
        batch: gives whole batches, of which each rank takes its share.
        loss: gives the loss of one.
    """

    def __init__(self, engine: Any, recipe: Recipe, *, width: int, batch: Batch, loss: Loss) -> None:
        refuse_low_precision(engine.module)
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

    def replay(self) -> Replay | None:
        """Of the recipe's optimizer, whatever this one is."""
        return replay_for(self._recipe)

    def forward(self) -> None:
        """On the batch for comparisons."""
        with self._sight:
            self._sight.take(self._loss(self._engine, self._share(batches.PROBE)))

    def evaluate(self) -> bool:
        """Likewise in evaluation mode."""
        with self._sight, evaluating(self._engine.module):
            _as_far_as_it_goes(lambda: self._loss(self._engine, self._share(batches.PROBE)))
        return True

    def repeat(self, index: int) -> bool:
        """On sequences of one token each, if there are any tokens."""
        repeated = of_one_token(self._share(batches.PROBE), index)
        if repeated is None:
            return False
        with self._sight:
            self._loss(self._engine, repeated)
        return True

    def gradient_norm(self) -> float | None:
        """Over all ranks, before clipping."""
        return self._norm

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


def refuse_low_precision(model: nn.Module) -> None:
    """Raises for a model of which nothing can be read: below float32 a step rounds away what it does to a weight.

    Raises:
        InputError: a parameter that is trained is in less than single precision.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"{name} is in {dtype}, in which a step rounds away what a check reads from it. Build the model in "
                "float32 for the check, and leave bf16 and fp16 off in what prepares it."
            )


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


def _as_far_as_it_goes(forward: Callable[[], object]) -> None:
    """A model may give something else in evaluation, of which its loss can make nothing: boxes, one token's logits."""
    # Whatever somebody's model and loss raise.
    with suppress(Exception):
        forward()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it a model evaluates, but for its batch norms: their running statistics belong to a trained model, and
    before training are those of nothing. They compute as in training, and note nothing.
    """
    were = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.training, norm.momentum = True, 0.0
    try:
        yield
    finally:
        for module, was in were:
            module.training = was
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def of_one_token(batch: Any, index: int) -> Any:
    """A batch in which every sequence of whole numbers repeats the one that it has at an index; None if it has none."""
    if isinstance(batch, Tensor):
        if batch.dim() != 2 or batch.is_floating_point() or batch.dtype is torch.bool or batch.shape[1] <= index:
            return None
        return batch[:, index : index + 1].expand_as(batch).contiguous()
    if isinstance(batch, Mapping):
        changed = {k: of_one_token(v, index) for k, v in batch.items() if "position" not in str(k)}
        if all(value is None for value in changed.values()):
            return None
        return {k: v if changed.get(k) is None else changed[k] for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [of_one_token(value, index) for value in batch]
        if all(part is None for part in parts):
            return None
        return type(batch)(old if new is None else new for old, new in zip(batch, parts, strict=True))
    return None


# ---- what is looked at ---------------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> list[str]:
    """The names of what stands in lists of layers and has matrices.

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
        """What stands for the queries of each attention that was seen."""
        return [(name, tap, -2) for name, tap in self._queries.items()]

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


def _queries_of(equation: str, *operands: Any) -> Tensor | None:
    """The operand of an einsum that has the last dimension but one of its result, which is moved to the same place."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    tensors = operands[0] if operands and isinstance(operands[0], list | tuple) else operands
    for term, tensor in zip(inputs.split(","), tensors, strict=False):
        if len(output) > 1 and "." not in term and output[-2] in term:
            result: Tensor = tensor.movedim(term.index(output[-2]), -2)
            return result
    return None
