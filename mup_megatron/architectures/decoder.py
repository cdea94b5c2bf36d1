"""A language model of one stack, whose readout gives each token's successor."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from mup_megatron.architectures.architecture import Architecture, Layers, layer_measured
from mup_megatron.architectures.families import MTP, Block
from mup_megatron.architectures.measured import BIAS, CONTEXT, STREAM, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import MTP_INNER, mtp_layer

STACK = "decoder"


class Decoder(Architecture):
    """An architecture of one stack whose readout gives each token's successor."""

    plain: ClassVar[str] = "mup_megatron.architectures.plain.decoder:PlainDecoder"

    @abstractmethod
    def layers(self, model: ModelFile) -> Layers:
        """Returns the families of each layer, in order."""

    def stacks(self, model: ModelFile) -> Mapping[str, Layers]:
        """Returns the one stack."""
        return {STACK: self.layers(model)}

    def native_problem(self, model: ModelFile) -> str | None:
        """Returns what one of its families says of it."""
        return next(filter(None, (each.native_problem for each in self.families(model))), None)

    def _further(self, model: ModelFile) -> Iterator[tuple[str, Block]]:
        """Yields the layers of multi-token prediction, each of the families of the stack's last one."""
        for index in range(model.mtp_num_layers or 0):
            yield mtp_layer(index), MTP
            for family in self.layers(model)[-1]:
                yield f"{mtp_layer(index)}.{MTP_INNER}", family

    def _heads_measured(self, model: ModelFile, final: str) -> Iterator[Measured]:
        """The layers of multi-token prediction, of which the first reads what the stack gives; then the readout."""
        stream = final
        for index in range(model.mtp_num_layers or 0):
            layer = mtp_layer(index)
            own = [each.among({STREAM: [stream]}) for each in MTP.measured(model, layer)]
            yield from own
            inner, at = f"{layer}.{MTP_INNER}", {STREAM: [own[-1].module], BIAS: (), CONTEXT: ()}
            yield from layer_measured(model, inner, self.layers(model)[-1], at)
            stream = f"{layer}.final_layernorm"
            yield inside(stream, "Residual stream", inner)
        yield from super()._heads_measured(model, final)
