"""A launch script: `examples/pretrain.py` with context parallelism on the CPU.

Megatron's own comes with Transformer Engine's attention. Here each rank gathers all keys and values and attends from
its part of the sequence, so that everything else of a run (slices of a batch, positions, gradients, groups) is what it
is on GPUs.
"""

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.utils import get_batch_on_this_cp_rank

_original: Callable[..., None] = DotProductAttention.__init__


def _init(self: Any, config: Any, *args: Any, cp_comm_type: Any = None, **kwargs: Any) -> None:
    whole = copy.copy(config)
    whole.context_parallel_size = 1
    _original(self, whole, *args, **kwargs)
    self.config = config


class _Gathered(torch.autograd.Function):
    """All ranks' parts of a sequence, one after the other."""

    @staticmethod
    def forward(context: Any, part: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        group, gradient = parallel_state.get_context_parallel_group(), gradients[0].contiguous()
        torch.distributed.all_reduce(gradient, group=group)
        return gradient.chunk(group.size())[group.rank()]


def _forward(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Causal attention; all are [sequence, batch, heads, size] of this rank's part."""
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    half = len(query) // 2
    # Rank r has the pieces r and 2·ranks - 1 - r, so that all have as much to do.
    places = [torch.arange(half) + half * piece for r in range(ranks) for piece in (r, 2 * ranks - 1 - r)]
    mine, order = torch.cat(places[2 * rank : 2 * rank + 2]), torch.cat(places)
    keys, values = (_Gathered.apply(each.contiguous()) for each in (key, value))  # type: ignore[no-untyped-call]
    scores = torch.einsum("qbhd,kbhd->bhqk", query, keys) * self.softmax_scale
    weights = scores.masked_fill(order > mine[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, values).flatten(2)


DotProductAttention.__init__ = _init  # type: ignore[method-assign]
DotProductAttention.forward = _forward  # type: ignore[method-assign]

script = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "pretrain.py"))
whole_batches = script["forward_step"]


def forward_step(batches: Any, model: Any) -> Any:
    """As the example's, with this rank's part of each sample."""

    def parts() -> Any:
        sample = {name: tensor for name, tensor in next(batches).items() if name in script["FIELDS"]}
        yield get_batch_on_this_cp_rank(sample, is_hybrid_cp=False)

    return whole_batches(parts(), model)


if __name__ == "__main__":
    script["main"].__globals__["forward_step"] = forward_step
    script["main"]()
