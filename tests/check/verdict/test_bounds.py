"""What holds of every right model: nothing is found in right ones, and what is wrong in a model's own code is named.

Nothing is trained but for a step: what is looked at is there before.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import small_nets
from support.small_nets import VOCABULARY, Net, recipe_for
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.check.measure import batches
from mup_megatron.check.measure.measurements import Key, MeasuredRun, Measurements, Quantity, RunProtocol
from mup_megatron.check.module_family import ModuleFamily
from mup_megatron.check.subjects.modules import Loss
from mup_megatron.check.subjects.scripts import Prepare, Task, bare_model, prepare_by_plan, warm_up_and_decay
from mup_megatron.check.subjects.sight import copying
from mup_megatron.check.verdict.bounds import Known, out_of_bounds
from mup_megatron.check.verdict.causes.bounds import of_bounds
from mup_megatron.check.verdict.comparison import Finding
from mup_megatron.modules import module_base
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

WIDTHS = (32, 64, 128)
STEP = RunProtocol(steps=1, recorded=(1,), spectral=False)
Factory = Callable[[int], nn.Module]


def found_in(
    factory: Factory,
    *,
    base: Factory | None = None,
    loss: Loss = small_nets.loss,
    batch: Any = small_nets.batch,
    prepare: Prepare = prepare_by_plan,
    readout: str | None = None,
) -> list[Finding]:
    """What is out of bounds in a model, at its widths and on two seeds."""
    own = base or factory
    recipe = Recipe.model_validate(
        {
            "base": module_base(lambda: own(32), lambda: own(64)),
            "hyperparameters": {"lr": 0.004, "adam_beta2": 0.95},
        }
    )
    family = ModuleFamily(
        factory=factory,
        recipe=recipe,
        widths=WIDTHS,
        batch=batch,
        loss=loss,
        schedule=warm_up_and_decay,
        readout=readout,
        report=None,
    )
    subject = family.subject(STEP, prepare, range(1, 4))
    plans = {width: family.plan(width, recipe) for width in WIDTHS}
    models = {width: bare_model(factory, width, seed=1) for width in WIDTHS}
    return out_of_bounds(subject, Measurements(()), family.known(models, plans))


def names(found: Sequence[Finding]) -> list[tuple[Quantity, str]]:
    return [(finding.key.quantity, finding.key.name) for finding in found]


# ---- right models --------------------------------------------------------------------------------------------------


class Turning(nn.Module):
    """A model whose attention knows positions by turning queries and keys, of heads of 16."""

    def __init__(self, width: int, *, base: float = 1e4, pace: float = 1.0, buffered: bool = True) -> None:
        super().__init__()
        self.embedding, self.readout = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.pace = pace
        turns = base ** (-torch.arange(0, 16, 2) / 16)
        self.register_buffer("turns", turns) if buffered else setattr(self, "turns", turns)

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[-2]) * self.pace, self.turns)
        one, other = x.chunk(2, dim=-1)
        return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = (f(x).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        result: Tensor = self.readout(x + self.o(mixed.transpose(1, 2).flatten(2)))
        return result


def long(step: int, _width: int) -> Tensor:
    return batches.tokens(VOCABULARY, 32, 8, seed=0, step=step)


class Pictures(nn.Module):
    """With a batch norm, whose statistics are not those of evaluation before it has trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3)
        self.norm, self.readout = nn.BatchNorm2d(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.readout(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))
        return result


class Stacked(nn.Module):
    """Blocks of one kind between an embedding and a readout."""

    def __init__(self, width: int, block: Factory) -> None:
        super().__init__()
        self.embedding, self.readout = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.blocks, self.norm = nn.ModuleList(block(width) for _ in range(2)), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.readout(self.norm(x))
        return result


class TokenMixer(nn.Module):
    """Layers in lists of their own, norms too: mixes positions, whose number is fixed, then channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.readout = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.over_tokens = nn.ModuleList(_mlp(small_nets.LENGTH, 16, small_nets.LENGTH) for _ in range(2))
        self.over_channels = nn.ModuleList(_mlp(width, 2 * width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index, (tokens_mixed, channels_mixed) in enumerate(zip(self.over_tokens, self.over_channels, strict=True)):
            x = x + tokens_mixed(self.norms[2 * index](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels_mixed(self.norms[2 * index + 1](x))
        result: Tensor = self.readout(x)
        return result


def _mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    first, inner, last = sizes
    return nn.Sequential(nn.Linear(first, inner, bias=bias), nn.GELU(), nn.Linear(inner, last, bias=bias))


class Gated(nn.Module):
    """With a gate that squeezes width to 8, and an adapter of rank 4 beside a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)
        self.gate = _mlp(width, 8, width)
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)
        self.other = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.layer(y).relu() * self.gate(y).sigmoid()
        y = self.norm(x)
        result: Tensor = x + self.other(y) + self.up(self.down(y))
        return result


class Adapter(nn.Module):
    """A block that is an adapter and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(width), _mlp(width, 4, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.inside(self.norm(x))
        return result


class Routed(nn.Module):
    """A dense mixture of four experts, whose router's softmax is no attention's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        shares = self.router(y).softmax(-1)
        result: Tensor = x + sum(shares[..., i : i + 1] * expert(y) for i, expert in enumerate(self.experts))
        return result


def pictures(step: int, _width: int) -> Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(step + 1))


def by_brightness(model: Any, x: Tensor) -> Tensor:
    return functional.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long())


def averaged(model: Any, tokens: Tensor) -> Tensor:
    return torch.stack([small_nets.loss(model, part) for part in tokens.chunk(4)]).mean()


def summed(model: Any, tokens: Tensor) -> Tensor:
    return torch.stack([small_nets.loss(model, part) for part in tokens.chunk(4)]).sum()


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        pytest.param(Net, {}, id="plain"),
        pytest.param(lambda w: Net(w, tied=True), {"readout": "embedding.weight"}, id="tied"),
        pytest.param(Turning, {"batch": long}, id="turning"),
        pytest.param(Pictures, {"batch": pictures, "loss": by_brightness}, id="batch norm"),
        pytest.param(Net, {"loss": averaged}, id="micro-batches averaged"),
        pytest.param(TokenMixer, {}, id="mixing tokens"),
        pytest.param(lambda w: Stacked(w, Gated), {}, id="gates and adapters of finite size"),
        pytest.param(lambda w: Stacked(w, Adapter), {}, id="adapters alone"),
        pytest.param(lambda w: Stacked(w, Routed), {}, id="a router"),
    ],
)
def test_nothing_is_out_of_bounds_in_a_right_model(factory: Factory, options: dict[str, Any]) -> None:
    assert [finding.sentence for finding in found_in(factory, **options)] == []


# ---- powers of width in a model's own code -------------------------------------------------------------------------


def hooked(path: str, factor: Callable[[float], float], *, evaluation: bool = False, **kind: Any) -> Factory:
    """A Net one of whose modules has its output multiplied, in evaluation alone or always."""

    def factory(width: int) -> nn.Module:
        net = Net(width, **kind)
        scale = factor(width / 32)

        def hook(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output if evaluation and module.training else output * scale

        net.get_submodule(path).register_forward_hook(hook)
        return net

    return factory


@pytest.mark.parametrize(
    ("path", "power", "first"),
    [
        ("embedding", 0.5, "embedding"),
        ("blocks.0.norm", 0.5, "blocks.0.norm"),
        ("blocks.0.up", -0.5, "blocks.0.up"),
        ("blocks.1.down", 0.25, "blocks.1.down"),
        ("blocks.1.down", -1.0, "blocks.1.down"),
        ("norm", -1.0, "norm"),
        ("", -1.0, "what the loss takes in"),
        ("", -0.5, "what the loss takes in"),
        ("", 1.0, "what the loss takes in"),
    ],
)
def test_the_first_activation_that_follows_width_is_named(path: str, power: float, first: str) -> None:
    found = found_in(hooked(path, lambda r: r**power))
    assert found
    assert found[0].key.name == first
    assert found[0].key.step == 0
    assert of_bounds(found)[0].name == "width-in-forward"


def test_a_scale_of_attention_that_follows_width_is_named() -> None:
    found = found_in(lambda width: Net(width, mixes=True))
    assert found[0].key.name.startswith("blocks.0.mixer.attention_logits")
    assert of_bounds(found)[0].name == "attention-follows-width"


class Scaled(Net):
    """Multiplies between modules, where no hook is."""

    def __init__(self, width: int, *, embedding: float = 0.0, skip: float = 0.0) -> None:
        super().__init__(width)
        self.factor, self.skip = (width / 32) ** embedding, (width / 32) ** skip

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.factor
        for block in self.blocks:
            x = x * self.skip + (block(x) - x)
        result: Tensor = self.readout(self.norm(x))
        return result


@pytest.mark.parametrize("places", [{"embedding": 0.5}, {"embedding": -0.5}, {"skip": -0.5}])
def test_a_factor_between_modules_is_seen_in_what_is_added_up(places: dict[str, float]) -> None:
    found = found_in(lambda width: Scaled(width, **places))
    assert any(quantity is Quantity.INSIDE and "summand" in name for quantity, name in names(found)), names(found)


# ---- numbers that are no weights -----------------------------------------------------------------------------------


def test_the_eps_of_a_norm_that_follows_width_is_named() -> None:
    def factory(width: int) -> nn.Module:
        net = Net(width)
        net.norm.eps *= width / 32
        return net

    assert names(found_in(factory)) == [(Quantity.CONSTANT, "norm.eps")]


def test_a_buffer_that_follows_width_is_named() -> None:
    found = found_in(lambda width: Turning(width, base=1e4 * width / 32))
    assert names(found)[0] == (Quantity.CONSTANT, "turns")
    assert of_bounds(found)[0].name == "constant-follows-width"


@pytest.mark.parametrize("how", [{"base": 1.0}, {"pace": -1.0}], ids=["base", "pace"])
def test_positions_that_follow_width_are_seen_in_queries(how: dict[str, float]) -> None:
    def factory(width: int) -> nn.Module:
        r = width / 32
        return Turning(width, base=1e4 * r ** how.get("base", 0.0), pace=r ** how.get("pace", 0.0), buffered=False)

    found = found_in(factory, batch=long)
    assert {quantity for quantity, _ in names(found)} == {Quantity.POSITION}
    assert of_bounds(found)[0].name == "positions"


def test_positions_are_held_against_a_reference_of_its_own_code() -> None:
    key = Key(Quantity.POSITION, "all queries, 4 apart", 0)

    def measured(value: float) -> Measurements:
        runs = [MeasuredRun(w, s, {key: value + 0.001 * s}, ()) for w in WIDTHS for s in range(3)]
        return Measurements(tuple(runs))

    known = Known(plans={32: plan_of(Net)})
    assert out_of_bounds(measured(0.6), measured(0.61), known) == []
    assert names(out_of_bounds(measured(0.6), measured(0.7), known)) == [(Quantity.POSITION, key.name)]


def test_positions_follow_width_where_heads_grow_as_in_the_reference() -> None:
    key = Key(Quantity.POSITION, "all queries, 16 apart", 0)

    def measured(apart: float) -> Measurements:
        runs = [MeasuredRun(w, s, {key: 0.1 * w**0.3 + apart + 0.001 * s}, ()) for w in WIDTHS for s in range(3)]
        return Measurements(tuple(runs))

    known = Known(plans={32: plan_of(Net)})
    assert names(out_of_bounds(measured(0.0), measured(0.0), known)) == [(Quantity.POSITION, key.name)]
    grown = replace(known, heads_grow=True)
    assert out_of_bounds(measured(0.0), measured(0.0), grown) == []
    assert names(out_of_bounds(measured(0.1), measured(0.0), grown)) == [(Quantity.POSITION, key.name)]


def plan_of(factory: Factory) -> Plan:
    from mup_megatron.modules import plan_for_module

    return plan_for_module(lambda: factory(64), recipe_for())


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "first"), [("", "what the loss takes in"), ("blocks.0.down", "blocks.0.down"), ("norm", "norm")]
)
def test_what_is_wrong_in_evaluation_alone_is_named(path: str, first: str) -> None:
    found = found_in(hooked(path, lambda r: 0.5, evaluation=True))
    assert names(found)[0] == (Quantity.EVALUATION, first)
    assert of_bounds(found)[0].name == "evaluation-differs"


def test_what_is_wrong_without_gradients_alone_is_named() -> None:
    def factory(width: int) -> nn.Module:
        net = Net(width)
        net.norm.register_forward_hook(lambda _m, _a, out: out if torch.is_grad_enabled() else 2 * out)
        return net

    assert names(found_in(factory))[0] == (Quantity.EVALUATION, "norm")


def test_a_path_that_evaluation_cannot_compute_is_compared_as_far_as_it_goes() -> None:
    def factory(width: int) -> nn.Module:
        net = hooked("blocks.0.down", lambda r: 0.5, evaluation=True)(width)

        def refuse(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if not module.training:
                raise ValueError("boxes, and no losses")
            return output

        net.register_forward_hook(refuse)
        return net

    assert names(found_in(factory))[0] == (Quantity.EVALUATION, "blocks.0.down")


# ---- draws ---------------------------------------------------------------------------------------------------------


def changed(name: str, change: Callable[[nn.Module, Tensor], None]) -> Prepare:
    def prepare(model: nn.Module, task: Task) -> Any:
        optimizer = prepare_by_plan(model, task)
        with torch.no_grad():
            change(model, model.get_parameter(name))
        return optimizer

    return prepare


UP = "blocks.1.up.weight"


@pytest.mark.parametrize(
    ("change", "quantity", "cause"),
    [
        (lambda m, w: w.copy_(m.get_parameter("blocks.0.up.weight")), Quantity.ALIKE, "draws-alike"),
        (lambda m, w: w[len(w) // 2 :].copy_(w[: len(w) // 2]), Quantity.ROWS, "rows-alike"),
        (lambda m, w: w.add_(0.2 * w.std()), Quantity.MEAN, "draw-mean"),
        (lambda m, w: w.copy_(w.std() * torch.randn(w.shape) ** 3 / 15**0.5), Quantity.TAILS, "draw-shape"),
    ],
    ids=["alike", "rows", "mean", "shape"],
)
def test_a_draw_that_is_not_one_is_named(change: Any, quantity: Quantity, cause: str) -> None:
    found = found_in(Net, prepare=changed(UP, change))
    assert (quantity, UP) in names(found)
    assert {q for q, _ in names(found)} == {quantity}
    assert of_bounds(found)[0].name == cause


class Encoder(nn.Module):
    """Torch's own encoder of two layers, which it copies from one."""

    def __init__(self, width: int, *, anew: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, width // 16, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embedding, self.readout = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        for parameter in self.encoder.parameters() if anew else ():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.readout(self.encoder(self.embedding(tokens)))
        return result


def test_layers_that_torch_copies_are_told_from_others() -> None:
    found = found_in(lambda width: Encoder(width, anew=False))
    assert {finding.key.quantity for finding in found} == {Quantity.ALIKE}
    cause = of_bounds(found, copying(Encoder(32, anew=False)))[0]
    assert cause.name == "draws-alike"
    assert "nn.TransformerEncoder deep-copies the one layer" in cause.sentence
    assert "draw each layer of `encoder.layers` anew" in cause.sentence
    assert "nn.init.xavier_uniform_" in cause.sentence
    # What is said helps.
    assert found_in(lambda width: Encoder(width, anew=True)) == []


def test_a_draw_may_be_normal_or_the_librarys() -> None:
    """DeepSpeed's models are drawn anew, from normal distributions, where torch draws from uniform ones."""

    def drawn(_model: nn.Module, weight: Tensor) -> None:
        weight.normal_(std=float(weight.std()))

    assert names(found_in(Net, prepare=changed(UP, drawn))) == []


# ---- losses --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_the_sum_of_its_micro_batches_is_named() -> None:
    found = found_in(Net, loss=summed)
    assert names(found) == [(Quantity.SUMMED, "loss")]
    assert math.isclose(found[0].compared.largest, 4.0, rel_tol=1e-3)
    assert of_bounds(found)[0].name == "micro-batches-summed"


def test_positions_have_to_follow_width_in_more_than_half_of_the_layers() -> None:
    """Learned positions are drawn, and one layer of many differs over widths by chance."""
    known = Known(plans={32: plan_of(Net)})

    def following(*slopes: float) -> list[tuple[Quantity, str]]:
        def values(width: int, seed: int) -> dict[Key, float]:
            far = math.log(width / 32)
            return {
                Key(Quantity.POSITION, f"layers.{layer}.attention, 4 apart", 0): 0.5 + slope * far + 0.001 * seed
                for layer, slope in enumerate(slopes)
            }

        runs = tuple(MeasuredRun(w, s, values(w, s), ()) for w in WIDTHS for s in range(3))
        return names(out_of_bounds(Measurements(runs), Measurements(runs), known))

    assert following(0.1, 0.0) == []
    assert following(0.1, 0.1, 0.0) == [
        (Quantity.POSITION, "layers.0.attention, 4 apart"),
        (Quantity.POSITION, "layers.1.attention, 4 apart"),
    ]
