"""Mamba-2's kernels in plain torch, under which Megatron-Core's own mixer is built and trains on the CPU.

Megatron takes three things from the package mamba_ssm, which needs a GPU: the state-space scan, the same with the
convolution before it, and a gated norm. Here they have the names and arguments that Megatron uses, and compute what
those say, exactly but for rounding. Everything else of a Mamba layer is Megatron's.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.errors import InputError

_MIXER = "megatron.core.ssm.mamba_mixer"


def provide_kernels() -> None:
    """Imports Megatron-Core's mixer as if mamba_ssm were installed, with the functions of this module as its kernels.

    The pretended package is gone afterwards, so nobody else finds it. A real one is left alone.
    """
    if importlib.util.find_spec("mamba_ssm") is not None:
        return
    assert _MIXER not in sys.modules, "Megatron's mixer binds its kernels while it is imported"
    pretended = {name: _module(name, **content) for name, content in _PACKAGE.items()}
    sys.modules.update(pretended)
    try:
        importlib.import_module(_MIXER)
    finally:
        for name in pretended:
            del sys.modules[name]


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(content)
    return module


class GatedNorm(nn.Module):
    """RMSNorm over groups of channels; a gate, where one is given, multiplies before it."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Returns the normalised x."""
        exact = _exact(x.dtype)
        gated = x.to(exact) if z is None else x.to(exact) * functional.silu(z.to(exact))
        groups = gated.unflatten(-1, (-1, self.group_size))
        normed = functional.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return (normed * self.weight.to(exact)).to(x.dtype)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **others: Any,
) -> Tensor:
    """Returns the output of the recurrence h ← exp(dt·A)·h + dt·B⊗x, y = C·h + D·x, gated by z: `mamba_ssm`'s scan.

    Within a chunk it is a product of matrices, and from one chunk to the next the state is carried.

    Args:
        x: [batch, length, heads, channels].
        dt: [batch, length, heads].
        A: [heads].
        B: [batch, length, groups, states]; heads in order share a group.
        C: as B.
        chunk_size: how many steps are one product; not what is computed.
        D: [heads] or [heads, channels].
        z: as x.
        dt_bias: [heads].
        dt_softplus: whether dt, with its bias, is made positive.
        others: for packed sequences and inference, which are refused.
    """
    _refuse(others)
    exact, heads, length = _exact(x.dtype), x.shape[2], x.shape[1]
    steps = dt.to(exact) if dt_bias is None else dt.to(exact) + dt_bias.to(exact)
    steps = functional.softplus(steps) if dt_softplus else steps
    chunk = min(chunk_size, length)
    missing = -length % chunk

    def chunked(value: Tensor) -> Tensor:
        """[batch, length, heads, …] → [batch, chunks, heads, chunk, …]; steps of no length fill the last one."""
        padded: Tensor = functional.pad(value, (0, 0) * (value.dim() - 2) + (0, missing))
        return torch.unflatten(padded, 1, (-1, chunk)).transpose(2, 3)

    share = heads // B.shape[2]
    keys, queries = (chunked(each.to(exact).repeat_interleave(share, dim=2)) for each in (B, C))
    inputs = chunked(x.to(exact) * steps[..., None])
    decay = chunked((steps * A.to(exact))[..., None]).squeeze(-1).cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, -math.inf).exp()
    y = (queries @ keys.transpose(-1, -2) * between) @ inputs
    left = (keys * (decay[..., -1:] - decay).exp()[..., None]).transpose(-1, -2) @ inputs
    state = torch.zeros_like(left[:, 0])
    states = []
    for index in range(left.shape[1]):
        states.append(state)
        state = decay[:, index, :, -1, None, None].exp() * state + left[:, index]
    y = y + (queries * decay.exp()[..., None]) @ torch.stack(states, dim=1)
    y = y.transpose(2, 3).flatten(1, 2)[:, :length]
    if D is not None:
        y = y + D.to(exact).reshape(heads, -1) * x.to(exact)
    if z is not None:
        y = y * functional.silu(z.to(exact))
    return y.to(x.dtype)


def convolved_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    **others: Any,
) -> Tensor:
    """Returns `scan` of what a causal convolution makes of x, B and C: `mamba_ssm`'s split_conv1d_scan.

    Args:
        zxbcdt: [batch, length, rows of z, x, B, C, dt].
        conv1d_weight: [rows of x, B, C, kernel].
        conv1d_bias: [rows of x, B, C].
        dt_bias: see `scan`.
        A: see `scan`.
        D: see `scan`.
        chunk_size: see `scan`.
        activation: after the convolution.
        headdim: channels of a head.
        ngroups: of B and C.
        norm_before_gate: for a norm within, which Megatron does not ask for.
        others: as of `scan`.
    """
    _refuse(others)
    assert activation == "silu"
    assert not norm_before_gate
    heads = dt_bias.shape[0]
    channels = headdim or D.shape[1]
    inner = heads * channels
    states = (zxbcdt.shape[-1] - 2 * inner - heads) // (2 * ngroups)
    z, mixed, dt = zxbcdt.split([inner, inner + 2 * ngroups * states, heads], dim=-1)
    kernel = conv1d_weight.shape[-1]
    padded = functional.pad(mixed.transpose(1, 2), (kernel - 1, 0))
    mixed = functional.conv1d(padded, conv1d_weight[:, None], conv1d_bias, groups=mixed.shape[-1]).transpose(1, 2)
    x, B, C = functional.silu(mixed).split([inner, ngroups * states, ngroups * states], dim=-1)
    y = scan(
        x.unflatten(-1, (heads, channels)),
        dt,
        A,
        B.unflatten(-1, (ngroups, states)),
        C.unflatten(-1, (ngroups, states)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, channels)),
        dt_bias=dt_bias,
        dt_softplus=True,
    )
    return y.flatten(-2)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Returns a tensor in at least single precision, as the kernels compute."""
    return torch.promote_types(dtype, torch.float32)


def _refuse(others: Mapping[str, Any]) -> None:
    given = [name for name, value in others.items() if value is not None and value is not False]
    if given:
        raise InputError(
            f"Mamba on the CPU: {', '.join(given)} is for packed sequences or inference, which only the kernels of "
            "mamba_ssm do. Train without, or on a GPU."
        )


_KERNELS = {"mamba_chunk_scan_combined": scan, "mamba_split_conv1d_scan_combined": convolved_scan}
_PACKAGE: Mapping[str, Mapping[str, Any]] = {
    "mamba_ssm": {},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GatedNorm},
    "mamba_ssm.ops.triton.ssd_combined": _KERNELS,
}
"""What Megatron imports."""
