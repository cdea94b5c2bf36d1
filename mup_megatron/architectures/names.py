"""The names that Megatron-Core's language models share, and a rank's names as those of the whole model."""

import re
from collections.abc import Mapping, Sequence

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
READOUT_WEIGHT = "output_layer.weight"
MTP_INNER = "transformer_layer"
"""The layer within a GPT's layer of multi-token prediction, as checkpoints call it."""
MTP_STACK = "mtp_model_layer.layers"
"""The layers within a hybrid model's."""
_LAYER = re.compile(r"^(\w+)\.layers\.(\d+)\.(.+)$")
_MTP_INNER = re.compile(r"^(mtp\.layers\.\d+)\.mtp_model_layer\.(?!layers\.)")
_EXPERT = re.compile(
    r"(?<=\.experts\.local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+$|"
    r"(?<=\.experts\.linear_fc[12]\.bias)\d+$"
)
"""The index of an expert, in the name of a module of its own or of its parameter in one of all experts."""


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Returns (stack, index of the layer, the rest) of a parameter's or module's name; None outside of all layers."""
    match = _LAYER.match(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def in_layer(stack: str, index: int, rest: str) -> str:
    """Returns the name of something in a layer; the inverse of `layer_of`."""
    return f"{stack}.layers.{index}.{rest}"


def mtp_layer(index: int) -> str:
    """Returns the name of a layer of multi-token prediction, by its index from 0."""
    return f"mtp.layers.{index}"


def is_of_mtp(name: str) -> bool:
    """Returns whether a parameter or module is of multi-token prediction."""
    return name.startswith("mtp.")


def global_name(
    local_name: str, layers: Mapping[str, Sequence[int]], *, tied: bool, experts: Sequence[int] | None = None
) -> str:
    """Returns the plan's name of a parameter that a rank calls `local_name`.

    Args:
        local_name: for example "decoder.layers.0.mlp.linear_fc1.weight".
        layers: for each stack, the global index, from 0, of each layer that the stage (or virtual stage) holds.
        tied: whether readout and embedding are one weight; the last stage then holds a copy under the readout's name.
        experts: the global index, from 0, of each expert of a layer that the rank holds; None where it holds all.
    """
    if experts is not None:
        local_name = _EXPERT.sub(lambda index: str(experts[int(index[0])]), local_name)
    if tied and local_name == READOUT_WEIGHT:
        return WORD_EMBEDDINGS
    parts = layer_of(local_name)
    if parts is None or parts[0] not in layers:
        return local_name
    stack, index, rest = parts
    # Since 0.17 a GPT's own layer there has another name in the live model than in its checkpoints.
    return _MTP_INNER.sub(rf"\1.{MTP_INNER}.", in_layer(stack, layers[stack][index], rest))
