"""An encoder, and a decoder that attends to it, in plain torch."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.attention import View
from mup_megatron.architectures.plain.common import cross_entropy
from mup_megatron.architectures.plain.model import PlainModel
from mup_megatron.architectures.plain.parts import Embedding, PlainStack, readout, scale_of
from mup_megatron.architectures.t5 import DECODER, ENCODER, T5File


class PlainT5(PlainModel):
    """The encoder sees all of a damaged text; the decoder gives each token of the text its successor.

    Args:
        model: the shape.
        output_multiplier: on the input of the readout.
        softmax_scale: on q·k; what the model uses by itself by default.
    """

    def __init__(
        self,
        model: T5File,
        *,
        output_multiplier: float = 1.0,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        scale = scale_of(model, softmax_scale)
        self.embedding = Embedding(model)
        if model.position_embedding_type == "relative":
            self.encoder_relative_pos_emb = RelativePositions(model, both_ways=True)
            self.decoder_relative_pos_emb = RelativePositions(model, both_ways=False)
        self.encoder = PlainStack(model, ENCODER, scale)
        self.decoder = PlainStack(model, DECODER, scale)
        self.lm_head = LmHead(model, self.embedding, output_multiplier)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the mean loss of the decoder's next token."""
        read, written = batch["damaged"], batch["tokens"]
        context = self.encoder(self.embedding(read), View(causal=False, bias=self._bias(ENCODER, read)))
        view = View(bias=self._bias(DECODER, written), context=context)
        return cross_entropy(
            self.lm_head(self.decoder(self.embedding(written), view)), batch["labels"], batch["loss_mask"]
        )

    def _bias(self, stack: str, tokens: Tensor) -> Tensor | None:
        positions = getattr(self, f"{stack}_relative_pos_emb", None)
        return None if positions is None else positions(tokens.shape[1])


class LmHead(nn.Module):
    """The readout, which Megatron has one level further down."""

    def __init__(self, model: ModelFile, embedding: Embedding, multiplier: float) -> None:
        super().__init__()
        self.output_layer = readout(model, embedding, multiplier, bias=model.tied)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.output_layer(x)
        return found


class RelativePositions(nn.Module):
    """A number for each head and distance, in buckets: single distances first, then ranges that grow.

    Args:
        model: the shape.
        both_ways: whether half of the buckets are for tokens that come later; else they are all for earlier ones.
    """

    def __init__(self, model: T5File, *, both_ways: bool) -> None:
        super().__init__()
        self.both_ways, self.largest = both_ways, model.relative_attention_max_distance
        self.buckets = model.relative_attention_num_buckets
        self.relative_attention_bias = nn.Embedding(self.buckets, model.num_attention_heads)

    def forward(self, length: int) -> Tensor:
        """Returns what is added to logits, [head, query, key]."""
        positions = torch.arange(length)
        found: Tensor = self.relative_attention_bias(self.bucket(positions[None, :] - positions[:, None]))
        return found.permute(2, 0, 1)

    def bucket(self, ahead: Tensor) -> Tensor:
        """Returns the bucket of a key that is so many tokens ahead of its query."""
        buckets = self.buckets // 2 if self.both_ways else self.buckets
        distance = ahead.abs() if self.both_ways else (-ahead).clamp(min=0)
        single = buckets // 2
        # In single precision, as Megatron has it: a range begins where it rounds to.
        powers = (distance.float().clamp(min=1) / single).log() / math.log(self.largest / single)
        ranges = (single + (powers * (buckets - single)).long()).clamp(max=buckets - 1)
        found = torch.where(distance < single, distance, ranges)
        return found + buckets * (ahead > 0) if self.both_ways else found
