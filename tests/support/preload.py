"""Imported once by the server from which test ranks are forked: the CPU runtime, and the slow imports behind it.

Also what a run imports late, in its first step: each rank would do so again.
"""

import importlib
import importlib.util
import warnings

import torch

from mup_megatron.training import ranks

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="megatron")  # its notices of what is deprecated or experimental, per process
ranks.preload()
for name in ("pytest", "torch.distributed.checkpoint", "mup_megatron.megatron.guard", "mup_megatron.training.train"):
    importlib.import_module(name)
if importlib.util.find_spec("megatron.training") is not None:
    importlib.import_module("megatron.training.training")
