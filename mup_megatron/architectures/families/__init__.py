"""The families of layers that stacks are made of, one file each; `family.py` is what one has to say.

A GPT's layer is attention and an MLP, a hybrid model's is one of them. Names are Megatron-Core's, as on one rank.
"""

from mup_megatron.architectures.families.attention import ATTENTION
from mup_megatron.architectures.families.cross_attention import CROSS_ATTENTION
from mup_megatron.architectures.families.family import Family, Growth, Size, linear, norm, vector
from mup_megatron.architectures.families.mlp import MLP

__all__ = ["ATTENTION", "CROSS_ATTENTION", "MLP", "Family", "Growth", "Size", "linear", "norm", "vector"]
