"""The families of layers that stacks are made of, one file each; `family.py` is what one has to say.

A GPT's layer is attention and an MLP or experts, a hybrid model's is one of them. Names are
Megatron-Core's, as on one rank.
"""

from mup_megatron.architectures.families.attention import ATTENTION
from mup_megatron.architectures.families.cross_attention import CROSS_ATTENTION
from mup_megatron.architectures.families.experts import EXPERTS
from mup_megatron.architectures.families.family import Block, Family, Growth, Size, linear, norm, vector
from mup_megatron.architectures.families.latent import LATENT_ATTENTION
from mup_megatron.architectures.families.mamba import MAMBA
from mup_megatron.architectures.families.mlp import MLP
from mup_megatron.architectures.families.mtp import MTP

__all__ = [
    "ATTENTION",
    "CROSS_ATTENTION",
    "EXPERTS",
    "LATENT_ATTENTION",
    "MAMBA",
    "MLP",
    "MTP",
    "Block",
    "Family",
    "Growth",
    "Size",
    "linear",
    "norm",
    "vector",
]
