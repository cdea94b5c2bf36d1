"""The correct run that a live model is compared with: a plain one, torch's optimizer, and a plan carried out by hand.

Nothing here is shared with the adapters but the plan: no Megatron, no hooks of theirs, another optimizer, another
schedule, another clipping. A tied plan, grouped queries, gates, norms of all kinds are `architectures/plain/`'s.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.experts import Router
from mup_megatron.architectures.plain.model import PlainModel, draw_weights, plain_model
from mup_megatron.architectures.plain.parts import Layer
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.check.entries import is_readout
from mup_megatron.check.measure import batches
from mup_megatron.check.measure.directions import splits_of
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.measure.names import watched_modules
from mup_megatron.check.measure.optimizers import Handling, clip, correct_optimizers, replay_for
from mup_megatron.check.measure.replay import Replay
from mup_megatron.check.measure.trainee import At
from mup_megatron.check.reference.modules import groups_of, multiply
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Acts, Plan
from mup_megatron.training.samples import Batch, prepared


class Reference:
    """A plain model with a plan, ready to train; a `Trainee`. One process.

    Args:
        model: its shape.
        recipe: gives what is not per parameter, and the schedule, which has to be linear.
        plan: the recipe's for this model.
        seed: of weights and data.
        steps: of the run.
        batch_size: sequences in each batch.
    """

    def __init__(self, model: ModelFile, recipe: Recipe, plan: Plan, *, seed: int, steps: int, batch_size: int) -> None:
        assert recipe.schedule.lr_decay_style == "linear"
        self._file, self._recipe, self._plan = model, recipe, plan
        self._seed, self._steps, self._batch_size = seed, steps, batch_size
        with torch.random.fork_rng(devices=()):
            # What keeps its own start is drawn as the model is built.
            torch.manual_seed(seed)
            self._model = planned_model(plan, model, dtype=torch.float32)
        draw_weights(self._model, {e.name: e.init_std for e in plan.entries if e.init_std is not None}, seed)
        self._splits = splits_of(model)
        groups = groups_of(self._model, plan, lambda entry: Handling(self._splits.get(entry.name, ())))
        self._optimizers = correct_optimizers(groups, recipe)
        self._norm: float | None = None
        measured = architecture_of(model).measured(model)
        self._watched = [*watched_modules(self._model.named_modules(), measured)]

    def modules(self) -> Iterable[tuple[str, nn.Module, At]]:
        """Returns those that the architecture has measured."""
        return self._watched

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Returns all of them."""
        return self._model.named_parameters()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns a gradient as clipped."""
        return parameter.grad

    def replay(self, name: str) -> Replay | None:
        """Returns a replay of the optimizer that the plan gives a tensor."""
        return replay_for(self._recipe, self._plan[name].optimizer, Handling(self._splits.get(name, ())))

    def forward(self) -> None:
        """Does the forward pass on the batch for comparisons."""
        self._model.loss(self._batch(batches.PROBE))

    def evaluate(self) -> bool:
        """It has one way to compute."""
        return False

    def repeat(self, index: int) -> bool:
        """Does the forward pass on sequences of one token each."""
        tokens = self._tokens(batches.PROBE)
        self._model.loss(prepared(self._file, batches.samples(tokens[:, index : index + 1].expand_as(tokens))))
        return True

    def queries(self) -> Iterable[tuple[str, nn.Module, int]]:
        """Returns the queries that attention proper takes in."""
        attentions = {place.module for place in self._plan.places if place.acts is Acts.SCALE}
        return [(name, module, -2) for name, module in self._model.named_modules() if name in attentions]

    def beside(self) -> Mapping[tuple[Quantity, str], tuple[float, float]]:
        """Nothing: its code is right."""
        return {}

    def gradient_norm(self) -> float | None:
        """Returns the norm of the last step's gradients, before clipping."""
        return self._norm

    def step(self, step: int) -> float:
        """One step of training."""
        loss = self._model.loss(self._batch(step))
        self._model.zero_grad()
        loss.backward()
        self._norm = clip(self._model, self._recipe.moved.clip_grad)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                entry = self._plan[group["name"]]
                group["lr"] = self._rate(step, entry.lr, entry.min_lr)
            optimizer.step()
        for module in self._model.modules():
            if isinstance(module, Router):
                module.rebalance()
        return float(loss.detach())

    def gathered_matrix(self, _name: str, shard: Tensor) -> Tensor | None:
        """There are no shards."""
        return shard

    def gathered(self, value: Any) -> list[Any]:
        """There are no other ranks."""
        return [value]

    def _batch(self, step: int) -> Batch:
        return prepared(self._file, batches.samples(self._tokens(step)))

    def _tokens(self, step: int) -> Tensor:
        m = self._file
        return batches.tokens(m.vocab_size, m.seq_length, self._batch_size, seed=self._seed, step=step)

    def _rate(self, step: int, peak: float, floor: float) -> float:
        """Linear warm-up from 0, then linear to the floor."""
        warm = self._recipe.schedule.lr_warmup_fraction * self._steps
        if warm and step <= warm:
            return peak * step / warm
        end = self._recipe.schedule.lr_decay_fraction * self._steps
        if step > end:
            return floor
        return peak + (floor - peak) * (step - warm) / (end - warm)


def planned_model(plan: Plan, model: ModelFile, *, dtype: torch.dtype) -> PlainModel:
    """The plain model with each of a plan's multipliers at its weight, and constants as the plan starts them."""
    found = plain_model(model, output_multiplier=plan.output_multiplier, softmax_scale=plan.softmax_scale, dtype=dtype)
    for entry in plan.entries:
        if entry.init_value is not None:
            with torch.no_grad():
                found.get_parameter(entry.name).fill_(entry.init_value)
        if entry.multiplier != 1.0 and not (is_readout(entry) and entry.name == plan.readout):
            multiply(found.get_submodule(entry.module), entry.multiplier)
    for site in plan.sites:
        if site.acts is Acts.BRANCH:
            name, _, branch = site.module.rpartition(".")
            layer = found.get_submodule(name)
            assert isinstance(layer, Layer)
            layer.multipliers[branch] = site.factor
    return found
