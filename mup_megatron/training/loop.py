"""One iteration of training and of validation, through Megatron's pipeline schedules. Builds nothing, writes nothing.

Importing it imports Megatron: the CPU runtime has to come before.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from mup_megatron.training.build import Built
from mup_megatron.training.data.dataset import global_batch
from mup_megatron.training.objectives import Objective
from mup_megatron.training.options import BatchSizes
from mup_megatron.training.samples import Batch


class IterationResult(NamedTuple):
    """The values of an iteration that all ranks know after it."""

    loss: float
    """Mean over the global batch."""
    grad_norm: float
    problems: bool
    """Whether a rank said that something went wrong outside of training."""


def train_iteration(built: Built, dataset: Any, iteration: int, sizes: BatchSizes, *, problem: bool) -> IterationResult:
    """Does forward, backward and update. Collective; every rank returns the same loss.

    Args:
        built: the run's parts.
        dataset: of `build_datasets`.
        iteration: from 0.
        sizes: of the batch.
        problem: whether this rank has to stop; told to all along with the loss, which costs nothing.
    """
    for chunk in built.chunks:
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    losses = forward_backward(built, dataset, iteration, sizes, forward_only=False)
    updated, grad_norm, _ = built.optimizer.step()
    assert updated  # only fp16's loss scaling skips an update
    grad_norm = float(grad_norm)
    loss, bad_norms, problems = _summed(_share_of_mean(losses), float(not math.isfinite(grad_norm)), float(problem))
    # All ranks compute one global norm; that they stop together must not hang on it.
    return IterationResult(loss, grad_norm if not bad_norms or not math.isfinite(grad_norm) else math.nan, problems > 0)


def validation_loss(built: Built, dataset: Any, iterations: int, sizes: BatchSizes) -> float:
    """Returns the mean loss over the first `iterations` batches of the validation set, always the same. Collective."""
    for chunk in built.chunks:
        chunk.eval()
    with torch.no_grad():
        shares = [
            _share_of_mean(forward_backward(built, dataset, iteration, sizes, forward_only=True))
            for iteration in range(iterations)
        ]
    for chunk in built.chunks:
        chunk.train()
    return _summed(math.fsum(shares))[0] / iterations


def forward_backward(
    built: Built, dataset: Any, iteration: int, sizes: BatchSizes, *, forward_only: bool
) -> list[torch.Tensor]:
    """Returns the loss of each micro-batch, on the last pipeline stage; nothing on the others."""
    batches = _batches(built, dataset, iteration, sizes)
    losses: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, built.objective),
        data_iterator=[iter(batches) for _ in built.chunks],
        model=list(built.chunks),
        num_microbatches=sizes.micro_batches,
        seq_length=dataset.config.sequence_length,
        micro_batch_size=sizes.micro_batch,
        forward_only=forward_only,
    )
    return losses


def _batches(built: Built, dataset: Any, iteration: int, sizes: BatchSizes) -> Sequence[Batch | None]:
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    ends = first or parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    if not (ends or built.objective.on_every_stage):
        return [None] * sizes.micro_batches  # a middle stage gets activations alone
    found = global_batch(
        dataset,
        iteration,
        global_batch_size=sizes.global_batch,
        micro_batch_size=sizes.micro_batch,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=sizes.data_parallel,
    )
    return [built.objective.prepared(batch) for batch in found]


def _forward_step(
    objective: Objective, batches: Iterator[Batch | None], model: Any
) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)
    if batch is None:
        return model(None, None, None), _no_loss
    on_device = {key: value.cuda(non_blocking=True) for key, value in batch.items()}
    output, loss_of = objective.forward(model, on_device)

    def mean(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss = loss_of(result)
        # A copy, because Megatron divides the first by the number of micro-batches in place.
        return loss, loss.detach().clone()

    return output, mean


def _no_loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("only the last pipeline stage has a loss, and it has data")


def _share_of_mean(losses: Sequence[torch.Tensor]) -> float:
    """Returns what this rank adds to the mean over the global batch. The loss of tensor-parallel ranks counts once."""
    if not losses or parallel_state.get_tensor_model_parallel_rank() != 0:
        return 0.0
    mean: float = torch.stack(list(losses)).double().mean().item()
    data_parallel: int = parallel_state.get_data_parallel_world_size()
    return mean / data_parallel


def _summed(*values: float) -> list[float]:
    """Each value's sum over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(total)
    result: list[float] = total.tolist()
    return result
