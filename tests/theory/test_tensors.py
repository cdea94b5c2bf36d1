"""What a tensor's sides, role and properties make of it: what a model with experts, latents or convolutions asks for.

Values are worked out by hand: σ, η, ε, λ at the base, r_in and r_out of each tensor's own sides.
"""

import dataclasses
import json
from typing import Any

import pytest
import torch
from support.shapes import HYPERPARAMETERS

from mup_megatron.theory import (
    ADAM,
    SGD,
    SOFTMAX,
    Acts,
    Constant,
    Heads,
    Kept,
    LibraryDraw,
    ModelShape,
    Normal,
    Optimizer,
    Override,
    Part,
    Place,
    Plan,
    PlanEntry,
    PlanError,
    Property,
    Role,
    Rule,
    Rules,
    Side,
    Stack,
    Start,
    Tensor,
    Tuned,
    build_plan,
)

ONES = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), 1.0)
TUNED = Tuned(**{field.name: HYPERPARAMETERS[field.name] for field in dataclasses.fields(Tuned)} | ONES)
SIGMA, ETA, EPS, LAMBDA = TUNED.init_method_std, TUNED.lr, TUNED.adam_eps, TUNED.weight_decay


def tensor(fan_in: Side, fan_out: Side, *properties: Property, **own: Any) -> Tensor:
    given: dict[str, Any] = {"name": "layers.0.weight", "shape": (fan_out.size, fan_in.size), **own}
    return Tensor(fan_in=fan_in, fan_out=fan_out, properties=frozenset(properties), **given)


def entry(base: Tensor, target: Tensor, optimizer: Optimizer = ADAM, **rules: Any) -> PlanEntry:
    """What the target's tensor gets, in a model of it alone with 8 layers."""

    def shape(one: Tensor) -> ModelShape:
        own = dataclasses.replace(one, stack="")
        return ModelShape(tensors=(own,), hidden_size=8, head_size=8, stacks={"": Stack(8)}, readout=None)

    return build_plan(shape(base), shape(target), TUNED, rules_used=Rules(optimizer=optimizer, **rules)).entries[0]


def side(size: int) -> Side:
    return Side(size, grows=True)


# ---- roles ---------------------------------------------------------------------------------------------------------


def test_a_role_follows_from_the_sides_and_can_be_declared() -> None:
    fixed = Side(8)
    roles = [tensor(fixed, side(8)), tensor(side(8), side(8)), tensor(side(8), fixed), tensor(fixed, fixed)]
    assert [each.role for each in roles] == [Role.INPUT, Role.HIDDEN, Role.OUTPUT, Role.SCALAR]
    assert tensor(side(8), fixed, declared_role=Role.HIDDEN).role is Role.HIDDEN


def test_a_bottleneck_of_fixed_rank_is_hidden_by_its_own_growing_side() -> None:
    def down(width: int) -> Tensor:
        return tensor(side(width), Side(4), declared_role=Role.HIDDEN)

    def up(width: int) -> Tensor:
        return tensor(Side(4), side(width), declared_role=Role.HIDDEN)

    found = entry(down(8), down(128))
    assert (found.init_std, found.lr, found.eps) == (SIGMA / 4, ETA / 16, EPS)
    assert (found.weight_decay, found.multiplier, found.width_ratio) == (LAMBDA * 16, 1.0, 16.0)
    found = entry(up(8), up(128))
    assert (found.init_std, found.lr, found.eps) == (SIGMA, ETA, EPS / 16)
    assert (found.weight_decay, found.multiplier, found.width_ratio) == (LAMBDA, 1.0, 1.0)


# ---- a router ------------------------------------------------------------------------------------------------------


def router(width: int, *properties: Property) -> Tensor:
    return tensor(side(width), Side(6), *properties)


def test_a_routers_multiplier_is_in_its_weight() -> None:
    # 4 times as wide: output with multiplier 1/4, σ, η, ε/4, λ; folded with θ = 1/4.
    explicit = entry(router(8), router(32))
    assert (explicit.role, explicit.multiplier) == (Role.OUTPUT, 0.25)
    assert (explicit.init_std, explicit.lr, explicit.eps, explicit.weight_decay) == (SIGMA, ETA, EPS / 4, LAMBDA)
    found = entry(router(8, Property.FOLDED), router(32, Property.FOLDED))
    assert (found.role, found.multiplier) == (Role.OUTPUT, 1.0)
    assert (found.init_std, found.lr, found.min_lr) == (SIGMA / 4, ETA / 4, TUNED.min_lr / 4)
    assert (found.eps, found.weight_decay) == (EPS, LAMBDA * 4)
    # There is nothing to take out again: the rule itself is so.
    assert (found.folded, found.fold_offset) == (1.0, 0.0)


def test_a_folded_router_of_sgd() -> None:
    # Explicit: η·4, λ/4. With θ = 1/4 the step is θ² and the decay 1/θ² of that.
    found = entry(router(8, Property.FOLDED), router(32, Property.FOLDED), SGD)
    assert (found.lr, found.weight_decay, found.eps) == (ETA * 4 / 16, LAMBDA / 4 * 16, None)
    assert (found.init_std, found.multiplier) == (SIGMA / 4, 1.0)


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=lambda optimizer: optimizer.name)
def test_a_folded_router_trains_as_the_explicit_one(optimizer: Optimizer) -> None:
    explicit = entry(router(8), router(32), optimizer)
    folded = entry(router(8, Property.FOLDED), router(32, Property.FOLDED), optimizer)
    losses = [_losses(each) for each in (explicit, folded)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
    assert (losses[0][0] - losses[0][-1]).abs() > 1e-4
    # Every one of its values is needed.
    for key in ("lr", "weight_decay", "init_std", *(("eps",) if folded.eps else ())):
        wrong = dataclasses.replace(folded, **{key: getattr(explicit, key)})
        assert (_losses(wrong) - losses[0]).abs().max() > 1e-9, key


def _losses(given: PlanEntry) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    assert given.init_std is not None
    unit = torch.randn(given.shape, generator=generator, dtype=torch.float64)
    weight = (given.init_std * unit).requires_grad_()
    # Large enough a rate and an eps for ten steps to feel all of them.
    own = {"params": [weight], "lr": 30 * given.lr, "weight_decay": given.weight_decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD([own], momentum=0.9) if given.eps is None else torch.optim.AdamW([own], eps=1e5 * given.eps)
    )
    losses = []
    for _ in range(10):
        x = torch.randn(16, given.fan_in, generator=generator, dtype=torch.float64)
        loss = torch.nn.functional.cross_entropy(x @ weight.T * given.multiplier, torch.arange(16) % given.fan_out)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# ---- sides that the shape does not say -----------------------------------------------------------------------------


def test_experts_are_a_batch_of_matrices_and_each_has_its_own_sides() -> None:
    def experts(width: int, count: int = 4) -> Tensor:
        return tensor(side(width), side(2 * width), Property.EXPERT, shape=(count, width, 2 * width))

    found = entry(experts(8), experts(32))
    assert (found.fan_in, found.fan_out, found.shape) == (32, 64, (4, 32, 64))
    assert (found.init_std, found.lr, found.eps, found.weight_decay) == (SIGMA / 2, ETA / 4, EPS / 4, LAMBDA * 4)
    assert entry(experts(8), experts(32, count=16)).lr == found.lr


def test_an_experts_eps_follows_the_part_of_the_tokens_that_it_sees() -> None:
    base = tensor(side(8), Side(4), Property.EXPERT, declared_role=Role.HIDDEN, share=2 / 8)
    target = tensor(side(32), Side(4), Property.EXPERT, declared_role=Role.HIDDEN, share=2 / 32)
    found = entry(base, target)
    assert found.eps == EPS / 4
    assert (found.lr, found.weight_decay) == (ETA / 4, 4 * LAMBDA)
    assert entry(base, target, rule=Rule.STANDARD).eps == EPS


def test_a_router_is_hidden_where_a_recipe_wants_it() -> None:
    base, target = (router(width, Property.FOLDED, Property.ROUTER) for width in (8, 32))
    assert entry(base, target) == dataclasses.replace(
        entry(router(8, Property.FOLDED), router(32, Property.FOLDED)), properties=target.properties
    )
    found = entry(base, target, router=Role.HIDDEN)
    assert (found.role, found.multiplier) == (Role.HIDDEN, 1.0)
    assert (found.init_std, found.lr, found.eps, found.weight_decay) == (SIGMA / 2, ETA / 4, EPS, 4 * LAMBDA)


# ---- attentions of several kinds -----------------------------------------------------------------------------------


def _tower(text: int, vision: int) -> ModelShape:
    places = (
        Place("text.0.attention", Acts.SCALE, SOFTMAX),
        Place("vision.0.attention", Acts.SCALE, SOFTMAX, Heads(vision, stock_scale=0.5)),
    )
    own = tensor(side(8), side(8), name="text.0.weight")
    return ModelShape(tensors=(own,), hidden_size=8, head_size=text, readout=None, places=places)


def test_an_attention_with_heads_of_its_own_has_a_scale_of_its_own() -> None:
    tuned = dataclasses.replace(TUNED, attention_multiplier=3.0)
    plan = build_plan(_tower(16, 4), _tower(16, 8), tuned, rules_used=Rules())
    text, vision = plan.sites
    assert (text.factor, text.stock) == (3 / 4, 1 / 4)
    assert (vision.factor, vision.stock) == (3 * 0.5 * 4 / 8, 0.5)
    standard = build_plan(_tower(16, 4), _tower(16, 8), tuned, rules_used=Rules(rule=Rule.STANDARD))
    assert standard.sites[1].factor == 3 * 0.5
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_one_attention_of_another_scale_is_a_change() -> None:
    assert not build_plan(_tower(16, 4), _tower(16, 4), TUNED, rules_used=Rules()).changes_softmax_scale
    assert build_plan(_tower(16, 4), _tower(16, 8), TUNED, rules_used=Rules()).changes_softmax_scale


def test_an_attention_that_the_base_has_not_is_refused() -> None:
    base = dataclasses.replace(_tower(16, 4), places=())
    with pytest.raises(PlanError, match=r"^vision\.0\.attention: the base has no such attention"):
        build_plan(base, _tower(16, 4), TUNED, rules_used=Rules())


def test_a_shared_experts_output_is_residual_as_well() -> None:
    def output(width: int) -> Tensor:
        return tensor(side(width), side(width), Property.EXPERT, Property.RESIDUAL)

    found = entry(output(8), output(32))
    assert found.init_std == SIGMA / 2 / 4  # L is 8
    assert found.is_residual


def test_a_convolutions_fan_in_counts_its_kernel() -> None:
    def convolution(width: int, kernel: int = 9) -> Tensor:
        return tensor(side(width * kernel), side(width), shape=(width, width, kernel))

    found = entry(convolution(8), convolution(32))
    assert (found.fan_in, found.width_ratio, found.lr) == (288, 4.0, ETA / 4)
    # The channels of one that is depthwise grow on one side alone: its fan_in is the kernel.
    depthwise = [tensor(Side(4), side(width), shape=(width, 1, 4)) for width in (8, 32)]
    found = entry(*depthwise)
    assert (found.role, found.init_std, found.lr, found.eps) == (Role.INPUT, SIGMA, ETA, EPS / 4)


# ---- how a tensor starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "std", "value", "library"),
    [
        (Normal(), SIGMA / 2, None, None),
        (Constant(1.0), None, 1.0, None),
        (LibraryDraw(0.125), 0.5 / 2, None, 0.125),
        (Kept(), None, None, None),
    ],
)
def test_what_a_start_says_of_init(start: Start, std: float | None, value: float | None, library: float | None) -> None:
    at_base = LibraryDraw(0.5) if isinstance(start, LibraryDraw) else start
    found = entry(tensor(side(8), side(8), start=at_base), tensor(side(32), side(32), start=start))
    assert (found.init_std, found.init_value, found.library_std) == (std, value, library)


@pytest.mark.parametrize("other", [Constant(0.0), Normal(), Kept()])
def test_a_librarys_draw_in_one_of_two_is_refused(other: Start) -> None:
    for starts in ((other, LibraryDraw(0.5)), (LibraryDraw(0.5), other)):
        base, target = (tensor(side(8), side(8), start=start) for start in starts)
        with pytest.raises(PlanError, match=r"layers\.0\.weight: .* Initialise both alike"):
            entry(base, target)


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=lambda optimizer: optimizer.name)
@pytest.mark.parametrize("own", [(Property.VECTOR,), (Property.VECTOR, Property.GAIN)])
@pytest.mark.parametrize("grows", [True, False])
def test_vectors_have_no_weight_decay(own: tuple[Property, ...], grows: bool, optimizer: Optimizer) -> None:
    base, target = (
        tensor(Side(1), Side(size, grows), *own, shape=(size,), start=Constant(1.0)) for size in (8, 32 if grows else 8)
    )
    found = entry(base, target, optimizer)
    assert found.role is (Role.INPUT if grows else Role.SCALAR)
    assert found.weight_decay == 0.0
    assert found.is_vector


def test_a_vector_is_not_drawn_from_the_tuned_std() -> None:
    with pytest.raises(AssertionError):
        tensor(Side(1), side(8), Property.VECTOR)
    tensor(Side(1), side(8), Property.VECTOR, start=Kept())


def test_parts_add_up_to_the_rows() -> None:
    parts = (Part("queries", 8), Part("keys", 4))
    assert tensor(side(8), side(12), parts=parts).parts == parts
    with pytest.raises(AssertionError):
        tensor(side(8), side(16), parts=parts)


# ---- declarations that cannot be -----------------------------------------------------------------------------------


def test_sides_that_are_not_the_shapes_are_refused() -> None:
    for shape in ((3,), (16, 7)):
        with pytest.raises(PlanError, match=r"layers.0.weight: a shape of .* is no whole number of matrices"):
            tensor(side(8), side(16), shape=shape)


def test_a_readout_that_is_an_embedding_is_refused() -> None:
    with pytest.raises(PlanError, match="a readout and an embedding at once"):
        tensor(side(8), Side(16), Property.READOUT, Property.EMBEDDING)


def test_a_name_that_two_tensors_have_is_refused() -> None:
    one = tensor(side(8), side(8))
    shape = ModelShape(tensors=(one, one), hidden_size=8, head_size=8, readout=None)
    with pytest.raises(PlanError, match="two tensors of the architecture have this name"):
        build_plan(shape, shape, TUNED, rules_used=Rules())


# ---- what has no rule ----------------------------------------------------------------------------------------------


def test_sgd_is_refused_where_an_expert_sees_another_share_of_the_tokens() -> None:
    base, target = (tensor(side(n), side(n), Property.EXPERT, share=2 / experts) for n, experts in ((8, 8), (32, 32)))
    with pytest.raises(PlanError, match=r"sees 0\.25 times the share of tokens.* Use Adam"):
        entry(base, target, SGD)
    assert entry(base, dataclasses.replace(target, share=2 / 8), SGD).lr == ETA


def test_sgd_is_refused_for_a_router_that_is_taken_for_hidden() -> None:
    base, target = (router(width, Property.FOLDED, Property.ROUTER) for width in (8, 32))
    with pytest.raises(PlanError, match="a bottleneck"):
        entry(base, target, SGD, router=Role.HIDDEN)


@pytest.mark.parametrize(
    ("start", "own"),
    [(Kept(), {"multiplier": 2.0}), (Kept(), {"init_mult": 2.0}), (Constant(1.0), {"init_mult": 2.0})],
)
def test_a_start_that_is_not_drawn_has_no_factor(start: Start, own: dict[str, float]) -> None:
    shape = ModelShape(tensors=(tensor(Side(4), side(8), start=start),), hidden_size=8, head_size=8, readout=None)
    [key] = own
    with pytest.raises(PlanError, match=rf"layers\.0\.weight .* so it has no {key}\. Take {key} out"):
        build_plan(shape, shape, TUNED, rules_used=Rules(), overrides=[Override(match="*", **own)])
