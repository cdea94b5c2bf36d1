"""A subject of a check: a Megatron-Core model as `train` builds it, in the layout of this process's ranks.

Importing it imports Megatron: the CPU runtime has to come before.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, shapes_of
from mup_megatron.check.measure import batches, measurements
from mup_megatron.check.measure.directions import splits_of
from mup_megatron.check.measure.measurements import Grouped, Quantity
from mup_megatron.check.measure.names import watched_modules
from mup_megatron.check.measure.optimizers import Handling, replay_for
from mup_megatron.check.measure.replay import Replay
from mup_megatron.check.measure.trainee import At
from mup_megatron.collectives import gathered
from mup_megatron.megatron.names import named_modules, named_parameters, unwrapped
from mup_megatron.megatron.optimizer import is_sharded, live_values, parts_of
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Acts, Plan
from mup_megatron.training.build import Built, build
from mup_megatron.training.loop import forward_backward, train_iteration
from mup_megatron.training.options import BatchSizes, TrainingOptions, batch_sizes
from mup_megatron.training.ranks import seed_all


@dataclass(frozen=True)
class _Length:
    sequence_length: int


class _Sequences:
    """The batches of a check as the data set that the training loop asks."""

    def __init__(
        self, model: ModelFile, *, size: int, seed: int, only: int | None = None, repeated: int | None = None
    ) -> None:
        self.config = _Length(model.seq_length)
        self._model, self._size, self._seed, self._only, self._repeated = model, size, seed, only, repeated
        self._step, self._tokens = None, torch.empty(0)  # type: tuple[int | None, Tensor]

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        step = index // self._size if self._only is None else self._only
        if step != self._step:
            m = self._model
            self._step = step
            self._tokens = batches.tokens(m.vocab_size, m.seq_length, self._size, seed=self._seed, step=step)
        row = self._tokens[index % self._size]
        if self._repeated is not None:
            row = row[self._repeated].expand_as(row)
        return batches.samples(row)


class MegatronTrainee:
    """A built run, as `Trainee`. Every rank has its own part."""

    def __init__(self, built: Built, model: ModelFile, recipe: Recipe, *, seed: int, sizes: BatchSizes) -> None:
        self._built, self._recipe, self._sizes = built, recipe, sizes
        self._tied = model.tied
        self._outside = _names_outside(model)
        named = named_parameters(built.chunks, tied=model.tied)
        self._parameters = {self._outside.get(name, name): parameter for name, parameter in named}
        self._model, self._seed = model, seed
        local = _without_transformer_engine(model)
        self._plan, self._splits = recipe.plan(local), splits_of(local)
        self._norm: float | None = None
        measured = [*architecture_of(model).measured(model)]
        self._watched = [
            watched for chunk in built.chunks for watched in watched_modules(named_modules(unwrapped(chunk)), measured)
        ]
        self._data = _Sequences(model, size=sizes.global_batch, seed=seed)
        self._probe = _Sequences(model, size=sizes.global_batch, seed=seed, only=batches.PROBE)
        _step_in_single_precision(built.optimizer)
        # Where each data-parallel rank updates a share, it has the gradient of that share alone.
        self._shared = sizes.data_parallel > 1 and any(is_sharded(part) for part in parts_of(built.optimizer))

    def modules(self) -> Iterable[tuple[str, nn.Module, At]]:
        """Returns those that the architecture has measured, by global name."""
        return self._watched

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """By global name, each once. The last stage's copy of a tied embedding counts as the embedding that it is."""
        return self._parameters.items()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Reduced over ranks and clipped; 0 for what is not trained."""
        if self._shared:
            return None
        gradient: Tensor | None = getattr(parameter, "main_grad", parameter.grad)
        return torch.zeros_like(parameter) if gradient is None else gradient

    def replay(self, name: str) -> Replay | None:
        """Returns a replay of the optimizer that the right plan gives a tensor."""
        return replay_for(self._recipe, self._plan[name].optimizer, Handling(self._splits.get(name, ())))

    def forward(self) -> None:
        """Does the forward pass on the batch for comparisons."""
        forward_backward(self._built, self._probe, 0, self._sizes, forward_only=True)

    def evaluate(self) -> bool:
        """Does the forward pass of comparisons in evaluation mode."""
        for chunk in self._built.chunks:
            chunk.eval()
        try:
            self.forward()
        finally:
            for chunk in self._built.chunks:
                chunk.train()
        return True

    def repeat(self, index: int) -> bool:
        """Does the forward pass on sequences of one token each."""
        repeated = _Sequences(
            self._model, size=self._sizes.global_batch, seed=self._seed, only=batches.PROBE, repeated=index
        )
        forward_backward(self._built, repeated, 0, self._sizes, forward_only=True)
        return True

    def queries(self) -> Iterable[tuple[str, nn.Module, int]]:
        """Yields the queries that attention proper takes in, [position, batch, head, channel]."""
        places = architecture_of(self._model).places(self._model)
        attentions = {place.module for place in places if place.acts is Acts.SCALE}
        for chunk in self._built.chunks:
            for name, module in named_modules(unwrapped(chunk)):
                if name in attentions:
                    yield name, module, 0

    def beside(self) -> Mapping[tuple[Quantity, str], tuple[float, float]]:
        """Nothing: the reference has code of its own, so activations tell."""
        return {}

    def gradient_norm(self) -> float | None:
        """Returns the last step's gradient norm before clipping; None without clipping, where Megatron has none."""
        return self._norm

    def step(self, step: int) -> float:
        """One iteration of the training loop, and of the schedule."""
        measured = train_iteration(self._built, self._data, step, self._sizes, problem=False)
        # Without clipping Megatron need not compute it.
        self._norm = measured.grad_norm if self._recipe.moved.clip_grad > 0 else None
        self._built.scheduler.step(increment=1)
        return measured.loss

    def gathered_matrix(self, name: str, shard: Tensor) -> Tensor | None:
        """Tensor-parallel shards put together."""
        parameter = self._parameters[name]
        if self._plan[name].is_expert:
            group = parallel_state.get_expert_tensor_parallel_group()
        else:
            group = parallel_state.get_tensor_model_parallel_group()
        size = torch.distributed.get_world_size(group)
        if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
            return shard
        shards = [torch.empty_like(shard) for _ in range(size)]
        torch.distributed.all_gather(shards, shard.contiguous(), group=group)
        return torch.cat(shards, dim=getattr(parameter, "partition_dim", 0))

    def gathered(self, value: Any) -> list[Any]:
        """Returns the values of all ranks."""
        return gathered(value)

    def groups(self) -> dict[str, Grouped]:
        """Returns what the optimizer holds for each parameter whose state this rank owns."""
        optimizer, chunks = self._built.optimizer, self._built.chunks
        h = self._recipe.moved
        return {
            self._outside.get(name, name): Grouped(
                lr=h.lr if values.max_lr is None else values.max_lr,
                min_lr=h.min_lr if values.min_lr is None else values.min_lr,
                eps=values.eps,
                weight_decay=values.weight_decay,
            )
            for name, values in live_values(optimizer, chunks, tied=self._tied).items()
        }


def _step_in_single_precision(optimizer: Any) -> None:
    """Lets an optimizer multiply matrices as it does elsewhere in a check, where it is allowed less: Muon, in bf16."""
    for part in parts_of(optimizer):
        if hasattr(part.optimizer, "fp32_matmul_prec"):
            part.optimizer.fp32_matmul_prec = "highest"


def _without_transformer_engine(model: ModelFile) -> ModelFile:
    """The same model without Transformer Engine, which has norms inside of the layer that follows."""
    return model.model_copy(update={"transformer_impl": "local"})


def _names_outside(model: ModelFile) -> dict[str, str]:
    """Names of parameters → those that they have in the same model without Transformer Engine."""
    tensors, plain = (shapes_of(each, each)[1].tensors for each in (model, _without_transformer_engine(model)))
    return {tensor.name: other.name for tensor, other in zip(tensors, plain, strict=True)}


def build_megatron(
    model: ModelFile,
    recipe: Recipe,
    plan: Plan,
    *,
    seed: int,
    protocol: measurements.RunProtocol,
    layout: TrainingOptions,
    world_size: int,
    tamper: Callable[[Built], None] | None = None,
) -> MegatronTrainee:
    """Returns a run as `train` would begin it. Collective; Megatron's groups have to be joined.

    Args:
        model: as `available_model` returns it.
        recipe: of the check.
        plan: of this recipe for this model, or a wrong one to see what it does.
        seed: of weights and data.
        protocol: for length and batch.
        layout: whose parallel sizes count.
        world_size: of all ranks.
        tamper: changes what was built.
    """
    options = options_for(protocol, layout, seed=seed)
    seed_all(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    built = build(model, recipe, plan, options, initialize=True)
    if tamper is not None:
        tamper(built)
    return MegatronTrainee(built, model, recipe, seed=seed, sizes=batch_sizes(options, world_size))


def options_for(protocol: measurements.RunProtocol, layout: TrainingOptions, *, seed: int) -> TrainingOptions:
    """Returns the options of one run of a check."""
    return replace(
        layout,
        train_iters=protocol.steps,
        global_batch_size=protocol.batch_size,
        seed=seed,
        bf16=False,
        use_cpu_initialization=True,
    )
