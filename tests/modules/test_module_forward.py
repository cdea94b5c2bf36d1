"""The scale of attention and the factors that are read off a forward pass on the meta device."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.modules.forward import Forward, Softmax, watched_forward
from mup_megatron.modules.shapes import MetaModule

HEADS, SIZE = 2, 8
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Queries, keys and values of one input, and a readout."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, HEADS * SIZE)
        self.q, self.k, self.v = (nn.Linear(HEADS * SIZE, HEADS * SIZE) for _ in range(3))
        self.head = nn.Linear(HEADS * SIZE, 32)
        self.root = torch.sqrt(torch.tensor(float(SIZE)))
        self.attend = attend

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (f(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = self.attend(q, k, v) if self.attend is not by_buffer else by_buffer(q, k, v, self.root)
        result: Tensor = self.head(mixed.transpose(1, 2).flatten(2) * 0.25)
        return result


def by_buffer(q: Tensor, k: Tensor, v: Tensor, root: Tensor | None = None) -> Tensor:
    assert root is not None
    return (q @ k.mT / root).softmax(-1) @ v


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2],) * 2, -math.inf, device=q.device).triu(1)
    return ((q @ k.mT) / math.sqrt(SIZE) + mask).softmax(-1) @ v


def before_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * SIZE**-0.25) @ (k * SIZE**-0.25).mT).float().softmax(-1) @ v


def one_operation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    logits = torch.baddbmm(torch.zeros(1, device=q.device), flat[0], flat[1].mT, beta=1.0, alpha=SIZE**-0.5)
    return (logits.softmax(-1) @ flat[2]).unflatten(0, q.shape[:2])


def einstein(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * SIZE**-0.5).softmax(-1), v)


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angle = torch.arange(q.shape[2], device=q.device)[:, None] / torch.arange(1, SIZE + 1, device=q.device)
    q, k = (x * angle.cos() + x.roll(1, -1) * angle.sin() for x in (q, k))
    return eager(q, k, v)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT * SIZE**-0.5 / 50.0) * 50.0).softmax(-1) @ v


def written_into_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    whole = k.new_empty(k.shape)
    whole[..., :4].copy_(k[..., :4])
    whole[..., 4:].copy_(k[..., 4:])
    return eager(torch.cat((q[..., 4:], q[..., :4]), -1), whole, v)


STOCK = SIZE**-0.5
ATTENTIONS: dict[str, tuple[Attend, float]] = {
    "fused": (functional.scaled_dot_product_attention, STOCK),
    "fused and told": (lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, scale=0.3), 0.3),
    "eager": (eager, STOCK),
    "before the product": (before_the_product, STOCK),
    "one operation": (one_operation, STOCK),
    "einsum": (einstein, STOCK),
    "rotary": (rotated, STOCK),
    "soft cap": (capped, STOCK),
    "in parts": (written_into_parts, STOCK),
    "a constant tensor": (by_buffer, STOCK),
    "no scale": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, 1.0),
}


def passed(attend: Attend) -> Forward:
    built = MetaModule.of(lambda: Attention(attend))
    model = built.module
    assert isinstance(model, Attention)
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    return watched_forward(model, lambda: model(ids), built.watch, model.head.weight)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_scale_is_that_of_the_logits(kind: str) -> None:
    attend, scale = ATTENTIONS[kind]
    (softmax,) = passed(attend).softmaxes
    assert softmax == Softmax("", SIZE, pytest.approx(scale, rel=1e-6))


def test_a_scale_that_has_no_value_is_not_known() -> None:
    found = passed(lambda q, k, v: (q @ k.mT * torch.rand((), device="meta")).softmax(-1) @ v)
    assert [softmax.scale for softmax in found.softmaxes] == [None]


def test_factors_that_are_no_scale_of_attention_are_told_apart() -> None:
    found = passed(lambda q, k, v: eager(q, k, v) * 3.0 + 1.0)
    assert [(factor.operation, factor.number) for factor in found.factors] == [("add", 1.0)]
    assert found.readout_scale == 0.75
    found = passed(lambda q, k, v: torch.sigmoid(eager(q, k, v) * 3.0))
    assert [(factor.operation, factor.number) for factor in found.factors] == [("mul", 3.0)]
    assert found.readout_scale == 0.25


def test_a_softmax_of_a_layers_output_is_no_attention() -> None:
    found = passed(lambda q, k, v: q.softmax(-1) * v)
    assert found.softmaxes == ()


def test_the_scale_is_told_by_the_module_that_it_is_in() -> None:
    built = MetaModule.of(lambda: nn.Sequential(Attention(eager)))
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    found = watched_forward(built.module, lambda: built.module(ids), built.watch)
    assert [softmax.where for softmax in found.softmaxes] == ["0"]
    assert not built.module[0]._forward_hooks  # type: ignore[union-attr,index,operator]
