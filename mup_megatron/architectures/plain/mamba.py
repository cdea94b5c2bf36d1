"""Mamba-2 in plain torch, as the recurrence that defines it."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.architectures.keys.mamba import MambaSizes
from mup_megatron.architectures.plain.common import linear

_EPS = 1e-5
"""Of the gated norm, whatever the model's."""


class PlainMamba(nn.Module):
    """The state of a head is h ← exp(-exp(A_log)·dt)·h + dt·x⊗B, its output C·h + D·x, one token after the other.

    The rows of `in_proj` are gate z, input x, B and C of all groups, and a step dt for each head.
    """

    def __init__(self, hidden: int, sizes: MambaSizes, kernel: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.in_proj = linear(hidden, sizes.projected, bias=False)
        self.conv1d = nn.Conv1d(sizes.convolved, sizes.convolved, kernel, groups=sizes.convolved, padding=kernel - 1)
        # As the mixer draws them: rates between 1 and 16, steps between 0.001 and 0.1.
        self.A_log = nn.Parameter(torch.empty(sizes.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(sizes.heads))
        steps = torch.empty(sizes.heads).uniform_(-3, -1).mul(torch.tensor(10.0).log()).exp()
        self.dt_bias = nn.Parameter(steps.expm1().log())
        self.norm = GroupedNorm(sizes.inner, sizes.groups)
        self.out_proj = linear(sizes.inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sizes, length = self.sizes, x.shape[1]
        z, mixed, dt = self.in_proj(x).split([sizes.inner, sizes.convolved, sizes.heads], dim=-1)
        mixed = functional.silu(self.conv1d(mixed.transpose(1, 2))[..., :length].transpose(1, 2))
        u, b, c = mixed.split([sizes.inner, sizes.states, sizes.states], dim=-1)
        u = u.unflatten(-1, (sizes.heads, sizes.head_dim))
        b, c = (
            each.unflatten(-1, (sizes.groups, -1)).repeat_interleave(sizes.heads // sizes.groups, dim=2)
            for each in (b, c)
        )
        steps = functional.softplus(dt + self.dt_bias)
        kept = (-self.A_log.exp() * steps).exp()
        state = u.new_zeros(u.shape[0], sizes.heads, sizes.head_dim, sizes.state_dim)
        outputs = []
        for t in range(length):
            new = (steps[:, t, :, None] * u[:, t])[..., None] * b[:, t, :, None]
            state = kept[:, t, :, None, None] * state + new
            outputs.append((state @ c[:, t, :, :, None]).squeeze(-1) + self.D[:, None] * u[:, t])
        y = torch.stack(outputs, dim=1).flatten(-2)
        out: Tensor = self.out_proj(self.norm(y * functional.silu(z)))
        return out


class GroupedNorm(nn.Module):
    """RMSNorm over each group's channels."""

    def __init__(self, size: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.groups, -1))
        scale = grouped.square().mean(-1, keepdim=True).add(_EPS).rsqrt()
        return (grouped * scale).flatten(-2) * self.weight
