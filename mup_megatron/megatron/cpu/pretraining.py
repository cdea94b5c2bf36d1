"""The parts that Megatron-LM's training loop (megatron.training, megatron.legacy) needs without a GPU. No fork of it.

Everything here waits until the module that it is about has been imported, and imports none itself: programs that stay
with Megatron-Core never notice. In which order things are imported does not matter either.
"""

from typing import Any

import wrapt


def register() -> None:
    """Prepare the modules of Megatron-LM for the CPU, each once it is imported."""
    wrapt.register_post_import_hook(_skip_warm_up, "megatron.training.initialize")
    wrapt.register_post_import_hook(_skip_kernels, "megatron.legacy.fused_kernels")


def _skip_warm_up(initialize: Any) -> None:
    """Leave out the warm-up of compiled functions before training.

    Nothing is compiled here. What it would do is draw random numbers, and how many depends on the layout, so that
    losses would no longer agree between layouts.
    """
    assert hasattr(initialize, "_warmup_jit_function")
    initialize._warmup_jit_function = _nothing


def _skip_kernels(fused_kernels: Any) -> None:
    """Leave out the compilation of 0.16's fused softmax kernels. It asks for nvcc even where no flag asks for them."""
    assert hasattr(fused_kernels, "load")
    fused_kernels.load = _nothing


def _nothing(*args: Any, **kwargs: Any) -> None: ...
