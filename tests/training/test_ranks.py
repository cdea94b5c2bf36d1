"""The processes of a run: which backend they meet on."""

from support.processes import run_ranks

from mup_megatron.training.ranks import backend


def test_a_gpu_that_is_pretended_is_none() -> None:
    """In a rank of the tests, which has the CPU runtime: torch says there is a GPU, and no nccl would work on it."""
    assert run_ranks(pretended_and_backend, 1)[0] == (True, "gloo")


def pretended_and_backend() -> tuple[bool, str]:
    import torch

    return torch.cuda.is_available(), backend()
