"""Multi-token prediction in plain torch."""

import torch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import linear, norm


class PlainMtpLayer(nn.Module):
    """Joins the stream at a token with the embedding of the next one, and passes both through a layer.

    Args:
        model: the shape.
        layer: of the model's own kind.
    """

    def __init__(self, model: ModelFile, layer: nn.Module) -> None:
        super().__init__()
        self.enorm, self.hnorm = norm(model, model.hidden_size), norm(model, model.hidden_size)
        self.eh_proj = linear(2 * model.hidden_size, model.hidden_size, bias=False)
        self.final_layernorm = norm(model, model.hidden_size)
        self.transformer_layer = layer

    def forward(self, stream: Tensor, embedded: Tensor) -> Tensor:
        joined = torch.cat([self.enorm(embedded), self.hnorm(stream)], dim=-1)
        return self.final_layernorm(self.transformer_layer(self.eh_proj(joined)))


class PlainMtp(nn.Module):
    """The layers, one after the other."""

    def __init__(self, layers: list[PlainMtpLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def shifted(tokens: Tensor, by: int) -> Tensor:
    """Tokens or labels [batch, sequence] so many places earlier, with 0 behind the last."""
    return torch.cat([tokens[:, by:], torch.zeros_like(tokens[:, :by])], dim=1)
