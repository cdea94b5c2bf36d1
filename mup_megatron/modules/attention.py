"""The attentions of a module, and where they keep the scale of their logits.

An attention is a module whose class is called one and that has the size of its heads. It can be told its scale if it
has a float `scaling` too: so it is in most Hugging Face models, for all of their back ends, and not in torch's own
`MultiheadAttention`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.modules.names import named_modules
from mup_megatron.validation import brief

_HEAD_SIZES = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_SCALES = ("scaling", "scale", "softmax_scale")


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """The settings that one attention says it has."""

    head_size: int
    scale: float | None
    """What it multiplies logits by. None: 1/√head_size, and it cannot be told another one."""


def is_attention(module: torch.nn.Module) -> bool:
    """Returns whether a module is an attention, by what its class is called."""
    return "Attention" in type(module).__name__


def is_mixer(module: torch.nn.Module) -> bool:
    """Returns whether a module mixes positions, as an attention or as a state space, by what its class is called."""
    return re.search("Attention|Mixer|Mamba", type(module).__name__) is not None


def attention_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, AttentionSettings]]:
    """(name, module, what it says) of each attention in a model."""
    for name, module in named_modules(model):
        if not is_attention(module):
            continue
        head_size = next((size for key in _HEAD_SIZES if isinstance(size := getattr(module, key, None), int)), None)
        if head_size is not None:
            key = scale_attribute(module)
            yield name, module, AttentionSettings(head_size, None if key is None else float(getattr(module, key)))


def scale_attribute(module: Any) -> str | None:
    """Returns the name of the attribute that holds an attention's scale."""
    return next((key for key in _SCALES if isinstance(getattr(module, key, None), float)), None)


def attentions_of(model: torch.nn.Module) -> dict[str, AttentionSettings]:
    """Returns what each attention of a model says, by its name."""
    return {name: attention for name, _, attention in attention_modules(model)}


def attention_of(model: torch.nn.Module) -> AttentionSettings | None:
    """Returns what the attentions of a model say, the first one's scale where layers differ; None where it has none.

    Raises:
        InputError: their head sizes differ.
    """
    found = attentions_of(model)
    first = {attention.head_size: name for name, attention in reversed(found.items())}
    if len(first) > 1:
        one, other = sorted(first)[:2]
        raise InputError(
            f"heads of different sizes ({other} in {brief(first[other], 60)}, {one} in {brief(first[one], 60)}) are "
            "not supported: one module has one attention scale here. Give all attentions heads of one size, or choose "
            "another model."
        )
    return next(iter(found.values()), None)
