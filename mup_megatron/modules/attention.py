"""Where a module's attentions keep the scale of their logits.

An attention is a module whose class is called one and that has the size of its heads. It can be told its scale if it
has a float `scaling` too: so it is in most Hugging Face models, for all of their back ends, and not in torch's own
`MultiheadAttention`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.modules.names import named_modules

_HEAD_SIZES = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_SCALES = ("scaling", "scale", "softmax_scale")


@dataclass(frozen=True, slots=True)
class Attention:
    """What one attention says of itself."""

    head_size: int
    scale: float | None
    """What it multiplies logits by. None: 1/√head_size, and it cannot be told another one."""


def attention_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, Attention]]:
    """(name, module, what it says) of each attention in a model."""
    for name, module in named_modules(model):
        if "Attention" not in type(module).__name__:
            continue
        head_size = next((size for key in _HEAD_SIZES if isinstance(size := getattr(module, key, None), int)), None)
        if head_size is not None:
            key = scale_attribute(module)
            yield name, module, Attention(head_size, None if key is None else float(getattr(module, key)))


def scale_attribute(module: Any) -> str | None:
    """The name of the attribute that holds an attention's scale."""
    return next((key for key in _SCALES if isinstance(getattr(module, key, None), float)), None)


def attention_of(model: torch.nn.Module) -> Attention | None:
    """What the attentions of a model say, the first one's scale where layers differ; None where it has none.

    Raises:
        InputError: their head sizes differ.
    """
    found = [attention for _, _, attention in attention_modules(model)]
    sizes = sorted({attention.head_size for attention in found})
    if len(sizes) > 1:
        raise InputError(
            f"attentions with heads of different sizes ({', '.join(map(str, sizes))}) are not supported: one model has "
            "one scale of attention logits here."
        )
    return found[0] if found else None
