"""Plans of plain torch modules: against microsoft/mup, tensor by tensor, and by hand where mup has no say."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mup
import pytest
import torch
from support.hf_plain_modules import MODULES, OUTPUTS, Transformer, inputs, mlp
from torch import nn

from mup_megatron.errors import InputError
from mup_megatron.modules import apply_plan, module_base, param_groups, plan_for_module
from mup_megatron.recipe import Hyperparameters, ModuleBase, Recipe, load_recipe, recipe, save_recipe
from mup_megatron.theory import ADAM, SGD, Property, Role, rules
from mup_megatron.theory.optimizers import ONE, Power

HYPERPARAMETERS = {"lr": 0.003, "weight_decay": 0.1, "adam_eps": 1e-7, "output_multiplier": 3.0}
WIDTHS = (2, 4)


def recipe_of(
    base: Callable[[], nn.Module], wider: Callable[[], nn.Module], *, optimizer: str = "adam", **content: Any
) -> Recipe:
    hyperparameters = HYPERPARAMETERS | content.pop("hyperparameters", {})
    own = {"parametrization": {"optimizer": optimizer}, "hyperparameters": hyperparameters, **content}
    return recipe({"base": module_base(base, wider).model_dump(mode="json"), **own}, source="recipe")


def recipe_for(kind: str, **content: Any) -> Recipe:
    make = MODULES[kind]
    return recipe_of(lambda: make(1), lambda: make(3), **content)


def _optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    make = {"adam": mup.MuAdamW, "sgd": mup.MuSGD}[kind]
    optimizer: torch.optim.Optimizer = make(groups, lr=0.003, weight_decay=0.1)
    return optimizer


def disagreements(kind: str, width: int, optimizer: str) -> set[str]:
    """Where plan and mup differ, as "role.number"; mup rescales a live draw, as the plan asks for."""
    make = MODULES[kind]
    plan = plan_for_module(lambda: make(width), recipe_for(kind, optimizer=optimizer))

    def build(w: int) -> nn.Module:
        return make(w, lambda *sides: mup.MuReadout(*sides, output_mult=3.0))

    torch.manual_seed(0)
    model = build(width)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mup.set_base_shapes(model, build(1), delta=build(3))
    group_of = {p: group for group in _optimizer(model, optimizer).param_groups for p in group["params"]}
    found = set()
    assert [entry.name for entry in plan.entries] == list(before)
    for entry in plan.entries:
        parameter = model.get_parameter(entry.name)
        pairs = {
            "lr": (entry.lr, group_of[parameter]["lr"]),
            "weight_decay": (entry.weight_decay, group_of[parameter]["weight_decay"]),
        }
        if entry.init_std is not None:
            pairs["init"] = (entry.init_std / entry.library_std, (parameter.norm() / before[entry.name].norm()).item())
        owner = model.get_submodule(entry.name.rpartition(".")[0])
        is_head = isinstance(owner, mup.MuReadout) and entry.name.endswith("weight")
        pairs["multiplier"] = (entry.multiplier, 3.0 / owner.width_mult() if is_head else 1.0)
        found |= {f"{entry.role}.{key}" for key, (a, b) in pairs.items() if a != pytest.approx(b, rel=1e-5, abs=0)}
    return found


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("kind", MODULES)
def test_every_tensor_gets_what_mup_gives_it(kind: str, optimizer: str) -> None:
    for width in WIDTHS:
        assert disagreements(kind, width, optimizer) == set()


@pytest.mark.parametrize(
    ("table", "role", "power", "optimizer", "expected"),
    [
        (rules.INIT_STD, Role.HIDDEN, Power(r_out=-0.5), "adam", {"hidden.init"}),
        (rules.INIT_STD, Role.OUTPUT, Power(r_in=-0.5), "adam", {"output.init"}),
        (ADAM.lr, Role.HIDDEN, Power(r_out=-1), "adam", {"hidden.lr"}),
        (SGD.lr, Role.INPUT, ONE, "sgd", {"input.lr"}),
        (rules.MULTIPLIER, Role.OUTPUT, ONE, "adam", {"output.multiplier"}),
    ],
)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_broken_rule_is_noticed(
    kind: str, table: dict[Role, Power], role: Role, power: Power, optimizer: str, expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(table, role, power)
    assert disagreements(kind, 4, optimizer) == expected


@pytest.mark.parametrize("kind", MODULES)
def test_five_steps_are_those_of_mup(kind: str) -> None:
    make = MODULES[kind]
    own = {"adam_eps": 1e-30}
    plan = plan_for_module(lambda: make(4), recipe_for(kind, hyperparameters=own))
    torch.manual_seed(1)
    ours = make(4).double()
    apply_plan(ours, plan)

    def build(w: int) -> nn.Module:
        return make(w, lambda *sides: mup.MuReadout(*sides, output_mult=3.0))

    torch.manual_seed(1)
    theirs = build(4).double()
    mup.set_base_shapes(theirs, build(1), delta=build(3))
    optimizers = torch.optim.AdamW(param_groups(ours.named_parameters(), plan)), _optimizer(theirs, "adam")
    for group in optimizers[1].param_groups:
        group["eps"] = 1e-30
    losses = [_train(model, optimizer, kind) for model, optimizer in zip((ours, theirs), optimizers, strict=True)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-8)
    assert losses[0][0] - losses[0][-1] > 0.01


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str) -> torch.Tensor:
    x = inputs(kind)
    losses = []
    for _ in range(5):
        logits = model(x.double() if x.is_floating_point() else x)
        logits = logits.flatten(0, -2)
        labels = torch.arange(len(logits)) % OUTPUTS
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", MODULES)
def test_at_the_base_nothing_changes(kind: str) -> None:
    make = MODULES[kind]
    runs = []
    for planned in (True, False):
        torch.manual_seed(2)
        model = make(2).double()
        if planned:
            plan = plan_for_module(
                lambda: make(2), recipe_of(lambda: make(2), lambda: make(3), hyperparameters={"output_multiplier": 1.0})
            )
            apply_plan(model, plan)
            optimizer = torch.optim.AdamW(param_groups(model.named_parameters(), plan))
        else:
            by_dim: list[list[nn.Parameter]] = [[], []]
            for parameter in model.parameters():
                by_dim[parameter.dim() > 1].append(parameter)
            groups = [{"params": by_dim[0], "weight_decay": 0.0}, {"params": by_dim[1], "weight_decay": 0.1}]
            optimizer = torch.optim.AdamW(groups, lr=0.003, eps=1e-7)
        losses = _train(model, optimizer, kind)
        runs.append((losses, *model.state_dict().values()))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


# ---- the recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODULES)
def test_a_recipe_file_gives_the_same_plan(kind: str, tmp_path: Path) -> None:
    made = recipe_for(kind)
    assert isinstance(made.base, ModuleBase)
    save_recipe(made, tmp_path / "a.recipe.yaml")
    again = load_recipe(tmp_path / "a.recipe.yaml")
    assert again == made
    assert again.fingerprint == made.fingerprint
    plans = [plan_for_module(lambda: MODULES[kind](4), own) for own in (made, again)]
    assert plans[0] == plans[1]
    assert plans[0].fingerprint == made.fingerprint


def test_another_base_is_another_fingerprint() -> None:
    assert recipe_for("mlp").fingerprint != recipe_of(lambda: mlp(2), lambda: mlp(3)).fingerprint


def test_the_tuned_std_multiplies_every_draw() -> None:
    before, after = (
        plan_for_module(lambda: mlp(4), recipe_for("mlp", hyperparameters={"init_method_std": std}))
        for std in (0.02, 0.05)
    )
    for one, other in zip(before.entries, after.entries, strict=True):
        assert one.init_std is not None
        assert other.init_std == pytest.approx(2.5 * one.init_std, rel=1e-12)
        assert other.library_std == one.library_std


# ---- what a parameter is -------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """One of each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(10, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.grouped = nn.Conv1d(width, width, 3, groups=2)
        self.scale = nn.Parameter(torch.ones(width))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.rms = nn.RMSNorm(width)
        self.blocks = nn.ModuleList([nn.Linear(width, 4)])
        self.wide = nn.Conv3d(width, 2 * width, (1, 2, 3))
        self.early = nn.Linear(width, 3)
        self.head = nn.Linear(width, 7, bias=False)


def _parts() -> Mapping[str, Any]:
    plan = plan_for_module(lambda: Parts(32), recipe_of(lambda: Parts(8), lambda: Parts(16)))
    assert plan.readout == "head.weight"
    return plan.by_name


def test_what_every_parameter_is() -> None:
    seen = {name: (entry.role, set(entry.properties), entry.fan_in, entry.fan_out) for name, entry in _parts().items()}
    assert seen == {
        "table.weight": (Role.INPUT, {Property.EMBEDDING}, 10, 32),
        "token": (Role.INPUT, set(), 1, 32),
        "depthwise.weight": (Role.INPUT, set(), 9, 32),
        "depthwise.bias": (Role.INPUT, {Property.VECTOR}, 1, 32),
        "grouped.weight": (Role.HIDDEN, set(), 48, 32),
        "grouped.bias": (Role.INPUT, {Property.VECTOR}, 1, 32),
        "scale": (Role.INPUT, {Property.VECTOR}, 1, 32),
        "temperature": (Role.SCALAR, {Property.VECTOR}, 1, 1),
        "rms.weight": (Role.INPUT, {Property.VECTOR, Property.GAIN}, 1, 32),
        "blocks.0.weight": (Role.OUTPUT, set(), 32, 4),
        "blocks.0.bias": (Role.SCALAR, {Property.VECTOR}, 1, 4),
        "wide.weight": (Role.HIDDEN, set(), 32 * 6, 64),
        "wide.bias": (Role.INPUT, {Property.VECTOR}, 1, 64),
        "early.weight": (Role.OUTPUT, {Property.READOUT}, 32, 3),
        "early.bias": (Role.SCALAR, {Property.VECTOR}, 1, 3),
        "head.weight": (Role.OUTPUT, {Property.READOUT}, 32, 7),
    }


class Narrow(nn.Module):
    """Layers with a gated part of a fixed size inside, and readouts of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.ModuleList(
            [nn.ModuleDict({"gated": nn.Linear(width, 10), "back": nn.Linear(5, width), "exit": nn.Linear(width, 4)})]
        )
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Linear(width, 5))])
        self.readout = nn.Linear(width, 5)


def test_what_is_widened_again_in_its_layer_is_a_bottleneck_and_no_output() -> None:
    plan = plan_for_module(lambda: Narrow(32), recipe_of(lambda: Narrow(8), lambda: Narrow(16)))
    roles = {entry.name: entry.role for entry in plan.entries if entry.name.endswith("weight")}
    assert roles == {
        "inside.0.gated.weight": Role.HIDDEN,
        "inside.0.back.weight": Role.INPUT,
        "inside.0.exit.weight": Role.OUTPUT,
        "heads.0.0.weight": Role.HIDDEN,
        "heads.0.1.weight": Role.OUTPUT,
        "readout.weight": Role.OUTPUT,
    }
    assert plan["inside.0.gated.weight"].multiplier == 1.0


def test_numbers_of_parts() -> None:
    parts = _parts()
    assert (parts["blocks.0.weight"].multiplier, parts["head.weight"].multiplier) == (0.25, 0.75)
    assert parts["depthwise.weight"].width_ratio == 1.0
    assert parts["grouped.weight"].lr == 0.003 / 4
    assert parts["temperature"].init_value == 2.0
    assert parts["temperature"].eps == 1e-7
    assert parts["scale"].eps == 1e-7 / 4


def test_the_readout_can_be_named() -> None:
    made = recipe_of(lambda: Parts(8), lambda: Parts(16))
    assert plan_for_module(lambda: Parts(32), made, readout="early.weight").readout == "early.weight"


def test_a_tied_readout() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.head = nn.Linear(width, 12, bias=False)
            self.table = nn.Embedding(12, width)
            self.head.weight = self.table.weight

    made = recipe_of(lambda: Tied(8), lambda: Tied(16))
    plan = plan_for_module(lambda: Tied(32), made, readout="head.weight")
    assert [(entry.name, set(entry.properties)) for entry in plan.entries] == [("head.weight", {Property.EMBEDDING})]
    assert plan.tied
    assert plan.output_multiplier == 0.75


# ---- what has no plan ----------------------------------------------------------------------------------------------


def _refused(make: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as raised:
        make()
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "  " not in message


class Experts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.experts = nn.Parameter(torch.randn(4, width, 2 * width))
        self.matrix = nn.Parameter(torch.randn(width, width))
        self.transposed = nn.ConvTranspose1d(width, width, 3)


def test_what_cannot_be_classified_is_listed() -> None:
    made = recipe_of(lambda: Experts(8), lambda: Experts(16))
    _refused(
        lambda: plan_for_module(lambda: Experts(32), made),
        "experts (4, 32, 64), matrix (32, 32), transposed.weight (32, 32, 3): which side is fan_in cannot be known",
    )


def test_recurrent_weights_are_listed() -> None:
    made = recipe_of(lambda: nn.LSTM(4, 8), lambda: nn.LSTM(4, 16))
    _refused(lambda: plan_for_module(lambda: nn.LSTM(4, 32), made), "weight_hh_l0 (128, 32)")


def test_modules_that_are_not_alike() -> None:
    def build(width: int, **changes: Any) -> Callable[[], nn.Module]:
        return lambda: Transformer(width, **changes)

    _refused(lambda: module_base(build(1), build(2, depth=3)), "layers.2.", "only one of base and target")
    made = recipe_of(build(1), build(2))
    _refused(lambda: plan_for_module(lambda: nn.Sequential(Transformer(2)), made), "0.positions", "no such parameter")
    _refused(lambda: plan_for_module(lambda: Transformer(2).layers, made), "the recipe's base has")
    assert len(plan_for_module(build(2, depth=3), made).entries) > len(plan_for_module(build(2), made).entries)


def test_a_fixed_side_of_another_size() -> None:
    made = recipe_of(lambda: nn.Linear(4, 8), lambda: nn.Linear(4, 16))
    _refused(lambda: plan_for_module(lambda: nn.Linear(5, 32), made), "weight: ", "size 4", "5 in the target")


def test_a_base_that_is_larger() -> None:
    made = recipe_of(lambda: mlp(4), lambda: mlp(2))
    _refused(lambda: plan_for_module(lambda: mlp(2), made), "exchanged?")


def test_nothing_that_grows() -> None:
    _refused(lambda: module_base(lambda: mlp(2), lambda: mlp(2)), "wider")


def test_a_draw_that_only_the_target_has_not_understood_is_refused() -> None:
    class Odd(torch.nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            if self.in_features > 16:
                with torch.no_grad():
                    self.weight.copy_(torch.rand_like(self.weight))

    base = module_base(lambda: Odd(8, 8), lambda: Odd(16, 16))
    recipe = Recipe(base=base, hyperparameters=Hyperparameters(lr=0.1))
    with pytest.raises(InputError, match="weight: how it is drawn is not understood"):
        plan_for_module(lambda: Odd(32, 32), recipe)


def test_a_constant_at_the_base_that_the_target_draws_is_refused() -> None:
    class Odd(torch.nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            if self.in_features <= 16:
                torch.nn.init.zeros_(self.weight)

    base = module_base(lambda: Odd(8, 8), lambda: Odd(16, 16))
    recipe = Recipe(base=base, hyperparameters=Hyperparameters(lr=0.1))
    with pytest.raises(InputError, match="weight: it starts at a constant in one of base and target"):
        plan_for_module(lambda: Odd(32, 32), recipe)
