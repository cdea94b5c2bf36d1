"""Any torch module in training, one step at a time: with an optimizer of torch, or in a DeepSpeed engine."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, distributed, nn

from mup_megatron.check.measure import batches
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.measure.optimizers import clip, of_torch, replay_for, require_one_optimizer
from mup_megatron.check.measure.replay import Replay
from mup_megatron.check.measure.trainee import At
from mup_megatron.check.subjects.sight import Sight
from mup_megatron.collectives import gathered
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan
from mup_megatron.training.ranks import world_size

Batch = Callable[[int, int], Any]
"""(step, width) → what the loss is computed from, the first dimension of its tensors over samples. Step -1 is the
batch on which activations are compared."""
Loss = Callable[[Any, Any], Tensor]
"""(model or engine, batch) → loss."""


class _Watched:
    """A module in training, or one in an engine: they are seen by a `Sight`, and share no weights.

    Args:
        model: the module.
        called: what is called for a loss: the module, or its engine.
        recipe: of the check.
        loss: gives the loss of a batch.
    """

    def __init__(self, model: nn.Module, called: Any, recipe: Recipe, loss: Loss) -> None:
        refuse_low_precision(model)
        self._model, self._called, self._recipe, self._loss = model, called, recipe, loss
        self._norm: float | None = None
        self._sight = Sight(model)
        self._seen: list[tuple[str, nn.Module, At]] | None = None

    def modules(self) -> Iterable[tuple[str, nn.Module, At]]:
        """Layers, blocks and attention logits, as a forward pass comes by them."""
        if self._seen is None:
            self._seen = self._sight.seen(self.forward)
        return self._seen

    def forward(self) -> None:
        """On the batch for comparisons."""
        with self._sight:
            self._sight.take(self._loss(self._called, self._own_batch(batches.PROBE)))

    def evaluate(self) -> bool:
        """Does the same in evaluation mode."""
        with self._sight, evaluating(self._model):
            _as_far_as_it_goes(lambda: self._loss(self._called, self._own_batch(batches.PROBE)))
        return True

    def repeat(self, index: int) -> bool:
        """On sequences of one token each, if there are any tokens."""
        repeated = of_one_token(self._own_batch(batches.PROBE), index)
        if repeated is None:
            return False
        with self._sight:
            self._loss(self._called, repeated)
        return True

    def queries(self) -> Iterable[tuple[str, nn.Module, int]]:
        """Returns queries as attention takes them in."""
        return self._sight.queries()

    def beside(self) -> Mapping[tuple[Quantity, str], tuple[float, float]]:
        """Returns what was computed between modules."""
        return self._sight.beside

    def head_sizes(self) -> dict[str, int]:
        """Returns those of attention logits, by name, where they can be seen."""
        return self._sight.head_sizes

    def gradient_norm(self) -> float | None:
        """Returns that of the last step, over all ranks, before clipping."""
        return self._norm

    def gathered_matrix(self, _name: str, shard: Tensor) -> Tensor | None:
        """Every rank has all of it."""
        return shard

    def _own_batch(self, step: int) -> Any:
        raise NotImplementedError


class ModuleTrainee(_Watched):
    """A module with optimizers of torch; a `Trainee`. One process, or several that do the same.

    Args:
        model: in training mode.
        optimizers: without any, nothing is trained.
        recipe: of the check; says where gradients are clipped.
        plan: for the model; says which optimizer should step a parameter.
        width: of the model.
        batch: gives batches.
        loss: gives the loss of one.
        schedulers: stepped after the optimizers.
        alone: the other ranks, if there are any, do something else meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        recipe: Recipe,
        plan: Plan,
        *,
        width: int,
        batch: Batch,
        loss: Loss,
        schedulers: Sequence[Any] = (),
        alone: bool = False,
    ) -> None:
        super().__init__(model, model, recipe, loss)
        self._optimizers, self._schedulers, self._alone = optimizers, schedulers, alone
        self._plan = plan
        self._width, self._batch = width, batch

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Returns all of them."""
        return self._model.named_parameters()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns a gradient as clipped; 0 for what is not trained."""
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def replay(self, name: str) -> Replay | None:
        """Returns a replay of the optimizer that the plan gives a tensor, whatever this one is."""
        if not self._optimizers or name not in self._plan.by_name:
            return None
        own = self._plan[name].optimizer
        return replay_for(self._recipe, own, of_torch(own))

    def evaluate(self) -> bool:
        """Does the forward pass in evaluation mode; of the correct side that is not asked, which shares the code."""
        return not self._alone and super().evaluate()

    def repeat(self, index: int) -> bool:
        """Does the same on sequences of one token each, if there are any tokens."""
        return not self._alone and super().repeat(index)

    def step(self, step: int) -> float:
        """One step of training."""
        loss = self._loss(self._model, self._own_batch(step))
        self._model.zero_grad()
        if loss.requires_grad:
            loss.backward()
        self._norm = clip(self._model, self._recipe.moved.clip_grad)
        for each in (*self._optimizers, *self._schedulers):
            each.step()
        return float(loss.detach())

    def gathered(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, if there are others."""
        return [value] if self._alone else gathered(value)

    def close(self) -> None:
        """Nothing is kept."""

    def _own_batch(self, step: int) -> Any:
        return self._batch(step, self._width)


class EngineTrainee(_Watched):
    """A DeepSpeed engine of any ZeRO stage; a `Trainee`. Every rank holds whole copies of the parameters.

    Args:
        engine: in single precision.
        recipe: of the check.
        width: of the model.
        batch: gives whole batches, of which each rank takes its share.
        loss: gives the loss of one.
    """

    def __init__(self, engine: Any, recipe: Recipe, *, width: int, batch: Batch, loss: Loss) -> None:
        require_one_optimizer(recipe)
        super().__init__(engine.module, engine, recipe, loss)
        self._engine, self._width, self._batch = engine, width, batch
        self._live: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self._copies = {name: nn.Parameter(_copy(p), requires_grad=False) for name, p in self._live.items()}
        self._gradients: dict[int, Tensor] = {}

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Copies, brought up to date after each step."""
        return self._copies.items()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Averaged over ranks, and clipped as the recipe says, because DeepSpeed shows what it has before it clips.

        None where DeepSpeed does not give it.
        """
        return self._gradients.get(id(parameter))

    def replay(self, _name: str) -> Replay | None:
        """Returns a replay of the recipe's optimizer, whatever this one is."""
        return replay_for(self._recipe)

    def step(self, step: int) -> float:
        """One step of training."""
        loss = self._loss(self._engine, self._own_batch(step))
        if loss.requires_grad:
            self._engine.backward(loss)
            self._gradients = self._clipped()
            self._engine.step()
        with torch.no_grad():
            for name, parameter in self._live.items():
                self._copies[name].copy_(_copy(parameter))
        return math.fsum(gathered(float(loss.detach()))) / world_size()

    def gathered(self, value: Any) -> list[Any]:
        """Returns the values of all ranks."""
        return gathered(value)

    def close(self) -> None:
        """Lets the engine go."""
        self._engine.destroy()

    def _own_batch(self, step: int) -> Any:
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
        clip = self._recipe.moved.clip_grad
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
    """Returns a whole one, in single precision."""
    from mup_megatron.modules.weights import gathered_parameter

    with gathered_parameter(parameter, change=False):
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
