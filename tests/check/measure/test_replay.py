"""η, ε and λ read from the movement of a weight, against torch's own optimizers, which are told them."""

import pytest
import torch

from mup_megatron.check.measure.replay import SAMPLE, AdamReplay, Fitted, SGDReplay, sample

STEPS = 6


def adam(*, lr: float, eps: float, decay: float, size: int = 500, shards: int = 1, vector: bool = False) -> Fitted:
    """What the last of some steps of torch's AdamW betrays, put together from shards."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(size) if vector else 0.05 * torch.randn(size, generator=generator)
    parameter = torch.nn.Parameter(weight)
    optimizer = torch.optim.AdamW([parameter], lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=decay)
    replays = [AdamReplay(0.9, 0.95) for _ in range(shards)]
    for _ in range(STEPS):
        parameter.grad = 1e-3 * torch.randn(size, generator=generator)
        before = parameter.detach().clone()
        optimizer.step()
        parts = [x.chunk(shards) for x in (parameter.grad, before, parameter.detach() - before)]
        for replay, gradient, part, _ in zip(replays, *parts, strict=True):
            replay.observe(gradient, part)
    sums = sum(replay.sums(b, m) for replay, b, m in zip(replays, parts[1], parts[2], strict=True))
    return AdamReplay.fitted(sums)  # type: ignore[arg-type]


@pytest.mark.parametrize("lr", [1e-4, 3e-3])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("decay", [0.0, 0.1, 20.0])
def test_adams_values_are_read_back(lr: float, eps: float, decay: float) -> None:
    found = adam(lr=lr, eps=eps, decay=decay)
    assert found.lr == pytest.approx(lr, rel=1e-3)
    assert found.eps == pytest.approx(eps, rel=0.02)
    assert found.weight_decay == pytest.approx(decay, rel=1e-2, abs=1e-2)


def test_shards_add_up_to_the_whole() -> None:
    whole, split = adam(lr=1e-3, eps=1e-4, decay=1.0), adam(lr=1e-3, eps=1e-4, decay=1.0, shards=3)
    assert (split.lr, split.eps) == pytest.approx((whole.lr, whole.eps), rel=1e-6)


def test_a_vector_that_starts_at_zero() -> None:
    found = adam(lr=1e-3, eps=1e-4, decay=0.0, vector=True)
    assert found.lr == pytest.approx(1e-3, rel=1e-3)
    assert found.weight_decay == pytest.approx(0.0, abs=1e-2)


def _unexplained(optimizer: torch.optim.Optimizer, replay: AdamReplay | SGDReplay) -> float:
    """What the replay makes of another optimizer's last step."""
    generator = torch.Generator().manual_seed(0)
    [parameter] = optimizer.param_groups[0]["params"]
    for _ in range(STEPS):
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
        before = parameter.detach().clone()
        optimizer.step()
        replay.observe(parameter.grad, before)
    return type(replay).fitted(replay.sums(before, parameter.detach() - before)).unexplained


def _weight() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(0.05 * torch.randn(500, generator=torch.Generator().manual_seed(1)))]


ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 1.0}
OTHERS = {
    "beta1": lambda: torch.optim.AdamW(_weight(), **{**ADAM, "betas": (0.5, 0.95)}),
    "beta2": lambda: torch.optim.AdamW(_weight(), **{**ADAM, "betas": (0.9, 0.999)}),
    "coupled weight decay": lambda: torch.optim.Adam(_weight(), **ADAM),
    "no momentum": lambda: torch.optim.SGD(_weight(), lr=0.1),
    "signs": lambda: torch.optim.Rprop(_weight(), lr=1e-3),
}
OFF = 0.006
"""What a check calls off, at least."""


@pytest.mark.parametrize("other", OTHERS)
def test_the_steps_of_another_optimizer_are_not_explained(other: str) -> None:
    assert _unexplained(torch.optim.AdamW(_weight(), **ADAM), AdamReplay(0.9, 0.95)) < 1e-3
    assert _unexplained(OTHERS[other](), AdamReplay(0.9, 0.95)) > OFF


def test_momentum_alone_is_an_adam_whose_eps_is_huge() -> None:
    assert _unexplained(torch.optim.SGD(_weight(), lr=0.1, momentum=0.9), AdamReplay(0.9, 0.95)) < 1e-3


@pytest.mark.parametrize("eps", [1e-4, 0.1])
def test_the_last_digit_of_a_weight_is_not_another_optimizer(eps: float) -> None:
    """Gains of 1 that a small rate moves by little more than single precision can tell."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(500))], **{**ADAM, "lr": 1e-5, "eps": eps})
    assert _unexplained(optimizer, AdamReplay(0.9, 0.95)) < 0.01


def test_nor_are_those_of_another_momentum() -> None:
    assert _unexplained(torch.optim.SGD(_weight(), lr=0.1, momentum=0.9), SGDReplay(0.9)) < 1e-3
    assert _unexplained(torch.optim.SGD(_weight(), lr=0.1, momentum=0.5), SGDReplay(0.9)) > 0.1


def test_of_what_moves_a_weight_alike_nothing_is_said() -> None:
    """A gain of 1 whose one gradient has one sign: learning rate and weight decay pull at it alike."""
    parameter = torch.nn.Parameter(torch.ones(64))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), eps=0.0, weight_decay=0.0)
    replay = AdamReplay(0.9, 0.95)
    parameter.grad = torch.linspace(1e-3, 2e-3, 64)
    replay.observe(parameter.grad, parameter.detach().clone())
    before = parameter.detach().clone()
    optimizer.step()
    found = AdamReplay.fitted(replay.sums(before, parameter.detach() - before))
    assert (found.lr, found.weight_decay) == (None, None)


def test_a_weight_that_does_not_move_has_a_rate_of_zero() -> None:
    replay = AdamReplay(0.9, 0.95)
    replay.observe(torch.randn(10), torch.randn(10))
    assert AdamReplay.fitted(replay.sums(torch.randn(10), torch.zeros(10))) == Fitted(0.0, None, None, 0.0)


@pytest.mark.parametrize(("lr", "decay"), [(0.1, 0.0), (0.01, 0.5)])
def test_sgds_values_are_read_back(lr: float, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(300, generator=generator))
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=0.9, weight_decay=decay)
    replay = SGDReplay(0.9)
    for _ in range(STEPS):
        parameter.grad = torch.randn(300, generator=generator)
        before = parameter.detach().clone()
        optimizer.step()
        replay.observe(parameter.grad, before)
    found = SGDReplay.fitted(replay.sums(before, parameter.detach() - before))
    assert found.lr == pytest.approx(lr, rel=1e-4)
    assert found.weight_decay == pytest.approx(decay, abs=1e-3)


def test_large_tensors_are_sampled_and_small_ones_are_not() -> None:
    assert sample(torch.zeros(10)) == slice(None)
    indices = sample(torch.zeros(300, 200))
    assert isinstance(indices, torch.Tensor)
    assert len(indices) == SAMPLE
    assert torch.equal(indices, sample(torch.zeros(300, 200)))
