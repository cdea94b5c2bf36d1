"""An encoder with the heads of BERT in plain torch."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.architectures.bert import SENTENCES, STACK, BertFile
from mup_megatron.architectures.plain.attention import View
from mup_megatron.architectures.plain.common import cross_entropy, linear, norm
from mup_megatron.architectures.plain.model import PlainModel
from mup_megatron.architectures.plain.parts import Embedding, PlainStack, readout, scale_of


class PlainBert(PlainModel):
    """Every token sees all others; the readout tells those that were replaced, the first token the order of the halves.

    Args:
        model: the shape.
        output_multiplier: on the input of the readout.
        softmax_scale: on q·k; what the model uses by itself by default.
    """

    def __init__(
        self,
        model: BertFile,
        *,
        output_multiplier: float = 1.0,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(model, SENTENCES if model.bert_binary_head else 0)
        self.encoder = PlainStack(model, STACK, scale_of(model, softmax_scale))
        self.lm_head = Head(model)
        self.output_layer = readout(model, self.embedding, output_multiplier, bias=True)
        if model.bert_binary_head:
            self.binary_head = linear(model.hidden_size, SENTENCES, bias=True)
            self.pooler = Pooler(model)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the mean loss of the tokens that were replaced, with that of the order of the halves."""
        stream = self.encoder(self.embedding(batch["tokens"], batch.get("types")), View(causal=False))
        pooled = self.pooler(stream) if hasattr(self, "pooler") else None
        found = cross_entropy(self.output_layer(self.lm_head(stream)), batch["labels"], batch["loss_mask"])
        if pooled is None:
            return found
        return found + functional.cross_entropy(self.binary_head(pooled), batch["swapped"])


class Head(nn.Module):
    """The layer before the readout."""

    def __init__(self, model: BertFile) -> None:
        super().__init__()
        self.dense = linear(model.hidden_size, model.hidden_size, bias=True)
        self.layer_norm = norm(model, model.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer_norm(functional.gelu(self.dense(x)))
        return found


class Pooler(nn.Module):
    """The first token, which stands for a whole sequence."""

    def __init__(self, model: BertFile) -> None:
        super().__init__()
        self.dense = linear(model.hidden_size, model.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.dense(x[:, 0]).tanh()
        return found
