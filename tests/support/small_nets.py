"""Small torch modules for checks, and what is wrong with some of them. Widths 32, 64 and 128 are enough for all."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mup_megatron.check.measure import batches
from mup_megatron.check.measure.measurements import Measurements, RunProtocol
from mup_megatron.check.module_family import ModuleFamily
from mup_megatron.modules import module_base
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Rule

VOCABULARY = 32
LENGTH = 8
BATCH = 8
WIDTHS = (32, 64, 128)
HEADS = 2


class Mixer(nn.Module):
    """Causal attention of two heads that grow with width, with 1/√(head size) in its code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        result: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, *, mixes: bool, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixer = Mixer(width) if mixes else None
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.mixer is not None:
            x = x + self.mixer(x)
        result: Tensor = x + self.dropout(self.down(self.up(self.norm(x)).relu()))
        return result


class Net(nn.Module):
    """Predicts the next token."""

    def __init__(self, width: int, *, mixes: bool = False, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, mixes=mixes, dropout=dropout) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.readout.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.readout(self.norm(x))
        return result


def recipe_for(*, optimizer: str = "adam", hyperparameters: dict[str, float] | None = None, **kind: Any) -> Recipe:
    """A recipe for a Net that was tuned at width 32."""
    base = module_base(lambda: Net(32, **kind), lambda: Net(64, **kind))
    return Recipe.model_validate(
        {
            "base": base,
            "hyperparameters": {"lr": 0.004, "adam_beta2": 0.95} | (hyperparameters or {}),
            "parametrization": {"optimizer": optimizer},
        }
    )


def batch(step: int, _width: int) -> Tensor:
    """Sequences of tokens."""
    return batches.tokens(VOCABULARY, LENGTH, BATCH, seed=0, step=step)


def loss(model: Any, tokens: Tensor) -> Tensor:
    """Of the next tokens."""
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


OPTIONS: dict[str, Any] = {"widths": WIDTHS, "batch": batch, "loss": loss}


_kept: dict[Any, Measurements] = {}


def keep_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets checks of the same model share their correct runs: a test's time is mostly theirs."""
    train = ModuleFamily._correct

    def kept(
        self: ModuleFamily,
        recipe: Recipe,
        protocol: RunProtocol,
        rule: Rule,
        widths: Sequence[int],
        seeds: Sequence[int],
        what: str,
    ) -> Measurements:
        key = (self.factory, self.schedule, recipe.fingerprint, protocol, rule, tuple(widths), tuple(seeds))
        if key not in _kept:
            _kept[key] = train(self, recipe, protocol, rule, widths, seeds, what)
        return _kept[key]

    monkeypatch.setattr(ModuleFamily, "_correct", kept)
