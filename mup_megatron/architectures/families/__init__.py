"""The families of layers that stacks are made of, one file each; `family.py` is what one has to say.

A GPT's layer is attention and an MLP or experts, a hybrid model's is one of them. Names are
Megatron-Core's, as on one rank.
"""

from mup_megatron.architectures.families.attention import ATTENTION
from mup_megatron.architectures.families.experts import EXPERTS
from mup_megatron.architectures.families.family import Family, Growth, Size, linear, norm, vector
from mup_megatron.architectures.families.mamba import MAMBA
from mup_megatron.architectures.families.mlp import MLP

__all__ = ["ATTENTION", "EXPERTS", "MAMBA", "MLP", "Family", "Growth", "Size", "linear", "norm", "vector"]
