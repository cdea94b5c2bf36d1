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
names = ["pytest", "torch.distributed.checkpoint", "mup_megatron.megatron.guard", "mup_megatron.check.run_megatron"]
if importlib.util.find_spec("megatron.training") is not None:
    names += ["megatron.training.training", "megatron.core.tokenizers.text", "mup_megatron.megatron.pretrain.run"]
for name in names:
    importlib.import_module(name)
ranks.keep()
