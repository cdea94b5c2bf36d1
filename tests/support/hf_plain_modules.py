"""Torch modules that come from no library, each with its width as one number: what `mup_megatron.modules` is for.

`readout` lets microsoft/mup put its own in the place of the last linear layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Readout = Callable[[int, int], nn.Module]
INPUTS, OUTPUTS = 6, 5


def mlp(width: int, readout: Readout = nn.Linear) -> nn.Module:
    """Two hidden layers, of which the second grows faster than the first."""
    first, second = 8 * width, round(8 * width**1.5)
    return nn.Sequential(
        nn.Linear(INPUTS, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), readout(second, OUTPUTS)
    )


class CNN(nn.Module):
    """Convolutions with biases and batch norms, then a linear readout."""

    def __init__(self, width: int, readout: Readout = nn.Linear) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4 * width, 3)
        self.norm = nn.BatchNorm2d(4 * width)
        self.conv2 = nn.Conv2d(4 * width, round(4 * width**1.5), 5)
        self.fc = nn.Linear(round(4 * width**1.5), 8 * width)
        self.head = readout(8 * width, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x)).relu()
        x = self.conv2(x).relu().mean((2, 3))
        logits: Tensor = self.head(self.fc(x).relu())
        return logits


class Transformer(nn.Module):
    """Torch's own layers, with heads of one size; a table of tokens and one of positions that is a bare parameter."""

    def __init__(self, width: int, readout: Readout = nn.Linear, *, heads: int = 0, depth: int = 2) -> None:
        super().__init__()
        size = 16 * width
        self.tokens = nn.Embedding(20, size)
        self.positions = nn.Parameter(torch.randn(7, size) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(size, heads or 2 * width, 3 * size, dropout=0.0, batch_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(size)
        self.head = readout(size, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


MODULES: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": CNN, "transformer": Transformer}


def inputs(kind: str, seed: int = 0) -> Tensor:
    """A batch of eight."""
    generator = torch.Generator().manual_seed(seed)
    match kind:
        case "mlp":
            return torch.randn(8, INPUTS, generator=generator)
        case "cnn":
            return torch.randn(8, 3, 12, 12, generator=generator)
        case _:
            return torch.randint(20, (8, 7), generator=generator)
