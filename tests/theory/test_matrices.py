"""Muon's factors: an orthogonalised update in fp64 plain torch acts alike at every width, whatever the scale mode."""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.shapes import gpt, recipe_for

from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe
from mup_megatron.theory import LION, MUON, Part, Plan, Property, Role, Side, Sizes, Tensor
from mup_megatron.theory.matrices import SCALE_MODES, is_stepped_as_matrix
from mup_megatron.theory.widths import Scaling, scaling

OURS: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(max(rows, columns)),
    "unit_rms_norm": lambda rows, columns: math.sqrt(rows / columns),
    "shape_scaling": lambda rows, columns: math.sqrt(max(1, rows / columns)),
}
"""What Megatron multiplies an orthogonalised update by, from its shape as it is stored."""
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.0.self_attention.linear_proj.weight"
FC1, FC2 = (f"decoder.layers.0.mlp.linear_fc{i}.weight" for i in (1, 2))
WORDS, POSITIONS = (f"embedding.{kind}_embeddings.weight" for kind in ("word", "position"))
WIDTHS = (1, 2, 4)


def linear(rows: int, columns: int, *, out: bool = True, into: bool = True, turned: bool = False) -> Tensor:
    """A matrix of y = W x, its sides growing or not."""
    fan_in, fan_out = Side(columns, grows=into), Side(rows, grows=out)
    return Tensor(name="w", shape=(columns, rows) if turned else (rows, columns), fan_in=fan_in, fan_out=fan_out)


def between(base: Tensor, target: Tensor) -> Scaling:
    return scaling(base, target, Sizes(1, 1))


def factor(base: Tensor, target: Tensor, mode: str) -> float:
    rules = MUON.given({"muon_scale_mode": mode})
    return rules.learning_rate(target.role, between(base, target), eta=1.0)


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    """What Muon makes of a random gradient, without its scale."""
    gradient = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(rows + columns))
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    return left @ right


def slope(values: list[float]) -> float:
    """Log-log over WIDTHS, from end to end."""
    return math.log(values[-1] / values[0]) / math.log(WIDTHS[-1] / WIDTHS[0])


# ---- what an update does to activations ----------------------------------------------------------------------------

SHAPES: dict[str, Callable[[int], Tensor]] = {
    "proportional": lambda r: linear(64 * r, 64 * r),
    "fc1": lambda r: linear(256 * r, 64 * r),
    "fc2": lambda r: linear(64 * r, 256 * r),
    "fc1, ffn fixed": lambda r: linear(128, 64 * r, out=False),
    "fc2, ffn fixed": lambda r: linear(64 * r, 128, into=False),
    "fc2, ffn grows as h^1.5": lambda r: linear(64 * r, round(64 * r**1.5)),
    "keys of a fixed number of groups": lambda r: linear(16, 64 * r, out=False),
    "router": lambda r: linear(8, 64 * r, out=False),
    "stored the other way": lambda r: linear(64 * r, round(64 * r**1.5), turned=True),
}


@pytest.mark.parametrize("mode", SCALE_MODES)
@pytest.mark.parametrize("kind", SHAPES)
def test_an_update_changes_the_output_alike_at_every_width(kind: str, mode: str) -> None:
    """Along the direction that an update agrees with: with a gradient, an activation is aligned."""
    base, sizes = SHAPES[kind](1), []
    for width in WIDTHS:
        tensor = SHAPES[kind](width)
        rows, columns = tensor.shape
        step = orthogonal(rows, columns) * OURS[mode](rows, columns) * factor(base, tensor, mode)
        # What is declared as an output has its multiplier, 1/r_in, in the forward pass.
        step = step / (width if tensor.role is Role.OUTPUT else 1)
        norm = torch.linalg.matrix_norm(step, 2)
        grown_in, grown_out = (side.size if side.grows else 1 for side in (tensor.fan_in, tensor.fan_out))
        # An input whose entries are of size 1 has the norm √fan_in; an output's, over √fan_out, is their size.
        sizes.append(float(norm) * math.sqrt(grown_in / grown_out))
    assert slope(sizes) == pytest.approx(0.0, abs=1e-6)


COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def iterated(gradient: torch.Tensor) -> torch.Tensor:
    """Muon's five iterations, which leave singular values of about 1."""
    x = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    x = x / x.norm()
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if gradient.shape[0] <= gradient.shape[1] else x.T


@pytest.mark.parametrize("mode", SCALE_MODES)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_step_on_random_tokens_changes_what_they_become_alike(kind: str, mode: str) -> None:
    """The step of a gradient of 16 tokens, on these tokens: slopes over widths 64 to 256."""
    base, sizes = SHAPES[kind](1), []
    for width in WIDTHS:
        tensor = SHAPES[kind](width)
        generator = torch.Generator().manual_seed(width)
        inputs, errors = (
            torch.randn(16, side.size, dtype=torch.float64, generator=generator)
            for side in (tensor.fan_in, tensor.fan_out)
        )
        turned = tensor.shape != (tensor.fan_out.size, tensor.fan_in.size)
        gradient = inputs.T @ errors if turned else errors.T @ inputs
        step = iterated(gradient) * OURS[mode](*gradient.shape) * factor(base, tensor, mode)
        changed = inputs @ (step if turned else step.T) / (width if tensor.role is Role.OUTPUT else 1)
        # An input that keeps its size is not more coherent in a wider model.
        sizes.append(float(changed.square().mean().sqrt()))
    assert slope(sizes) == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("mode", SCALE_MODES)
@pytest.mark.parametrize("count", [32, 128, 512])
def test_rows_of_a_table_keep_the_size_of_their_entries(count: int, mode: str) -> None:
    def table(r: int) -> Tensor:
        return replace(linear(64 * r, count, into=False, turned=True), properties=frozenset({Property.EMBEDDING}))

    sizes = []
    for width in WIDTHS:
        step = orthogonal(count, 64 * width) * OURS[mode](count, 64 * width) * factor(table(1), table(width), mode)
        sizes.append(float(step.square().mean().sqrt()))
    assert slope(sizes) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("mode", "expected"), [("spectral", 1.0), ("unit_rms_norm", 2.0), ("shape_scaling", 2.0)])
def test_a_table_that_is_square_at_base_and_target_is_one_all_the_same(mode: str, expected: float) -> None:
    def table(size: int) -> Tensor:
        return replace(linear(size, size, into=False, turned=True), properties=frozenset({Property.EMBEDDING}))

    assert factor(table(64), table(256), mode) == pytest.approx(expected)


def test_the_mode_is_not_all_the_same() -> None:
    base, target = linear(64, 64), linear(256, 256)
    assert [factor(base, target, mode) for mode in SCALE_MODES] == [0.5, 1.0, 1.0]
    assert factor(linear(64, 64, turned=True), linear(256, 512, turned=True), "shape_scaling") == 0.5
    assert factor(linear(64, 64), linear(256, 512), "shape_scaling") == math.sqrt(0.5)


@pytest.mark.parametrize("mode", SCALE_MODES)
@pytest.mark.parametrize("kind", SHAPES)
def test_at_the_base_it_is_exactly_one(kind: str, mode: str) -> None:
    for width in (1, 3, 7):
        tensor = SHAPES[kind](width)
        assert factor(tensor, tensor, mode) == 1.0
        still = between(SHAPES[kind](1), tensor).without_width()
        assert MUON.given({"muon_scale_mode": mode}).learning_rate(tensor.role, still, eta=1.0) == 1.0


@pytest.mark.parametrize("width", [2, 3, 5, 7])
def test_the_spectral_condition_itself_needs_no_factor(width: int) -> None:
    for kind in ("proportional", "fc1", "fc2", "fc2, ffn grows as h^1.5", "fc2, ffn fixed"):
        assert factor(SHAPES[kind](1), SHAPES[kind](width), "unit_rms_norm") == 1.0


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_a_side_that_does_not_grow_may_have_another_size(mode: str) -> None:
    """Twice the experts: what does not follow width is not made up for."""
    four, eight = (factor(linear(n, 64, out=False), linear(8, 256, out=False), mode) for n in (4, 8))
    assert four == eight


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", SCALE_MODES)
def test_weight_decay_makes_up_for_the_factor(mode: str, exponent: float) -> None:
    rules = MUON.given({"muon_scale_mode": mode})
    for kind, shape in SHAPES.items():
        s, role = between(shape(1), shape(4)), shape(4).role
        eta, lam = rules.learning_rate(role, s, eta=1.0), rules.decayed(role, s, lam=0.1, exponent=exponent)
        power = exponent if role is Role.HIDDEN else 1.0
        assert lam == pytest.approx(0.1 * eta**-power), kind
        assert rules.epsilon(role, s, eps=1e-8) is None


# ---- which tensors -------------------------------------------------------------------------------------------------


def muon(mode: str = "spectral", **changes: object) -> Recipe:
    base = gpt(group_query_attention=True, num_query_groups=2, **changes)
    return recipe_for(base, optimizer="muon", muon_scale_mode=mode)


@pytest.mark.parametrize("optimizer", ["muon", "lion"])
def test_matrices_are_its_own_and_the_rest_is_adams(optimizer: str) -> None:
    plan = recipe_for(gpt(), optimizer=optimizer).plan(gpt(4))
    others = {entry.name for entry in plan.entries if entry.optimizer == "adam"}
    assert {entry.optimizer for entry in plan.entries} == {optimizer, "adam"}
    assert others == {e.name for e in plan.entries if e.is_vector} | {WORDS}
    adam = recipe_for(gpt()).plan(gpt(4))
    for entry in plan.entries:
        if entry.name in others:
            assert replace(entry, rule=adam[entry.name].rule) == adam[entry.name]
        else:
            assert entry.eps is None
            assert entry.rule.startswith(f"mup.{optimizer}.")


def test_lions_rates_are_adams() -> None:
    lion, adam = (recipe_for(gpt(), optimizer=name).plan(gpt(4)) for name in ("lion", "adam"))
    assert [(e.lr, e.min_lr, e.weight_decay) for e in lion.entries] == [
        (e.lr, e.min_lr, e.weight_decay) for e in adam.entries
    ]
    assert LION.eps is None


def test_a_batch_of_matrices_is_one_and_a_convolution_is_none() -> None:
    sides = {"fan_in": Side(16, grows=True), "fan_out": Side(32, grows=True)}
    batch = Tensor(name="experts", shape=(4, 32, 16), **sides)
    assert is_stepped_as_matrix(batch)
    assert is_stepped_as_matrix(replace(batch, shape=(4, 16, 32)))
    assert not is_stepped_as_matrix(Tensor(name="c", shape=(32, 1, 4), fan_in=Side(4), fan_out=Side(32, grows=True)))
    table = replace(linear(32, 100, into=False, turned=True), properties=frozenset({Property.EMBEDDING}))
    assert (is_stepped_as_matrix(table), is_stepped_as_matrix(replace(table, stepped_as_matrix=True))) == (False, True)
    wider = replace(batch, shape=(4, 128, 32), fan_in=Side(32, grows=True), fan_out=Side(128, grows=True))
    assert factor(batch, wider, "spectral") == factor(linear(32, 16), linear(128, 32), "spectral") == math.sqrt(0.5)


# ---- parts of a fused matrix ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["spectral", "shape_scaling"])
def test_parts_that_need_different_rates_are_refused_and_the_mode_to_use_is_named(mode: str) -> None:
    fixed = gpt(4, group_query_attention=True, num_query_groups=2)
    with pytest.raises(
        InputError, match=rf"linear_qkv\.weight: under muon_scale_mode {mode}.*queries × .*keys × "
    ) as told:
        muon(mode).plan(fixed)
    assert "--muon-scale-mode unit_rms_norm" in str(told.value)
    assert len(str(told.value)) <= 300


def test_the_spectral_condition_takes_parts_that_grow_apart() -> None:
    plan = muon("unit_rms_norm").plan(gpt(4, group_query_attention=True, num_query_groups=2))
    assert (plan[QKV].lr, plan[PROJ].lr) == (plan.lr, plan.lr)


def test_parts_are_stepped_by_themselves_and_so_have_their_own_shapes() -> None:
    """A whole linear_qkv is taller than wide; its parts are square, and have the factor of squares."""
    plan = recipe_for(gpt(), optimizer="muon", muon_scale_mode="spectral").plan(gpt(4))
    assert plan[QKV].lr / plan.lr == plan[PROJ].lr / plan.lr == 0.5
    whole = Tensor(name="w", shape=(96, 32), fan_in=Side(32, grows=True), fan_out=Side(96, grows=True))
    parts = replace(whole, parts=tuple(Part(name, 32) for name in "qkv"), stepped_by_parts=True)
    wide = replace(whole, shape=(192, 128), fan_in=Side(128, grows=True), fan_out=Side(192, grows=True))
    in_parts = replace(wide, parts=tuple(Part(name, 64) for name in "qkv"), stepped_by_parts=True)
    assert factor(whole, wide, "spectral") == pytest.approx(math.sqrt(2 / 4) / math.sqrt(192 / 96))
    assert factor(parts, in_parts, "spectral") == pytest.approx(math.sqrt(2 / 4) / math.sqrt(128 / 32))


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_positions_follow_the_longer_side_of_their_table() -> None:
    base, target = gpt(seq_length=64), gpt(4, seq_length=64)
    unit, shape = (recipe_for(base, optimizer="muon", muon_scale_mode=m).plan(target) for m in list(SCALE_MODES)[1:])
    assert unit[POSITIONS].lr / unit.lr == pytest.approx(math.sqrt(128 / 64) * math.sqrt(128 / 32))
    assert shape[POSITIONS].lr / shape.lr == pytest.approx(math.sqrt(128 / 64) * math.sqrt(64 / 32))
    assert unit[WORDS].optimizer == "adam"


def test_a_plan_says_which_mode_its_rates_are_relative_to() -> None:
    plan, adams = (recipe_for(gpt(), optimizer=name).plan(gpt(4)) for name in ("muon", "adam"))
    assert plan.scale_mode == "spectral"
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert adams.scale_mode is None
    assert "scale_mode" not in adams.to_json()


def test_standard_parametrization_leaves_everything_alone() -> None:
    own = recipe_for(gpt(), rule="standard", optimizer="muon")
    plan = own.plan(gpt(4))
    assert {(entry.lr, entry.min_lr) for entry in plan.entries} == {(plan.lr, plan.min_lr)}


def test_a_routers_multiplier_is_in_its_rate() -> None:
    experts = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "add_bias_linear": False}
    wide = {**experts, "moe_ffn_hidden_size": 128}
    for mode, expected in (("unit_rms_norm", 1.0), ("spectral", 0.25), ("shape_scaling", 0.5)):
        for router in ("output", "hidden"):
            own = recipe_for(gpt(**experts), optimizer="muon", muon_scale_mode=mode)
            own = own.model_copy(update={"parametrization": own.parametrization.model_copy(update={"router": router})})
            plan = own.plan(gpt(4, **wide))
            assert plan["decoder.layers.0.mlp.router.weight"].lr / plan.lr == pytest.approx(expected), (mode, router)
