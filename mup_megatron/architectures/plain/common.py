"""Norms, linear layers and losses of the plain models."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.architectures.model_file import ModelFile


class ZeroCentered(nn.Module):
    """A norm whose gain is stored as its distance from 1."""

    def __init__(self, plain: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        assert plain.eps is not None
        self.size, self.eps = plain.normalized_shape, plain.eps
        self.weight = nn.Parameter(torch.zeros_like(plain.weight))
        self.bias = nn.Parameter(torch.zeros_like(plain.weight)) if isinstance(plain, nn.LayerNorm) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return functional.rms_norm(x, self.size, 1 + self.weight, self.eps)
        return functional.layer_norm(x, self.size, 1 + self.weight, self.bias, self.eps)


def norm(model: ModelFile, size: int) -> nn.Module:
    plain = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[model.normalization](size, eps=model.norm_epsilon)
    return ZeroCentered(plain) if model.apply_layernorm_1p else plain


def linear(fan_in: int, fan_out: int, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class _WithLoss(torch.autograd.Function):
    """Passes a tensor on, and makes a further loss a part of what is minimised."""

    @staticmethod
    def forward(context: Any, values: Tensor, loss: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


def with_loss(values: Tensor, loss: Tensor) -> Tensor:
    """Returns the values, at which a further loss is minimised that is not told."""
    found: Tensor = _WithLoss.apply(values, loss)  # type: ignore[no-untyped-call]
    return found


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean loss, of tokens with a mask of 1, in the logits' own precision. (Megatron's goes through single one.)"""
    if mask is None:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()
