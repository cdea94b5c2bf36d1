"""What processes of runs have imported when they are forked, so that a run begins in a fraction of a second."""

import torch

from mup_megatron.training import ranks

ranks.preload()
torch.set_num_threads(1)

import arms  # noqa: E402, F401

import mup_megatron.check.transfer  # noqa: E402, F401
