"""An optimizer is its rules and one registration per adapter: one that is defined here goes the whole way."""

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_nets
from support.commands import command, write
from support.shapes import gpt
from support.shapes import recipe_for as megatron_recipe
from torch import Tensor, nn, optim

import mup_megatron
from mup_megatron.check.measure.optimizers import CHECKED_OPTIMIZERS, CheckedOptimizer
from mup_megatron.check.measure.optimizers import register as register_in_check
from mup_megatron.check.measure.replay import AdamReplay, Sums
from mup_megatron.check.run_modules import assert_mup
from mup_megatron.check.subjects.scripts import Task
from mup_megatron.errors import InputError
from mup_megatron.modules import apply_plan, check_optimizer, module_base, param_groups, plan_for_module
from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS, TorchOptimizer
from mup_megatron.modules.optimizers import register as register_in_torch
from mup_megatron.recipe import Recipe, recipe, save_recipe
from mup_megatron.theory import Optimizer, Plan, Role
from mup_megatron.theory.optimizers import EVERYWHERE, ONE, Power, register
from mup_megatron.theory.optimizers import optimizers as theirs

BETAS = (0.8, 0.95)
EPS = 1e-3
VALUES = {"lr": 0.01, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_eps": EPS, "weight_decay": 0.1}


def momentum(step: int, beta: float) -> float:
    """Of Dozat's schedule, with torch's decay of it."""
    return beta * (1 - 0.5 * 0.96 ** (step * 4e-3))


class NAdamReplay:
    """Adam's, with Nesterov's momentum: Δw = -η · d / (√v̂ + ε) - η·λ·w."""

    whole = False
    fitted = staticmethod(AdamReplay.fitted)

    def __init__(self, beta1: float, beta2: float) -> None:
        self._betas = beta1, beta2
        self._step, self._product = 0, 1.0
        self._g, self._m, self._v = (torch.tensor(0.0) for _ in range(3))

    def observe(self, gradient: Tensor, before: Tensor) -> None:
        one, two = self._betas
        self._step += 1
        self._product *= momentum(self._step, one)
        self._g = gradient.double()
        self._m = one * self._m + (1 - one) * self._g
        self._v = two * self._v + (1 - two) * self._g**2

    def sums(self, before: Tensor, moved: Tensor) -> Sums:
        one, two = self._betas
        now, after = momentum(self._step, one), momentum(self._step + 1, one)
        d = self._g * (1 - now) / (1 - self._product) + self._m * after / (1 - self._product * after)
        s = (self._v / (1 - two**self._step)).sqrt()
        w, delta = before.double(), moved.double()
        columns = torch.stack([d, delta, w * s, w, delta * s])
        result: Sums = (columns @ columns.T).numpy()
        return result


@pytest.fixture
def known() -> Iterator[None]:
    # The rule of hidden weights is one that no other optimizer has.
    register(
        Optimizer(
            name="nadam",
            title="NAdam",
            hyperparameters=("adam_beta1", "adam_beta2", "adam_eps"),
            lr=dict.fromkeys(Role, ONE) | {Role.HIDDEN: Power(r_in=-0.5)},
            eps=dict.fromkeys(Role, Power(r_out=-1)) | {Role.OUTPUT: Power(r_in=-1)},
            weight_decay={**EVERYWHERE, Role.HIDDEN: Power(r_in=-0.5)},
            step=0,
        )
    )
    register_in_torch(
        "nadam",
        TorchOptimizer(
            kind=optim.NAdam,
            settings=lambda h: {"betas": (h.adam_beta1, h.adam_beta2)},
            options={"decoupled_weight_decay": True},
            fitting="torch.optim.NAdam with decoupled_weight_decay",
        ),
    )
    register_in_check("nadam", CheckedOptimizer(replay=lambda h, _: NAdamReplay(h.adam_beta1, h.adam_beta2)))
    yield
    del CHECKED_OPTIMIZERS["nadam"]
    del theirs()["nadam"]  # type: ignore[attr-defined]
    del TORCH_OPTIMIZERS["nadam"]


def net(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def own_recipe(name: str = "nadam") -> Recipe:
    base = module_base(lambda: net(16), lambda: net(32))
    return recipe({"base": base, "hyperparameters": VALUES, "parametrization": {"optimizer": name}}, source="here")


def made(model: nn.Module, plan: Plan, **options: Any) -> optim.Optimizer:
    return optim.NAdam(param_groups(model.named_parameters(), plan), betas=BETAS, **options)


def test_it_is_not_known_before() -> None:
    with pytest.raises(InputError, match="should be 'adam', 'sgd', 'muon' or 'lion', found 'nadam'"):
        own_recipe()


@pytest.mark.usefixtures("known")
def test_its_rule_is_in_the_plan() -> None:
    plan = plan_for_module(net, own_recipe())
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    read_in, hidden, readout = (again[f"{index}.weight"] for index in (0, 2, 4))
    assert {entry.optimizer for entry in again.entries} == {"nadam"}
    assert (read_in.lr, hidden.lr, readout.lr) == (0.01, 0.01 / 2, 0.01)
    assert (read_in.eps, hidden.eps, readout.eps) == (EPS / 4, EPS / 4, EPS / 4)
    assert (read_in.weight_decay, hidden.weight_decay, readout.weight_decay) == (0.1, 0.1 * 2, 0.1)
    assert hidden.rule == "mup.nadam.hidden"


@pytest.mark.usefixtures("known")
def test_it_is_explained(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base, target = gpt(), gpt(4)
    write(tmp_path / "target.yaml", target.model_dump(mode="json"))
    save_recipe(megatron_recipe(base, optimizer="nadam", lr=0.01), tmp_path / "r.yaml")
    code, out, err = command(capfd)(
        "explain", tmp_path / "target.yaml", "--recipe", tmp_path / "r.yaml", "--format", "json"
    )
    assert code == 0, err
    entries = json.loads(out)["parameters"]
    assert {entry["optimizer"] for entry in entries} == {"nadam"}
    assert {entry["lr"] for entry in entries if entry["role"] == "hidden"} == {0.01 / 2}


@pytest.mark.usefixtures("known")
def test_it_trains_and_its_first_update_is_the_rule_by_hand() -> None:
    plan, model = plan_for_module(net, own_recipe()), net()
    apply_plan(model, plan)
    optimizer = made(model, plan, decoupled_weight_decay=True)
    check_optimizer(optimizer, plan, model)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 8, generator=generator), torch.randn(32, 4, generator=generator)
    losses = []
    for step in range(5):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 0:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                wanted = _updated(before[name], parameter.grad.double(), *_by_hand(name))
                torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-5, atol=1e-7)
    check_optimizer(optimizer, plan, model)
    assert losses[-1] < losses[0]


def _by_hand(name: str) -> tuple[float, float, float]:
    """Learning rate, eps and weight decay at four times the base's width."""
    index, _, kind = name.partition(".")
    lr = 0.01 / math.sqrt(4) if (index, kind) == ("2", "weight") else 0.01
    # A bias has the shrinking gradient of its layer; the readout's grows with nothing.
    eps = EPS if (index, kind) == ("4", "bias") else EPS / 4
    decay = {"0.weight": 0.1, "2.weight": 0.1 * 2, "4.weight": 0.1}.get(name, 0.0)
    return lr, eps, decay


def _updated(weight: Tensor, gradient: Tensor, lr: float, eps: float, decay: float) -> Tensor:
    """The first step of Dozat's NAdam: after it, m is (1-β₁)g and v is (1-β₂)g²."""
    mu, after = momentum(1, BETAS[0]), momentum(2, BETAS[0])
    root = gradient.abs() + eps
    mean = (1 - BETAS[0]) * gradient
    return weight * (1 - lr * decay) - lr * gradient / root - lr * after / (1 - mu * after) * mean / root


@pytest.mark.usefixtures("known")
def test_others_are_told_from_it() -> None:
    plan, model = plan_for_module(net, own_recipe()), net()
    apply_plan(model, plan)
    for wrong in (made(model, plan), optim.AdamW(param_groups(model.named_parameters(), plan), betas=BETAS)):
        with pytest.raises(
            InputError, match=r"its step is not NAdam's, and the plan is for nadam.* Use torch.optim.NA"
        ):
            check_optimizer(wrong, plan, model)


@pytest.mark.usefixtures("known")
def test_a_check_reads_its_values_and_finds_another_optimizers() -> None:
    own = small_nets.recipe_for(optimizer="nadam")
    assert_mup(small_nets.Net, own, **small_nets.OPTIONS)
    with pytest.raises(AssertionError, match=r"(?s)\AFAIL the model: .*blocks.*weight: learning rate"):
        assert_mup(small_nets.Net, own, prepare=_adams_rates, **small_nets.OPTIONS)


def _adams_rates(model: nn.Module, task: Task) -> optim.Optimizer:
    """Hidden weights at η/r_in, where the rule is η/√r_in."""
    apply_plan(model, task.plan)
    groups = param_groups(model.named_parameters(), task.plan)
    for group in groups:
        entry = task.plan[group["name"].removeprefix("mup ")]
        group["lr"] /= math.sqrt(entry.width_ratio) if entry.role is Role.HIDDEN else 1.0
    return TORCH_OPTIMIZERS["nadam"].made(groups, task.recipe.hyperparameters)


@pytest.mark.usefixtures("known")
def test_where_it_was_not_registered_the_message_says_which_were() -> None:
    from mup_megatron.deepspeed.entry import optimizer_params
    from mup_megatron.megatron.arguments.convert import flags
    from mup_megatron.megatron.optimizers import distributed_problem

    own = megatron_recipe(gpt(), optimizer="nadam")
    for asked, framework, known in (
        (lambda: flags(gpt(), own), "Megatron", "adam, sgd, muon and lion"),
        (lambda: distributed_problem("nadam"), "Megatron", "adam, sgd, muon and lion"),
        (lambda: optimizer_params("AdamW", {}, own), "DeepSpeed", "adam, sgd and muon"),
    ):
        with pytest.raises(
            InputError, match=rf"optimizer: the recipe's is nadam, and for {framework} there is {known}\. Take"
        ):
            asked()


# ---- and nobody else asks ------------------------------------------------------------------------------------------

REGISTRATIONS = {
    "modules/optimizers.py",
    "megatron/optimizers.py",
    "deepspeed/optimizers.py",
    "check/measure/optimizers.py",
}
WORDS_OF_OTHERS = {
    "megatron/arguments/table.py": "the default of Megatron's --optimizer",
    "megatron/cpu/core.py": "the class of Megatron's that is replaced on the CPU",
    "deepspeed/schedulers/json_entry.py": "some optimizer, to build a schedule on",
    "deepspeed/schedulers/trial.py": "some optimizer, to try a schedule on",
}


def named_optimizers(path: Path) -> Iterator[str]:
    """Lines of a file whose code, and not its prose, names an optimizer."""
    names = {*theirs(), *(f"{name}_" for name in theirs())}
    names |= {known.kind.__name__.lower() for known in TORCH_OPTIMIZERS.values()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Constant(value=str(word)) if word.lower() in names:
                yield f"{path.name}:{node.lineno}: {word!r}"
            case ast.Attribute(value=ast.Attribute(attr="optim"), attr=word) if (
                word[0].isupper() and word != "Optimizer"
            ):
                yield f"{path.name}:{node.lineno}: {word}"
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.FunctionDef(name=word) if re.search(
                rf"\bis_({'|'.join(names)})", word.lower().removeprefix("_")
            ):
                yield f"{path.name}:{node.lineno}: {word}"


def test_nothing_but_registrations_names_an_optimizer() -> None:
    package = Path(mup_megatron.__file__).parent
    files = [path for path in package.rglob("*.py") if path.parent.name != "theory"]
    found = {str(path.relative_to(package)): lines for path in files if (lines := [*named_optimizers(path)])}
    assert found.keys() - REGISTRATIONS == WORDS_OF_OTHERS.keys(), found


@pytest.mark.parametrize(
    "code",
    [
        'if recipe.parametrization.optimizer == "adam": ...',
        'kind = {"adam": "AdamW", "sgd": "SGD"}',
        'others = ("sgd_",)',
        "optimizer = torch.optim.AdamW(groups)",
        "def _is_sgd(recipe): ...",
        "if plan.is_adam: ...",
    ],
)
def test_the_ways_to_name_one_are_seen(code: str, tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(code)
    assert [*named_optimizers(tmp_path / "asks.py")]
    (tmp_path / "asks.py").write_text('"""AdamW, or SGD."""\nh.adam_beta1 = 0.9\nrules.eps is None')
    assert not [*named_optimizers(tmp_path / "asks.py")]
