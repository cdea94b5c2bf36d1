"""Imported once by the server from which test ranks are forked: the CPU runtime, and the slow imports behind it."""

import importlib.util
import warnings

import torch

from mup_megatron.megatron import cpu

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="megatron")  # its notices of what is deprecated or experimental, per process
cpu.enable()
import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402
import megatron.core.models.gpt.gpt_model  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402

if importlib.util.find_spec("megatron.training") is not None:
    import megatron.training.training  # noqa: F401
