"""A language model of one stack, whose readout gives each token's successor."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from mup_megatron.architectures.architecture import Architecture, Layers, layer_measured
from mup_megatron.architectures.families import MTP, Block, Family
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

    def further_layers(self, model: ModelFile) -> Mapping[str, Sequence[Family]]:
        """Returns what is within each layer of multi-token prediction, in order: name there → families.

        Asked of models that have some; by default there is one, of the families of the stack's last.
        """
        return {MTP_INNER: self.layers(model)[-1]}

    def _further(self, model: ModelFile) -> Iterator[tuple[str, Block]]:
        """Yields the layers of multi-token prediction, each followed by the families within."""
        for index in range(model.mtp_num_layers or 0):
            yield mtp_layer(index), MTP
            for name, families in self.further_layers(model).items():
                for family in families:
                    yield f"{mtp_layer(index)}.{name}", family

    def _heads_measured(self, model: ModelFile, final: str) -> Iterator[Measured]:
        """The layers of multi-token prediction, of which the first reads what the stack gives; then the readout."""
        stream = final
        for index in range(model.mtp_num_layers or 0):
            layer = mtp_layer(index)
            own = [each.among({STREAM: [stream]}) for each in MTP.measured(model, layer)]
            yield from own
            stream = own[-1].module
            for name, families in self.further_layers(model).items():
                inner = f"{layer}.{name}"
                yield from layer_measured(model, inner, families, {STREAM: [stream], BIAS: (), CONTEXT: ()})
                stream = inner
            normed = f"{layer}.final_layernorm"
            yield inside(normed, "Residual stream", stream)
            stream = normed
        yield from super()._heads_measured(model, final)
