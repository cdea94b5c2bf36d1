"""The ranks that a training run divides a model over, which decide whether Megatron can train its kinds of layers."""

from dataclasses import dataclass

__all__ = ["Layout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The numbers of ranks of a run. Fields are Megatron-LM's arguments of the same name."""

    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int
    sequence_parallel: bool
