"""Small torch modules as users write them: a language model of exchangeable parts, a classifier, a conv net, towers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.check.measure import batches

VOCABULARY, LENGTH, BATCH, HEAD = 64, 16, 4, 16
FEATURES, CLASSES, SIDE = 12, 8, 8
BASE = 32
WIDTHS = (32, 64, 128)

Part = Callable[..., nn.Module]


class RmsNorm(nn.Module):
    """Divides by the root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class SelfAttention(nn.Module):
    """Causal, of heads whose number grows; a plan can set its scale."""

    def __init__(self, width: int, *, head: int = HEAD, bias: bool = True, rotary: bool = False) -> None:
        super().__init__()
        self.head_dim, self.scaling = head, head**-0.5
        self.rotary = rotary
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = _rotated(q), _rotated(k)
        result: Tensor = self.out(self.attended(q, k, v).transpose(1, 2).flatten(2))
        return result

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each head sees: [batch, heads, positions, head size]."""
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling)


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]), 100.0 ** -(torch.arange(half) / half))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Mlp(nn.Module):
    """Two layers with a nonlinearity between."""

    def __init__(
        self, width: int, *, bias: bool = True, ffn: int | None = None, linear: Any = nn.Linear, act: Any = None
    ) -> None:
        super().__init__()
        self.up, self.down = linear(width, ffn or 2 * width, bias=bias), linear(ffn or 2 * width, width, bias=bias)
        self.act = act or functional.gelu

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.act(self.up(x)))
        return result


class GatedMlp(nn.Module):
    """Of which one half gates the other."""

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width, bias=bias), nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.gated(self.gate(x)) * self.up(x))
        return result

    def gated(self, x: Tensor) -> Tensor:
        """What the gate lets through."""
        return functional.silu(x)


class Block(nn.Module):
    """Attention and MLP beside a residual stream; with the norm before each, after the sum, or both side by side."""

    def __init__(self, width: int, *, norm: Part, attention: Part, mlp: Part, place: str) -> None:
        super().__init__()
        self.place = place
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention, self.mlp = attention(width), mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.place == "post":
            x = self.norm1(x + self.attention(x))
            result: Tensor = self.norm2(x + self.mlp(x))
            return result
        if self.place == "parallel":
            return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Lm(nn.Module):
    """Predicts the next token."""

    def __init__(
        self,
        width: int,
        *,
        layers: int = 2,
        norm: Part = nn.LayerNorm,
        final: Part | None = None,
        attention: Part = SelfAttention,
        mlp: Part = Mlp,
        place: str = "pre",
        tied: bool = False,
        positions: bool = True,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width) if positions else None
        self.blocks = nn.ModuleList(
            Block(width, norm=norm, attention=attention, mlp=mlp, place=place) for _ in range(layers)
        )
        self.norm = (final or norm)(width)
        self.readout = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            nn.init.normal_(self.tokens.weight, std=0.2)
            self.readout.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedded(tokens)
        for block in self.blocks:
            x = block(x)
        return self.predicted(self.norm(x))

    def embedded(self, tokens: Tensor) -> Tensor:
        """Where the residual stream begins."""
        x: Tensor = self.tokens(tokens)
        return x if self.positions is None else x + self.positions(torch.arange(tokens.shape[1], device=x.device))

    def predicted(self, x: Tensor) -> Tensor:
        """Logits."""
        result: Tensor = self.readout(x)
        return result


def texts(step: int, _width: int) -> Tensor:
    """Sequences of tokens."""
    return batches.tokens(VOCABULARY, LENGTH, BATCH, seed=0, step=step)


def text_loss(model: Any, tokens: Tensor) -> Tensor:
    """Of the next tokens."""
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Classifier(nn.Module):
    """A deep MLP without residuals."""

    def __init__(self, width: int, *, hidden: int = 2, act: Any = torch.relu, ffn: int | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(hidden))
        self.last = nn.Linear(width, CLASSES)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        for layer in self.layers:
            x = self.act(layer(x))
        result: Tensor = self.last(x)
        return result


def points(step: int, _width: int) -> tuple[Tensor, Tensor]:
    """Points around the centre of their class."""
    generator = torch.Generator().manual_seed(step + 1)
    labels = torch.randint(CLASSES, (32,), generator=generator)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 0.3 * torch.randn(32, FEATURES, generator=generator), labels


def label_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of the labels."""
    return functional.cross_entropy(model(batch[0]), batch[1])


class ConvNet(nn.Module):
    """Two stages of residual convolutions, whose channels grow."""

    def __init__(self, width: int, *, norm: Part = lambda channels: nn.GroupNorm(4, channels)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(width, norm=norm) for _ in range(2))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return result


class ConvBlock(nn.Module):
    """Norm, nonlinearity, convolution."""

    def __init__(self, width: int, *, norm: Part) -> None:
        super().__init__()
        self.norm = norm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.conv(torch.relu(self.norm(x)))
        return result


def pictures(step: int, _width: int) -> tuple[Tensor, Tensor]:
    """Noise in the colour of its class."""
    generator = torch.Generator().manual_seed(step + 1)
    labels = torch.randint(CLASSES, (16,), generator=generator)
    colours = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(16, 3, SIDE, SIDE, generator=generator)
    return noise + colours[labels][:, :, None, None], labels


class Towers(nn.Module):
    """Two towers; a pair's score is the mean of their vectors' product over channels, in terms of the base's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.users, self.items = (nn.Embedding(VOCABULARY, width) for _ in range(2))
        self.user_layer, self.item_layer = (nn.Linear(width, width) for _ in range(2))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        u = self.user_layer(self.users(users).relu())
        v = self.item_layer(self.items(items).relu())
        return self.scored(u, v)

    def scored(self, u: Tensor, v: Tensor) -> Tensor:
        """Of each user and each item."""
        return u @ v.T * (BASE**0.5 / u.shape[-1])


def pairs(step: int, _width: int) -> tuple[Tensor, Tensor]:
    """Users and what they took."""
    generator = torch.Generator().manual_seed(step + 1)
    users = torch.randperm(VOCABULARY, generator=generator)[:32]
    return users, (users + 5) % VOCABULARY


def pair_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What each user took, among what all of them took."""
    return functional.cross_entropy(model(*batch), torch.arange(len(batch[0])))
