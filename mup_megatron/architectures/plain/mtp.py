"""Multi-token prediction in plain torch."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import linear, norm


class PlainMtpLayer(nn.Module):
    """Joins the stream at a token with the embedding of the next one, and passes both through layers.

    Args:
        model: the shape.
        layers: of the model's own kinds, by their names within this one.
    """

    def __init__(self, model: ModelFile, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.enorm, self.hnorm = norm(model, model.hidden_size), norm(model, model.hidden_size)
        self.eh_proj = linear(2 * model.hidden_size, model.hidden_size, bias=False)
        self.final_layernorm = norm(model, model.hidden_size)
        self.inner = tuple(layers)
        for name, layer in layers.items():
            parent: nn.Module = self
            *outer, own = name.split(".")
            for part in outer:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(own, layer)

    def forward(self, stream: Tensor, embedded: Tensor) -> Tensor:
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(stream)], dim=-1))
        for name in self.inner:
            x = self.get_submodule(name)(x)
        return self.final_layernorm(x)


class PlainMtp(nn.Module):
    """The layers, one after the other."""

    def __init__(self, layers: list[PlainMtpLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def shifted(tokens: Tensor, by: int) -> Tensor:
    """Tokens or labels [batch, sequence] so many places earlier, with 0 behind the last."""
    return torch.cat([tokens[:, by:], torch.zeros_like(tokens[:, :by])], dim=1)
