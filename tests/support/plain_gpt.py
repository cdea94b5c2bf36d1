"""The package's plain GPT, with a readout of microsoft/mup's where that is compared."""

from typing import Any

import mup
from torch import nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import cross_entropy
from mup_megatron.architectures.plain.decoder import PlainDecoder as _PlainDecoder
from mup_megatron.architectures.plain.model import draw_weights

__all__ = ["PlainGPT", "cross_entropy", "draw_weights"]


class PlainGPT(_PlainDecoder):
    """`mup_readout` makes the readout `mup.MuReadout` (`mup.MuSharedReadout` if tied) with `output_mult` as given. It
    multiplies by 1/width once `mup.set_base_shapes` has told it the width.
    """

    def __init__(
        self, model: ModelFile, *, mup_readout: bool = False, output_multiplier: float = 1.0, **more: Any
    ) -> None:
        def readout(table: nn.Parameter) -> nn.Module:
            if model.tied:
                return mup.MuSharedReadout(table, bias=False, output_mult=output_multiplier)
            size = (model.hidden_size, model.padded_vocab_size())
            return mup.MuReadout(*size, bias=False, output_mult=output_multiplier)

        make = readout if mup_readout else None
        super().__init__(model, output_multiplier=output_multiplier, make_readout=make, **more)
