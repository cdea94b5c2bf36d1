"""The guard reads back from every kind of optimizer what it steps with, and names what is not the plan's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ds_models import build, ds_config, recipe_for, train_engine, write
from support.ds_ranks import run_ranks

import mup_megatron.deepspeed
from mup_megatron.deepspeed import Form, guard
from mup_megatron.deepspeed.guard import LiveValues, live_values
from mup_megatron.huggingface import plan_for
from mup_megatron.theory import Plan

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "zero 1, bf16 with fp32 gradients": {
        "zero": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
    "zero 3, small groups": {"zero_optimization": {"stage": 3, "sub_group_size": 500}},
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(build("gpt2", 4), recipe_for("gpt2"))


def _engine(recipe_path: str, model: torch.nn.Module | None = None, **changes: Any) -> Any:
    import deepspeed

    content = ds_config(world_size=torch.distributed.get_world_size(), **changes) | {"mup": {"recipe": recipe_path}}
    return deepspeed.initialize(model=build("gpt2", 4) if model is None else model, config=content)[0]


def _read(recipe_path: str) -> dict[str, dict[str, LiveValues]]:
    found = {}
    for kind, changes in KINDS.items():
        engine = _engine(recipe_path, **changes)
        train_engine(engine, "gpt2", range(1))
        found[kind] = live_values(engine)
        engine.destroy()
    return found


def test_every_kind_of_optimizer_is_read(plan: Plan, tmp_path: Path) -> None:
    found = run_ranks(_read, 2, write(recipe_for("gpt2"), tmp_path))[0]
    wanted = {own.name: LiveValues(own.lr, own.weight_decay, own.eps) for own in plan.entries}
    assert len(set(wanted.values())) == 3
    for kind, live in found.items():
        assert live == wanted, kind


# ---- what it says --------------------------------------------------------------------------------------------------


def _problems(recipe_path: str) -> dict[str, list[str]]:
    found = {}

    def look(name: str, engine: Any, *, at_peak: bool = True) -> None:
        run = mup_megatron.deepspeed.plan_of(engine)
        assert run is not None
        found[name] = guard.problems(engine, run, 0.7, at_peak=at_peak)

    engine = _engine(recipe_path, zero=3)
    groups = engine.optimizer.param_groups
    look("right", engine)
    for group in groups:
        group["lr"] /= 2
    look("at half the schedule", engine, at_peak=False)
    look("below the peak", engine)
    groups[0]["lr"] *= 2
    look("one group", engine, at_peak=False)
    groups[0]["lr"] /= 2
    groups[1]["eps"] = 1e-3
    look("eps", engine, at_peak=False)
    groups[1]["eps"] = groups[0]["eps"]
    groups[2]["weight_decay"] = 0.1
    look("weight decay", engine, at_peak=False)
    engine.destroy()
    engine = _engine(recipe_path)
    engine.optimizer.param_groups.pop()
    look("lost", engine)
    engine.destroy()
    engine = _engine(recipe_path, zero=1)
    engine.optimizer.clip_grad = 1.0
    look("clipping", engine)
    return found


def test_what_is_not_the_plans_is_named(tmp_path: Path) -> None:
    found = run_ranks(_problems, 1, write(recipe_for("gpt2"), tmp_path))[0]
    assert found["right"] == found["at half the schedule"] == []
    said = {name: problems[0] for name, problems in found.items() if problems}
    assert said.keys() == found.keys() - {"right", "at half the schedule"}
    assert "transformer.wte.weight: lr should be 0.004 and is 0.002" in said["below the peak"]
    assert ": lr should be" in said["one group"]
    assert "transformer.h.0.ln_1.weight (and 1 more layer): eps should be 2.5e-08 and is 0.001" in said["eps"]
    assert (
        "transformer.h.0.attn.c_attn.weight (and 1 more layer): weight decay should be 0.4 and is 0.1"
        in said["weight decay"]
    )
    assert (
        "transformer.h.0.attn.c_attn.weight (and 1 more layer): optimizer group should be one and is none"
        in said["lost"]
    )
    assert "gradient clipping should be 0.7 and is 1" in said["clipping"]


# ---- what is trained -----------------------------------------------------------------------------------------------


def _partly_frozen(recipe_path: str) -> tuple[list[str], bool]:
    model = build("gpt2", 4)
    frozen = model.get_parameter("transformer.wpe.weight")
    frozen.requires_grad_(False)
    engine = _engine(recipe_path, model, zero=2)
    before = frozen.detach().clone()
    train_engine(engine, "gpt2", range(2))
    return sorted(live_values(engine)), torch.equal(before, frozen.detach())


def test_frozen_parameters_are_left_out(plan: Plan, tmp_path: Path) -> None:
    trained, unchanged = run_ranks(_partly_frozen, 1, write(recipe_for("gpt2"), tmp_path))[0]
    assert trained == sorted(plan.by_name.keys() - {"transformer.wpe.weight"})
    assert unchanged


def test_groups_are_the_same_by_the_factory(plan: Plan) -> None:
    model = build("gpt2", 4)
    groups = mup_megatron.deepspeed.param_groups(model, plan)
    assert [len(group["params"]) for group in groups] == [2, 18, 8]
    torch.optim.AdamW(groups)
    ratios = mup_megatron.deepspeed.param_groups(model, plan, form=Form.RATIO)
    assert [(group["lr_mult"], group["wd_mult"]) for group in ratios] == [(1.0, 1.0), (1.0, 0.0), (0.25, 4.0)]
    head = torch.nn.ModuleDict({"transformer": torch.nn.ModuleDict({"wte": torch.nn.Embedding(48, 128)})})
    padded = mup_megatron.deepspeed.param_groups(head, plan, pad=True)
    assert [group["name"] for group in padded] == [group["name"] for group in groups]
    assert [len(group["params"]) for group in padded] == [1, 1, 1]
    assert len(mup_megatron.deepspeed.param_groups(head, plan)) == 1
