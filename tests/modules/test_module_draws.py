"""The std that is read off the meta device, against the std of a large draw made for real.

Every initialiser of `torch.nn.init` is either understood or called unknown; none is understood wrongly.
"""

import inspect
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from mup_megatron.errors import InputError
from mup_megatron.modules import module_base
from mup_megatron.modules.draws import Draw, Watch, build_on_meta, truncated_std
from mup_megatron.modules.shapes import MetaModule

ROWS, COLUMNS = 300, 400
Init = Callable[[torch.Tensor], object]


class Table(nn.Module):
    """One weight, drawn by `init`."""

    def __init__(self, init: Init, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        init(self.weight)


def recorded(init: Init, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> Draw:
    return draws_of(lambda: Table(init, shape))["weight"]


def draws_of(make: Callable[[], nn.Module]) -> Mapping[str, Draw]:
    return MetaModule.of(make).draws


def drawn(init: Init, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> torch.Tensor:
    torch.manual_seed(0)
    return Table(init, shape).weight.detach().double()


RANDOM: dict[str, Init] = {
    "normal": nn.init.normal_,
    "normal, std": lambda w: nn.init.normal_(w, std=0.02),
    "normal, by keyword": lambda w: nn.init.normal_(w, mean=0.0, std=0.3),
    "the tensor's own normal": lambda w: w.data.normal_(0.0, 0.3),
    "uniform": lambda w: nn.init.uniform_(w, -0.3, 0.3),
    "uniform, by keyword": lambda w: nn.init.uniform_(w, a=-2.0, b=2.0),
    "trunc_normal": nn.init.trunc_normal_,
    "trunc_normal, far bounds": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "trunc_normal, tight": lambda w: nn.init.trunc_normal_(w, std=0.02, a=-0.02, b=0.02),
    "trunc_normal, tighter": lambda w: nn.init.trunc_normal_(w, std=1.0, a=-0.05, b=0.05),
    "trunc_normal, all but uniform": lambda w: nn.init.trunc_normal_(w, std=1000.0, a=-1e-5, b=1e-5),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": lambda w: nn.init.xavier_normal_(w, gain=2.0),
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_normal, fan_out": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "scaled after the draw": lambda w: nn.init.normal_(w).data.mul_(0.02),
    "divided after the draw": lambda w: nn.init.normal_(w).data.div_(-50.0),
    "cut off far out": lambda w: nn.init.normal_(w, std=0.1).data.clamp_(-9.0, 9.0),
    "drawn twice": lambda w: nn.init.normal_(nn.init.uniform_(w, -1.0, 1.0), std=0.02),
    "copied": lambda w: w.data.copy_(torch.randn(w.shape) * 0.02),
    "copied from torch.normal": lambda w: w.data.copy_(torch.normal(0.0, 0.04, w.shape)),
    "a view of all of it": lambda w: nn.init.normal_(w.data.view(-1), std=0.03),
    "another table": lambda w: setattr(w, "data", nn.Embedding(ROWS, COLUMNS).weight.data * 0.5),
    "one row for padding": lambda w: nn.init.normal_(w, std=0.02).data[3].zero_(),
    "one row for padding, filled": lambda w: nn.init.normal_(w, std=0.02).data[3].fill_(0),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_recorded_std_is_that_of_a_real_draw(name: str) -> None:
    found = recorded(RANDOM[name])
    weight = drawn(RANDOM[name])
    assert found.value is None
    # Four standard errors of a normal's std in 120,000 draws, and the one row in 300 that is 0.
    assert found.std == pytest.approx(weight.std().item(), rel=4 / (2 * weight.numel()) ** 0.5 + 2e-3)
    assert weight.mean().abs() < 5 * weight.std() / weight.numel() ** 0.5


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (48, 24, 5), (8, 8, 3, 3, 3)])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_kernels_count_as_torch_counts_them(shape: tuple[int, ...], mode: str) -> None:
    def init(weight: torch.Tensor) -> object:
        return nn.init.kaiming_normal_(weight, mode=mode)

    assert recorded(init, shape).std == pytest.approx(drawn(init, shape).std().item(), rel=0.05)


CONSTANT: dict[str, tuple[Init, float]] = {
    "zeros": (nn.init.zeros_, 0.0),
    "ones": (nn.init.ones_, 1.0),
    "constant": (lambda w: nn.init.constant_(w, 0.25), 0.25),
    "fill": (lambda w: w.data.fill_(3), 3.0),
    "full": (lambda w: w.data.copy_(torch.full(w.shape, 7.0)), 7.0),
    "full_like": (lambda w: w.data.copy_(torch.full_like(w, 2.5)), 2.5),
    "zeros_like": (lambda w: w.data.copy_(torch.zeros_like(w)), 0.0),
    "a draw, then zero": (lambda w: nn.init.normal_(w).data.zero_(), 0.0),
    "shifted": (lambda w: nn.init.zeros_(w).data.add_(0.5), 0.5),
    "shifted down": (lambda w: nn.init.ones_(w).data.sub_(0.25), 0.75),
    "scaled": (lambda w: nn.init.ones_(w).data.mul_(1e-6), 1e-6),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_is_known_exactly(name: str) -> None:
    init, value = CONSTANT[name]
    assert recorded(init) == Draw(value=value)
    assert drawn(init).unique().tolist() == pytest.approx([value])


UNKNOWN: dict[str, Init] = {
    "nothing": lambda w: None,
    "orthogonal": nn.init.orthogonal_,
    "orthogonal, after a draw": lambda w: nn.init.orthogonal_(nn.init.normal_(w)),
    "sparse": lambda w: nn.init.sparse_(w, sparsity=0.1),
    "eye": nn.init.eye_,
    "eye, after a draw": lambda w: nn.init.eye_(nn.init.normal_(w)),
    "around another mean": lambda w: nn.init.normal_(w, mean=1.0, std=0.02),
    "uniform from 0": nn.init.uniform_,
    "torch.rand": lambda w: w.data.copy_(torch.rand(w.shape)),
    "trunc_normal, cut off on one side": lambda w: nn.init.trunc_normal_(w, a=0.0, b=2.0),
    "trunc_normal, another mean": lambda w: nn.init.trunc_normal_(w, mean=0.5),
    "shifted": lambda w: nn.init.normal_(w).data.add_(1.0),
    "exponential": lambda w: nn.init.normal_(w).data.exponential_(),
    "squared": lambda w: nn.init.normal_(w).data.pow_(2),
    "absolute": lambda w: nn.init.normal_(w).data.abs_(),
    "a sum of two": lambda w: nn.init.normal_(w).data.add_(torch.randn(w.shape)),
    "added several times": lambda w: nn.init.zeros_(w).data.add_(1.0, alpha=2),
    "all tensors at once": lambda w: torch._foreach_add_([nn.init.normal_(w).data], 1.0),
    "written into": lambda w: torch.arange(ROWS * COLUMNS, out=nn.init.normal_(w).data.view(-1)),
    "product of two": lambda w: nn.init.normal_(w).data.mul_(torch.randn(w.shape)),
    "from numbers": lambda w: w.data.copy_(torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS)),
    "a half of it drawn": lambda w: nn.init.normal_(w[: ROWS // 2]),
    "another half at another value": lambda w: nn.init.zeros_(w).data[: ROWS // 2].fill_(1.0),
    "some rows drawn otherwise": lambda w: nn.init.normal_(w, std=0.02).data[: ROWS // 2].normal_(0.0, 1.0),
    "clipped where it matters": lambda w: nn.init.normal_(w).data.clamp_(-0.5, 0.5),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_is_not_guessed(name: str) -> None:
    assert not recorded(UNKNOWN[name]).understood


def test_dirac_is_not_understood() -> None:
    assert not recorded(nn.init.dirac_, (8, 8, 3)).understood


def test_every_initialiser_of_torch_is_looked_at() -> None:
    known = {name for name, value in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}
    public = {name for name in known if inspect.isfunction(getattr(nn.init, name))}
    tested = " ".join([*RANDOM, *CONSTANT, *UNKNOWN, "dirac"])
    assert {name for name in public if name.removesuffix("_") not in tested} == set()


def test_what_a_parameter_is_made_of_counts() -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drawn = nn.Parameter(torch.randn(4, 5) * 0.02)
            self.zeros = nn.Parameter(torch.zeros(4))
            self.ones = nn.Parameter(torch.ones(4))
            self.number = nn.Parameter(torch.tensor(2.5))
            self.kept = nn.Parameter(torch.zeros(4, 5))
            nn.init.normal_(self.kept, std=0.3)
            self.wide = nn.Parameter(torch.randn(6).to(torch.float64) / 4)

    draws = draws_of(Made)
    assert draws == {
        "drawn": Draw(std=0.02),
        "zeros": Draw(value=0.0),
        "ones": Draw(value=1.0),
        "number": Draw(value=2.5),
        "kept": Draw(std=0.3),
        "wide": Draw(std=0.25),
    }


def test_a_copied_layer_has_the_draw_of_its_original() -> None:
    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    draws = draws_of(lambda: nn.TransformerEncoder(layer(), 3))
    live = nn.TransformerEncoder(layer(), 3)
    for name, parameter in live.named_parameters():
        constant = parameter.unique().numel() == 1
        assert draws[name].value == (parameter.unique().item() if constant else None), name
        assert (draws[name].std is None) is constant, name
    assert len(draws) == len(list(live.parameters()))


def test_torch_layers_as_they_come() -> None:
    factory: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(200, 300),
        "convolution": lambda: nn.Conv2d(20, 40, 5),
        "embedding": lambda: nn.Embedding(200, 300, padding_idx=0),
        "attention": lambda: nn.MultiheadAttention(128, 4),
        "norm": lambda: nn.LayerNorm(40),
        "batch norm": lambda: nn.BatchNorm2d(40),
    }
    for name, make in factory.items():
        torch.manual_seed(1)
        live = make()
        for key, draw in draws_of(make).items():
            parameter = live.get_parameter(key).detach()
            if draw.std is None:
                assert parameter.unique().tolist() == [draw.value], (name, key)
            else:
                error = 5 / (2 * parameter.numel()) ** 0.5
                assert draw.std == pytest.approx(parameter.square().mean().sqrt().item(), rel=error), (name, key)


@pytest.mark.parametrize("init", [nn.init.normal_, nn.init.uniform_])
def test_a_draw_on_a_real_device_is_carried_out(init: Init) -> None:
    """On the meta device, which holds no values, it is noted alone."""
    own, watched = torch.zeros(ROWS), torch.zeros(ROWS)
    torch.manual_seed(0)
    init(own)
    torch.manual_seed(0)
    with Watch() as watch:
        init(watched)
    assert torch.equal(own, watched)
    assert watch.knows(watched)


def test_nothing_is_allocated_and_torch_is_left_as_it_was() -> None:
    before = nn.init._no_grad_trunc_normal_
    module, watch = build_on_meta(lambda: nn.Linear(10**6, 10**6))
    assert module.weight.is_meta
    assert watch.draw_of(module.weight).std == pytest.approx(1e-3 / 3**0.5)
    assert nn.init._no_grad_trunc_normal_ is before

    def fails() -> nn.Module:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        build_on_meta(fails)
    assert nn.init._no_grad_trunc_normal_ is before
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("bound", [1e-9, 1e-4, 0.01, 0.1, 0.5, 1.0, 2.0, 10.0])
def test_the_std_of_a_truncated_normal(bound: float) -> None:
    # Its variance by the midpoint rule.
    x = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * min(bound, 9.0)
    weight = torch.exp(-x * x / 2)
    assert truncated_std(bound) == pytest.approx(((x * x * weight).sum() / weight.sum()).sqrt().item(), rel=1e-6)


def test_an_unknown_draw_is_refused_by_name() -> None:
    def build(width: int) -> Callable[[], nn.Module]:
        def module() -> nn.Module:
            layers = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
            nn.init.orthogonal_(layers[0].weight)
            return layers

        return module

    with pytest.raises(InputError, match=r"^0\.weight: how it is drawn is not understood") as raised:
        module_base(build(8), build(16))
    assert "\n" not in str(raised.value)
