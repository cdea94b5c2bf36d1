"""Verdicts on torch modules that torch.optim.Muon and AdamW train: right ones, Hugging Face's among them, and the
mistakes that two optimizers invite.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import small_nets
from support.hf_families import config
from support.hf_models import with_class
from support.small_nets import OPTIONS, Net
from torch import nn, optim

from mup_megatron.check.measure.directions import Directed, MuonDirection
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.report.report import text
from mup_megatron.check.run_huggingface import check_hugging_face
from mup_megatron.check.run_modules import check_modules
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan
from mup_megatron.check.verdict.verdict import CheckOutcome, Verdict
from mup_megatron.errors import InputError
from mup_megatron.huggingface import base_content
from mup_megatron.modules import apply_plan, module_base, param_groups
from mup_megatron.recipe import Recipe, recipe

pytestmark = pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch has it since 2.9")

VALUES: dict[str, Any] = {
    "lr": 0.004,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "muon_nesterov": True,
    "muon_coefficient_type": "simple",
    "muon_scale_mode": "spectral",
    "muon_extra_scale_factor": 0.2,
}
ORIGINAL: dict[str, Any] = {"muon_scale_mode": "shape_scaling", "muon_extra_scale_factor": 1.0}


@pytest.fixture(autouse=True)
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    small_nets.keep_references(monkeypatch)


def own_recipe(base: Any = None, **changes: Any) -> Recipe:
    base = module_base(lambda: Net(32), lambda: Net(64)) if base is None else base
    content = {"base": base, "hyperparameters": VALUES | changes, "parametrization": {"optimizer": "muon"}}
    return recipe(content, source="here")


def passes(verdict: Verdict) -> None:
    assert verdict.outcome is CheckOutcome.PASS, text(verdict, title="it", files=())
    left = [each.largest for key, each in verdict.comparison.items() if key.quantity is Quantity.UNEXPLAINED]
    assert max(left) < 0.004
    assert any(key.quantity is Quantity.EPS for key in verdict.comparison)


# ---- right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, pytest.param(ORIGINAL, marks=pytest.mark.slow)], ids=["spectral", "original"])
def test_a_right_model_passes_and_its_steps_are_explained(changes: dict[str, Any]) -> None:
    verdict = check_modules(Net, own_recipe(**changes), seeds=2, **OPTIONS)
    passes(verdict)
    rates = {key.name for key in verdict.comparison if key.quantity is Quantity.LEARNING_RATE}
    assert rates == {name for name, _ in Net(32).named_parameters()}


def test_schedulers_and_a_muon_of_the_scripts_own_pass() -> None:
    """That one multiplies in single precision, where torch's does in bf16."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = param_groups(model.named_parameters(), task.plan)
        h = task.recipe.moved
        muon = Directed([g for g in groups if g["optimizer"] == "muon"], lambda _: MuonDirection(h, ()))
        adam = optim.AdamW([g for g in groups if g["optimizer"] == "adam"], betas=(h.adam_beta1, h.adam_beta2))
        return [muon, adam], [scheduled(each, task) for each in (muon, adam)]

    passes(check_modules(Net, own_recipe(), prepare=prepare, seeds=2, **OPTIONS))


def scheduled(optimizer: optim.Optimizer, task: Task) -> Any:
    from mup_megatron.check.subjects.scripts import warm_up_and_decay

    return optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_decay(step, task.steps))


@pytest.mark.slow
def test_a_hugging_face_configuration_passes() -> None:
    """Keys and values of a fixed number of heads have rates of their own; layers that do not train are looked at."""

    def llama(width: int) -> Any:
        return with_class("llama", config("llama", width, num_key_value_heads=2, num_hidden_layers=6))

    verdict = check_hugging_face(
        llama(256), own_recipe(base_content(llama(32)), lr=0.008), widths=[32, 64, 128], seeds=2
    )
    passes(verdict)
    assert "every layer" in [section.name for section in verdict.sections]


def test_an_engine_of_deepspeeds_is_not_read(tmp_path: Path) -> None:
    llama = with_class("llama", config("llama", 64))
    with pytest.raises(InputError, match="a check of an engine of DeepSpeed's reads one optimizer") as told:
        check_hugging_face(llama, own_recipe(base_content(llama)), deepspeed=tmp_path / "ds.json")
    assert len(str(told.value)) <= 300


# ---- mistakes --------------------------------------------------------------------------------------------------------

Change = Callable[[list[optim.Optimizer], dict[str, nn.Parameter], Task], Any]
FIRST = "blocks.0.up.weight"


def _rates(select: Callable[[str], bool], rate: Callable[[Any, Any], tuple[float, float]]) -> Change:
    """Gives other learning rates and weight decays to what Muon steps."""

    def change(both: list[optim.Optimizer], _named: dict[str, nn.Parameter], task: Task) -> None:
        for group in both[0].param_groups:
            entry = task.plan[group["name"].removeprefix("mup ")]
            if select(entry.name):
                group["lr"], group["weight_decay"] = rate(entry, task.plan)

    return change


def _moved(name: str, *, to_muon: bool) -> Change:
    """Lets the other optimizer step one parameter, with the values that it has."""

    def change(both: list[optim.Optimizer], named: dict[str, nn.Parameter], task: Task) -> None:
        new, old = both if to_muon else reversed(both)
        for group in old.param_groups:
            group["params"] = [p for p in group["params"] if p is not named[name]]
        old.param_groups[:] = [group for group in old.param_groups if group["params"]]
        entry = task.plan[name]
        own = {"adjust_lr_fn": "match_rms_adamw"} if to_muon else {"eps": 1e-8}
        new.add_param_group({"params": [named[name]], "lr": entry.lr, "weight_decay": entry.weight_decay, **own})

    return change


def _adam_for_all(_both: Any, named: dict[str, nn.Parameter], task: Task) -> Any:
    h = task.recipe.moved
    groups = [{"eps": h.adam_eps, **group} for group in param_groups(named.items(), task.plan)]
    return optim.AdamW(groups, betas=(h.adam_beta1, h.adam_beta2))


def _other_momentum(both: list[optim.Optimizer], _named: Any, _task: Task) -> None:
    for group in both[0].param_groups:
        group["momentum"] = 0.5


def _forgotten(both: list[optim.Optimizer], _named: Any, _task: Task) -> Any:
    return both[1]


MISTAKES: dict[str, tuple[Change, str, str]] = {
    "spectral uncorrected": (
        _rates(lambda _: True, lambda _, plan: (plan.lr, plan.weight_decay)),
        "matrix-rates-unscaled",
        "blocks.0",
    ),
    "divided as Adam's": (
        _rates(lambda _: True, lambda entry, _: (entry.lr / entry.width_ratio, entry.weight_decay)),
        "matrix-rates-as-adams",
        "blocks.0",
    ),
    "a matrix to Adam": (_moved(FIRST, to_muon=False), "stepped-by-another", FIRST),
    "the table to Muon": (_moved("embedding.weight", to_muon=True), "stepped-by-another", "embedding.weight"),
    "Adam for all": (_adam_for_all, "optimizer-differs", "blocks.0"),
    "another momentum": (_other_momentum, "optimizer-differs", "blocks.0"),
    "Muon forgotten": (_forgotten, "not-trained", "blocks.0"),
}
QUICK = ("spectral uncorrected", "a matrix to Adam")


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MISTAKES]
)
def test_a_mistake_is_found_and_named(mistake: str) -> None:
    change, cause, culprit = MISTAKES[mistake]

    def prepare(model: nn.Module, task: Task) -> Any:
        both = prepare_by_plan(model, task)
        changed = change(both, dict(model.named_parameters()), task)
        return both if changed is None else changed

    verdict = check_modules(Net, own_recipe(), prepare=prepare, seeds=2, **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    assert verdict.causes[0].name == cause, text(verdict, title="it", files=())
    assert culprit in (verdict.culprit or "")


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"muon_scale_mode": "unit_rms_norm"}, "muon_scale_mode: the recipe's is unit_rms_norm, and torch.optim.Muon"),
        ({"muon_coefficient_type": "quintic"}, "muon_coefficient_type: the recipe's is quintic"),
    ],
)
def test_what_torchs_muon_has_not_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as told:
        check_modules(Net, own_recipe(**changes), **OPTIONS)
    assert len(str(told.value)) <= 300
