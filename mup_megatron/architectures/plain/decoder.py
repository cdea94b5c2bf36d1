"""A whole language model of one stack in plain torch."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mup_megatron.architectures.decoder import STACK, Decoder
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import cross_entropy, with_loss
from mup_megatron.architectures.plain.model import PlainModel
from mup_megatron.architectures.plain.mtp import PlainMtp, PlainMtpLayer, shifted
from mup_megatron.architectures.plain.parts import Embedding, Layer, PlainStack, readout, scale_of
from mup_megatron.architectures.registry import architecture_of


class PlainDecoder(PlainModel):
    """Tokens [batch, sequence] → logits [batch, sequence, padded vocabulary].

    Gains start at 1 (or at their distance from it, 0), biases at 0; matrices hold torch's defaults until drawn.

    Args:
        model: the shape. Norms are separate modules whatever its `transformer_impl`.
        embedding_multiplier: on token + position embedding.
        output_multiplier: on the readout's input.
        softmax_scale: on q·k; what the model uses by itself by default.
        make_readout: builds another readout, from the token embedding's weight; for comparisons with other packages.
        dtype: of all parameters.
    """

    def __init__(
        self,
        model: ModelFile,
        *,
        embedding_multiplier: float = 1.0,
        output_multiplier: float = 1.0,
        softmax_scale: float | None = None,
        make_readout: Callable[[nn.Parameter], nn.Module] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.embedding_multiplier = embedding_multiplier
        self.embedding = Embedding(model)
        scale = scale_of(model, softmax_scale)
        self.decoder = PlainStack(model, STACK, scale)
        self.mtp_weight = model.mtp_loss_scaling_factor
        if model.mtp_num_layers is not None:
            own = architecture_of(model)
            assert isinstance(own, Decoder)
            within = own.further_layers(model).items()
            self.mtp = PlainMtp(
                [
                    PlainMtpLayer(model, {name: Layer(model, families, scale) for name, families in within})
                    for _ in range(model.mtp_num_layers)
                ]
            )
        if make_readout is None:
            self.output_layer = readout(model, self.embedding, output_multiplier)
        else:
            self.output_layer = make_readout(self.embedding.word_embeddings.get_parameter("weight"))
        self.to(dtype)
        if model.tied:
            assert self.output_layer.weight is self.embedding.word_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output_layer(self.decoder(self._embedded(tokens)))

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the mean loss of the next token, at which what multi-token prediction adds is minimised too."""
        tokens, labels = batch["tokens"], batch["labels"]
        stream = self.decoder(self._embedded(tokens))
        if not hasattr(self, "mtp"):
            return cross_entropy(self.output_layer(stream), labels)
        further = self._further_loss(stream, tokens, labels)
        return with_loss(cross_entropy(self.output_layer(stream), labels), further)

    def _further_loss(self, stream: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        streams = []
        for by, layer in enumerate(self.mtp.layers, start=1):
            stream = layer(stream, self._embedded(shifted(tokens, by)))
            streams.append(stream)
        # The last labels have nothing behind them that could be predicted.
        losses = [
            cross_entropy(self.output_layer(stream)[:, :-by], labels[:, by:])
            for by, stream in enumerate(streams, start=1)
        ]
        return self.mtp_weight * torch.stack(losses).mean()

    def _embedded(self, tokens: Tensor) -> Tensor:
        return self.embedding_multiplier * self.embedding(tokens)
