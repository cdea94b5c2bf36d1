"""The correct run that a live GPT is compared with: a plain GPT, torch's optimizer, and a plan carried out by hand.

Nothing here is shared with the adapters but the plan: no Megatron, no hooks of theirs, another optimizer, another
schedule, another clipping. A tied plan, grouped queries, gates, norms of all kinds are `architectures/plain/`'s.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.decoder import Layer, PlainDecoder, cross_entropy, draw_weights
from mup_megatron.architectures.plain.experts import Router
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.check.entries import is_readout
from mup_megatron.check.measure import batches
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.measure.names import watched_modules
from mup_megatron.check.measure.optimizers import clip, replay_for
from mup_megatron.check.measure.replay import Replay
from mup_megatron.check.measure.trainee import At
from mup_megatron.check.reference.modules import multiply, optimizer_for
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Acts, Plan


class Reference:
    """A plain GPT with a plan, ready to train; a `Trainee`. One process.

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
        self._model_file, self._recipe, self._plan = model, recipe, plan
        self._seed, self._steps, self._batch_size = seed, steps, batch_size
        with torch.random.fork_rng(devices=()):
            # What keeps its own start is drawn as the model is built.
            torch.manual_seed(seed)
            self._gpt = planned_gpt(plan, model, dtype=torch.float32)
        draw_weights(self._gpt, {e.name: e.init_std for e in plan.entries if e.init_std is not None}, seed)
        optimizer = optimizer_for(self._gpt, recipe, plan)
        assert optimizer is not None
        self._optimizer = optimizer
        self._norm: float | None = None

    def modules(self) -> Iterable[tuple[str, nn.Module, At]]:
        """Those that the architecture has measured."""
        return watched_modules(self._gpt.named_modules(), architecture_of(self._model_file).measured(self._model_file))

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All of them."""
        return self._gpt.named_parameters()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns a gradient as clipped."""
        return parameter.grad

    def replay(self) -> Replay | None:
        """Returns a replay of the recipe's optimizer."""
        return replay_for(self._recipe)

    def forward(self) -> None:
        """Does the forward pass on the batch for comparisons."""
        self._gpt(self._batch(batches.PROBE)[:, :-1])

    def evaluate(self) -> bool:
        """It has one way to compute."""
        return False

    def repeat(self, index: int) -> bool:
        """Does the forward pass on sequences of one token each."""
        tokens = self._batch(batches.PROBE)[:, :-1]
        self._gpt(tokens[:, index : index + 1].expand_as(tokens))
        return True

    def queries(self) -> Iterable[tuple[str, nn.Module, int]]:
        """Returns the queries that attention proper takes in."""
        attentions = {place.module for place in self._plan.places if place.acts is Acts.SCALE}
        return [(name, module, -2) for name, module in self._gpt.named_modules() if name in attentions]

    def beside(self) -> Mapping[tuple[Quantity, str], tuple[float, float]]:
        """Nothing: its code is right."""
        return {}

    def gradient_norm(self) -> float | None:
        """Returns the norm of the last step's gradients, before clipping."""
        return self._norm

    def step(self, step: int) -> float:
        """One step of training."""
        tokens = self._batch(step)
        loss = cross_entropy(self._gpt(tokens[:, :-1]), tokens[:, 1:])
        self._optimizer.zero_grad()
        loss.backward()
        self._norm = clip(self._gpt, self._recipe.hyperparameters.clip_grad)
        for group in self._optimizer.param_groups:
            entry = self._plan[group["name"]]
            group["lr"] = self._rate(step, entry.lr, entry.min_lr)
        self._optimizer.step()
        for module in self._gpt.modules():
            if isinstance(module, Router):
                module.rebalance()
        return float(loss.detach())

    def gathered_matrix(self, _name: str, shard: Tensor) -> Tensor | None:
        """There are no shards."""
        return shard

    def gathered(self, value: Any) -> list[Any]:
        """There are no other ranks."""
        return [value]

    def _batch(self, step: int) -> Tensor:
        m = self._model_file
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


def planned_gpt(plan: Plan, model: ModelFile, *, dtype: torch.dtype) -> PlainDecoder:
    """The plain GPT with each of a plan's multipliers at its weight, and constants as the plan starts them."""
    gpt = PlainDecoder(model, output_multiplier=plan.output_multiplier, softmax_scale=plan.softmax_scale, dtype=dtype)
    for entry in plan.entries:
        if entry.init_value is not None:
            with torch.no_grad():
                gpt.get_parameter(entry.name).fill_(entry.init_value)
        if entry.multiplier != 1.0 and not is_readout(entry):
            multiply(gpt.get_submodule(entry.name.rpartition(".")[0]), entry.multiplier)
    for site in plan.sites:
        if site.acts is Acts.BRANCH:
            layer, _, branch = site.module.rpartition(".")
            found = gpt.get_submodule(layer)
            assert isinstance(found, Layer)
            found.multipliers[branch] = site.factor
    return gpt
