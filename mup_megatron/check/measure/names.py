"""Names of a GPT as Megatron calls its parts: which modules are looked at. And which layer something is in."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from mup_megatron.check.measure.trainee import At

LOGITS = "scale_mask_softmax"
ATTENTION = "core_attention"
_OUTPUTS = (
    "_embeddings",
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
    "norm",
    "output_layer",
)
_LAYER = re.compile(r"(?:^|(?<=\.))layers\.(\d+)(?=\.|$)")


def watched_modules(modules: Iterable[tuple[str, "nn.Module"]]) -> Iterable[tuple[str, "nn.Module", "At"]]:
    """Yields a GPT's modules with Megatron's names: every layer's output, the residual stream after each block, the
    readout, and the attention logits.
    """
    for name, module in modules:
        if name.endswith(LOGITS):
            yield name, module, "input"
        elif name.endswith(_OUTPUTS) or name.rpartition(".")[0] == "decoder.layers":
            yield name, module, "output"


def layer_of(name: str) -> int | None:
    """The layer that a parameter or module is in."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def in_layer(name: str, layer: int | str) -> str:
    """The name of the same in another layer, or in several, as `layers.0-3`; as it is for what is in none."""
    return _LAYER.sub(f"layers.{layer}", name, count=1)
