"""The plan's names of what DeepSpeed's pipeline of Megatron-Core's layers has. It knows names alone.

The pipeline calls its layers by their place in `megatron_layers.pipeline_layers`: the embedding, each transformer
layer, the final norm, the readout. What two stages tie is `tied_modules.embedding` on both.
"""

import re

from mup_megatron.architectures.names import global_name, in_layer

_LAYER = re.compile(r"(\d+)\.layer\.(.+)")
_NORM = re.compile(r"\d+\.(final_layernorm\..+)")
_AT_THE_ENDS = re.compile(r"(?:\d+|tied_modules\.embedding)\.((?:embedding|output_layer)\..+)")


def plan_name(name: str, *, tied: bool) -> str:
    """Returns the plan's name of a parameter; that of a GPTModel under the engine has it by itself.

    Args:
        name: in the module that the engine trains.
        tied: whether readout and embedding are one weight.
    """
    if found := _LAYER.fullmatch(name):
        return in_layer("decoder", int(found[1]) - 1, found[2])
    if found := _NORM.fullmatch(name):
        return f"decoder.{found[1]}"
    at_the_ends = _AT_THE_ENDS.fullmatch(name)
    return global_name(at_the_ends[1] if at_the_ends else name, {}, tied=tied)


def layer_files(layers: int, *, tied: bool) -> range:
    """Returns the places of the pipeline's layers that have a file in a checkpoint; a tied readout has none.

    Args:
        layers: of the model.
        tied: whether readout and embedding are one weight.
    """
    return range(layers + (2 if tied else 3))
