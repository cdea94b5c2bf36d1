"""Megatron-Core on a machine without a GPU, with gloo: to try a configuration on a laptop or in CI.

    from mup_megatron.megatron import cpu

    cpu.enable()                                   # before the first `import megatron`
    ...                                            # init_process_group("gloo"), initialize_model_parallel(...)
    TransformerConfig(..., **cpu.transformer_config_overrides())

Opt-in, a no-op where torch finds a GPU, and no file of Megatron is edited. Not fast, and not a simulation of a GPU:
kernels, memory and timing are the CPU's. The device's random generator is the CPU's own, so draws differ from those on
a GPU. Transformer Engine layers do not exist here: use the local layer spec.
"""

import atexit
import os
import sys
import warnings

import torch

from mup_megatron.errors import InputError
from mup_megatron.megatron import versions
from mup_megatron.megatron.cpu import core, device, mamba, pretraining
from mup_megatron.megatron.cpu.optimizer import GroupStepAdam

__all__ = ["GroupStepAdam", "enable", "is_enabled", "transformer_config_overrides"]

_enabled = False


def enable() -> bool:
    """Prepares this process to run Megatron-Core on the CPU. Returns whether it now does: False where there is a GPU.

    Call it before the first `import megatron`; calling it again changes nothing. It imports Megatron's optimizer, which
    takes seconds. With a GPU nothing is touched. Where processes are forked on a GPU machine, call it in the child:
    asking for a GPU initializes CUDA, which no fork survives.

    Raises InputError if Megatron-Core is missing, too old, or was imported before: `megatron.core` binds
    `torch.compile` and torch's CUDA random-number hooks while it is imported, so it would keep the ones of a GPU.
    """
    global _enabled
    if _enabled:
        return True
    if torch.cuda.is_available():
        return False
    if "megatron.core" in sys.modules:
        raise InputError(
            "megatron.core was imported before the CPU runtime: "
            "call mup_megatron.megatron.cpu.enable() before the first `import megatron`."
        )
    versions.require_supported_core()
    device.pretend_device()
    # Read by Megatron alone, which wants 1 for the order of kernels on older GPUs and warns or stops without it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron says so of each fused kernel, and here there can be none.
    warnings.filterwarnings("ignore", message=".* not installed. (Falling back|Using) ", module="megatron")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    mamba.provide_kernels()
    core.install_adam()
    core.allow_norm_under_sequence_parallel()
    core.allow_resume_of_distributed_fp32()
    core.name_absent_router_kernel()
    core.give_local_attention_head_sizes()
    core.give_local_attention_a_bias()
    core.know_absent_transformer_engine()
    core.compute_yarn_on_the_cpu()
    core.sum_gradients_of_shared_keys()
    core.orthogonalise_in_fp32()
    pretraining.register()
    atexit.register(_leave_process_group)
    _enabled = True
    return True


def is_enabled() -> bool:
    """Returns whether this process runs Megatron-Core on the CPU through `enable`."""
    return _enabled


def transformer_config_overrides() -> dict[str, object]:
    """Returns the fields of `TransformerConfig` that a CPU run needs, to be merged over one's own; none unless enabled.

    They turn off what exists only as a GPU kernel, and nothing else: no field here changes what is computed. With
    `use_cpu_initialization` the initial weights don't depend on the tensor-parallel size.
    """
    return dict(core.CONFIG_OVERRIDES) if _enabled else {}


def _leave_process_group() -> None:
    """Gloo's threads outlive the interpreter otherwise, and a process that is done may abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
