"""Norms and linear layers of the plain models."""

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
