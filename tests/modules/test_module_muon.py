"""torch.optim.Muon together with AdamW: which steps what, at which rate, and what they then do. Any torch module, and
Hugging Face's.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.hf_families import config
from support.hf_models import built, with_class
from support.orthogonal import orthogonal
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy

from mup_megatron.errors import InputError
from mup_megatron.huggingface import base_content, plan_for
from mup_megatron.modules import apply_plan, check_optimizer, module_base, param_groups, plan_for_module
from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS
from mup_megatron.recipe import Recipe, recipe
from mup_megatron.theory import Plan

pytestmark = pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch has it since 2.9")

VALUES: dict[str, Any] = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "adam_eps": 1e-8,
    "muon_momentum": 0.9,
    "muon_nesterov": True,
    "muon_coefficient_type": "simple",
}
MODES: dict[str, dict[str, Any]] = {
    "shape_scaling": {"muon_scale_mode": "shape_scaling"},
    "spectral": {"muon_scale_mode": "spectral", "muon_extra_scale_factor": 0.2},
}
ADJUSTED: dict[str, Callable[[int, int], float]] = {
    "shape_scaling": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "spectral": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
TOKENS, FFN = 32, 64


class Net(nn.Module):
    """Two MLPs of a fixed ffn, and one that grows, between a table with positions and a readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(TOKENS, width), nn.Embedding(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ffn), nn.ReLU(), nn.Linear(ffn, width))
            for ffn in (FFN, FFN, 2 * width)
        )
        self.readout = nn.Linear(width, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = x + block(x)
        result: Tensor = self.readout(x)
        return result


def own_recipe(mode: str = "shape_scaling", **changes: Any) -> Recipe:
    base = module_base(lambda: Net(32), lambda: Net(64))
    values = {**VALUES, **MODES.get(mode, {"muon_scale_mode": mode}), **changes}
    content = {"base": base, "hyperparameters": values, "parametrization": {"optimizer": "muon"}}
    return recipe(content, source="here")


def made(model: nn.Module, plan: Plan, own: Recipe) -> list[optim.Optimizer]:
    groups = param_groups(model.named_parameters(), plan)
    return [
        TORCH_OPTIMIZERS[name].made([g for g in groups if g["optimizer"] == name], own.moved)
        for name in plan.optimizers
    ]


def applied(width: int = 128, mode: str = "shape_scaling") -> tuple[nn.Module, Plan, list[optim.Optimizer]]:
    own = own_recipe(mode)
    torch.manual_seed(width)
    model, plan = Net(width), plan_for_module(lambda: Net(width), own)
    apply_plan(model, plan)
    return model, plan, made(model, plan, own)


def step(model: nn.Module, optimizers: list[optim.Optimizer], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS, (16, 9), generator=generator)
    model.zero_grad()
    cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for optimizer in optimizers:
        optimizer.step()


# ---- which, and at which rate ----------------------------------------------------------------------------------------


def test_matrices_inside_are_muons_and_the_rest_is_adams() -> None:
    _, plan, _ = applied()
    own = {entry.name for entry in plan.entries if entry.optimizer == "muon"}
    assert own == {f"blocks.{i}.{j}.weight" for i in range(3) for j in (1, 3)}
    assert {entry.optimizer for entry in plan.entries} == {"muon", "adam"}


@pytest.mark.parametrize("mode", MODES)
def test_each_rate_is_the_rule_by_hand(mode: str) -> None:
    model, plan, optimizers = applied(mode=mode)
    names = {id(p): name for name, p in model.named_parameters()}
    live = {names[id(p)]: g for each in optimizers for g in each.param_groups for p in g["params"]}
    r = 4
    for index, ffn_ratio in ((0, 1), (1, 1), (2, r)):
        for layer, (r_out, r_in) in ((1, (ffn_ratio, r)), (3, (r, ffn_ratio))):
            name = f"blocks.{index}.{layer}.weight"
            rows, columns = plan[name].shape
            before = [size // ratio for size, ratio in ((rows, r_out), (columns, r_in))]
            # A side that stays counts as it is at the target.
            factor = math.sqrt(r_out / r_in) * ADJUSTED[mode](*before) / ADJUSTED[mode](rows, columns)
            assert live[name]["lr"] == plan[name].lr == pytest.approx(0.02 * factor)
            assert live[name]["weight_decay"] == pytest.approx(0.1 / factor)
            assert live[name]["adjust_lr_fn"] == {"shape_scaling": "original", "spectral": "match_rms_adamw"}[mode]
    for name in ("embedding.weight", "position.weight", "readout.weight", "blocks.0.0.weight"):
        assert live[name]["lr"] == plan[name].lr == 0.02


def test_keys_of_a_fixed_number_of_heads_have_a_rate_of_their_own() -> None:
    def llama(width: int) -> Any:
        return with_class("llama", config("llama", width, num_key_value_heads=2))

    values = {**VALUES, **MODES["spectral"]}
    base = {"base": base_content(llama(64)), "hyperparameters": values, "parametrization": {"optimizer": "muon"}}
    own = recipe(base, source="here")
    model = built("llama", llama(256))
    plan = plan_for(model, own)
    layer = "model.layers.0.self_attn"
    # √(r_out/r_in) over how √max(rows, columns) grows: ½ over 2 for keys, 1 over 2 for queries.
    assert plan[f"{layer}.q_proj.weight"].lr == pytest.approx(0.02 / 2)
    assert plan[f"{layer}.k_proj.weight"].lr == plan[f"{layer}.v_proj.weight"].lr == pytest.approx(0.02 / 4)
    assert {plan[name].optimizer for name in ("model.embed_tokens.weight", "lm_head.weight")} == {"adam"}
    apply_plan(model, plan)
    both = made(model, plan, own)
    check_optimizer(both, plan, model)
    assert {type(each) for each in both} == {optim.Muon, optim.AdamW}


# ---- what they do ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_the_plans_rate_times_the_orthogonalised_gradient(mode: str) -> None:
    model, plan, optimizers = applied(mode=mode)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        # Of directions that are as good as 0, as a real one has, bf16 makes anything.
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in model.named_parameters():
        entry = plan[name]
        if entry.optimizer == "muon":
            assert parameter.grad is not None
            wanted = orthogonal(parameter.grad) * ADJUSTED[mode](*entry.shape) + entry.weight_decay * before[name]
            moved = (before[name] - parameter.detach()) / entry.lr
            assert float((moved - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("mode", MODES)
def test_updates_act_alike_at_every_width(mode: str) -> None:
    """How much what each matrix gives is changed by a step, on the batch of the step: slopes over widths 64 to 256."""
    changes: dict[str, list[float]] = {}
    for width in (64, 256):
        model, plan, optimizers = applied(width, mode)
        inputs: dict[str, Tensor] = {}

        def seen(name: str, into: dict[str, Tensor] = inputs) -> Callable[..., None]:
            return lambda _, args: into.update({name: args[0].detach()})

        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and plan[f"{name}.weight"].optimizer == "muon":
                module.register_forward_pre_hook(seen(name))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, optimizers)
        for name, x in inputs.items():
            entry, parameter = plan[f"{name}.weight"], model.get_parameter(f"{name}.weight")
            update = parameter.detach() - before[f"{name}.weight"] * (1 - entry.lr * entry.weight_decay)
            changes.setdefault(name, []).append(float((x @ update.T).square().mean().sqrt()))
    slopes = {name: math.log(last / first) / math.log(4) for name, (first, last) in changes.items()}
    assert len(slopes) == 6
    assert all(abs(slope) < 0.1 for slope in slopes.values()), slopes


@pytest.mark.parametrize("mode", MODES)
def test_at_the_base_a_run_is_bitwise_torchs(mode: str) -> None:
    ends = []
    for planned in (True, False):
        torch.manual_seed(1)
        model = Net(32)
        if planned:
            own = own_recipe(mode)
            plan = plan_for_module(lambda: Net(32), own)
            apply_plan(model, plan)
            optimizers = made(model, plan, own)
        else:
            named = dict(model.named_parameters())
            matrices = [name for name in named if name.startswith("blocks.") and named[name].dim() == 2]
            name = {"shape_scaling": "original", "spectral": "match_rms_adamw"}[mode]
            vectors = [p for p in named.values() if p.dim() == 1]
            tables = [p for key, p in named.items() if p.dim() == 2 and key not in matrices]
            muon = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "adjust_lr_fn": name}
            adam: dict[str, Any] = {"lr": 0.02, "eps": 1e-8, "betas": (0.9, 0.999)}
            groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
            optimizers = [optim.Muon([named[key] for key in matrices], **muon), optim.AdamW(groups, **adam)]  # type: ignore[arg-type]
        for seed in range(4):
            step(model, optimizers, seed)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


def test_a_run_goes_on_from_both_states() -> None:
    def weights(model: nn.Module) -> list[Tensor]:
        return [p.detach().clone() for p in model.parameters()]

    model, _, optimizers = applied()
    for seed in range(2):
        step(model, optimizers, seed)
    saved = copy.deepcopy((model.state_dict(), [each.state_dict() for each in optimizers]))
    step(model, optimizers, 2)
    again, plan, others = applied()
    again.load_state_dict(saved[0])
    for optimizer, state in zip(others, saved[1], strict=True):
        optimizer.load_state_dict(state)
    check_optimizer([*others], plan, again)
    step(again, others, 2)
    assert all(map(torch.equal, weights(model), weights(again)))


# ---- what is refused -------------------------------------------------------------------------------------------------


class OwnMuon(optim.Optimizer):
    """Muon as somebody has it, in single precision."""

    def __init__(self, groups: Any, power: float = 0.5) -> None:
        super().__init__(groups, {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9})
        self.power = power

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                ahead = p.grad.lerp(m, group["momentum"])
                scale = max(1, p.shape[0] / p.shape[1]) ** self.power
                p.sub_(group["lr"] * scale * orthogonal(ahead).float())


def with_own(make: Callable[[Any], optim.Optimizer]) -> Callable[[], None]:
    def checked() -> None:
        model, plan, (one, other) = applied()
        muons, adams = (one, other) if isinstance(one, optim.Muon) else (other, one)
        groups = [{k: v for k, v in g.items() if k != "adjust_lr_fn"} for g in muons.param_groups]
        check_optimizer([make(groups), adams], plan, model)

    return checked


def test_somebodys_muon_is_accepted() -> None:
    with_own(OwnMuon)()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda g: OwnMuon(g, power=0.0), r"OwnMuon: its step is not Muon's.*Use torch\.optim\.Muon for the groups"),
        (lambda g: optim.Muon(g, adjust_lr_fn="match_rms_adamw"), "Muon: its step is not Muon's"),
        (optim.AdamW, "AdamW: its step is not Muon's, and the plan is for muon"),
        (lambda g: optim.SGD(g, momentum=0.9), "SGD: its step is not Muon's"),
    ],
    ids=["without a scale", "another scale", "AdamW", "SGD"],
)
def test_another_step_is_not(make: Callable[[Any], optim.Optimizer], said: str) -> None:
    with pytest.raises(InputError, match=said):
        with_own(make)()


@pytest.mark.parametrize(
    ("kind", "change"), [(optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}), (optim.AdamW, {"maximize": True})]
)
def test_every_group_is_tried(kind: type[optim.Optimizer], change: dict[str, Any]) -> None:
    model, plan, optimizers = applied()
    [groups] = [own.param_groups for own in optimizers if isinstance(own, kind)]
    assert len(groups) > 1
    groups[-1].update(change)
    with pytest.raises(InputError, match="its step is not "):
        check_optimizer([*optimizers], plan, model)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"momentum": 0.95}, r"momentum should be 0\.9 and is 0\.95\. Give the optimizer momentum=0\.9"),
        ({"nesterov": False}, r"nesterov should be 1 and is 0\. Give the optimizer nesterov=True"),
        ({"ns_steps": 4}, r"ns_steps should be 5 and is 4\."),
    ],
)
def test_what_is_the_same_for_all_matrices_is_the_recipes(own: dict[str, Any], said: str) -> None:
    model, plan, optimizers = applied()
    [muon] = [each for each in optimizers if isinstance(each, optim.Muon)]
    for group in muon.param_groups:
        group.update(own)
    with pytest.raises(InputError, match=rf"\Ablocks\.\d\.\d\.weight: {said}"):
        check_optimizer([*optimizers], plan, model)


def test_coefficients_that_torch_has_not_are_refused() -> None:
    model, plan = Net(128), plan_for_module(lambda: Net(128), own_recipe(muon_coefficient_type="quintic"))
    apply_plan(model, plan)
    right = plan_for_module(lambda: Net(128), own_recipe())
    optimizers = made(model, right, own_recipe())
    check_optimizer([*optimizers], right, model)
    with pytest.raises(InputError, match=r"muon_coefficient_type: the recipe's is quintic.* is made for simple"):
        check_optimizer([*optimizers], plan, model)


def test_a_scale_that_torch_has_not_is_refused() -> None:
    own = own_recipe("unit_rms_norm")
    model, plan = Net(128), plan_for_module(lambda: Net(128), own)
    apply_plan(model, plan)
    groups = param_groups(model.named_parameters(), plan)
    both: list[optim.Optimizer] = [
        kind([g for g in groups if g["optimizer"] == name], lr=0.02)  # type: ignore[operator]
        for name, kind in (("muon", optim.Muon), ("adam", optim.AdamW))
    ]
    with pytest.raises(InputError, match="muon_scale_mode: the plan's is unit_rms_norm, which torch's optimizer for m"):
        check_optimizer(both, plan, model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"muon_coefficient_type": "quintic"}, "muon_coefficient_type: the recipe's is quintic.* is made for simple"),
        ({"muon_extra_scale_factor": 0.2}, "muon_extra_scale_factor: the recipe's is 0.2.* is made for 1.0"),
        ({"muon_scale_mode": "unit_rms_norm"}, "muon_scale_mode: the recipe's is unit_rms_norm.* for shape_scaling"),
        ({"muon_scale_mode": "spectral"}, "muon_extra_scale_factor: the recipe's is 1.0.* is made for 0.2"),
    ],
)
def test_values_that_torch_has_not_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        TORCH_OPTIMIZERS["muon"].made([{"params": [nn.Parameter(torch.ones(2, 3))]}], own_recipe(**changes).moved)
    assert len(str(error.value)) <= 300
