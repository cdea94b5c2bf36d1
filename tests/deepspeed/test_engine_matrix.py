"""The entry alone makes an engine what the plan says: every ZeRO stage, offload, bf16, one and two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ds_models import HYPERPARAMETERS, build, ds_config, recipe_for, train_engine, train_torch, write
from support.ds_ranks import run_ranks

STEPS = range(8)
CELLS: dict[str, dict[str, Any]] = {
    "zero 0": {},
    "zero 1": {"zero": 1},
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
    "zero 2, optimizer offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "zero 3, optimizer and parameter offload": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        }
    },
    "zero 1, bf16": {"zero": 1, "bf16": {"enabled": True}},
    "zero 3, bf16": {"zero": 3, "bf16": {"enabled": True}},
}
FAMILIES = [(family, width) for family in ("gpt2", "llama", "bert", "resnet") for width in (2, 4)]
QUICK = [("gpt2", 4), ("llama", 2)]
SLOW = [case for case in FAMILIES if case not in QUICK]


def _engines(recipes: dict[str, str], cases: list[tuple[str, int]]) -> dict[Any, Any]:
    """(family, width, cell) → losses and live values."""
    import deepspeed

    import mup_megatron.deepspeed
    from mup_megatron.deepspeed.guard import live_values

    size = torch.distributed.get_world_size()
    found = {}
    for family, width in cases:
        for cell, changes in CELLS.items():
            config = ds_config(world_size=size, **changes) | {"mup": {"recipe": recipes[family]}}
            if family == "resnet" and config.pop(
                "bf16", None
            ):  # DeepSpeed leaves batch normalisation's buffers in fp32
                config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
            engine, *_ = deepspeed.initialize(model=build(family, width), config=config)
            losses = train_engine(engine, family, STEPS)
            found[family, width, cell] = losses, live_values(engine)
            assert mup_megatron.deepspeed.plan_of(engine) is not None
            engine.destroy()
    return found


def _reference(family: str, width: int, *, planned: bool) -> list[float]:
    from mup_megatron.huggingface import apply_plan, param_groups, plan_for

    model = build(family, width)
    h = HYPERPARAMETERS
    if planned:
        plan = plan_for(model, recipe_for(family))
        apply_plan(model, plan)
        groups: Any = param_groups(model.named_parameters(), plan)
    else:
        groups = model.parameters()
    optimizer = torch.optim.AdamW(
        groups, lr=h["lr"], betas=(0.9, h["adam_beta2"]), eps=h["adam_eps"], weight_decay=h["weight_decay"]
    )
    return train_torch(model, optimizer, family, STEPS, h["clip_grad"])


def _require_as_torch(cases: list[tuple[str, int]], world_size: int, folder: Path) -> None:
    from mup_megatron.huggingface import plan_for

    recipes = {family: write(recipe_for(family), folder, f"{family}.recipe.yaml") for family, _ in cases}
    found = run_ranks(_engines, world_size, recipes, cases)[0]
    wrong = []
    for family, width in cases:
        plan = plan_for(build(family, width), recipe_for(family))
        wanted, plain = (torch.tensor(_reference(family, width, planned=planned)) for planned in (True, False))
        assert ((wanted - plain).abs() / plain).max() > 1e-2
        for cell in CELLS:
            losses, live = found[family, width, cell]
            tolerance = 1e-2 if "bf16" in cell else 2e-5
            error = ((torch.tensor(losses) - wanted).abs() / wanted).max().item()
            print(f"{family} ×{width}, {world_size} processes, {cell}: {error:.1e}")
            if not error < tolerance:
                wrong.append((family, width, cell, error))
            values = {name: (own.lr, own.weight_decay, own.eps) for name, own in live.items()}
            assert values == {own.name: (own.lr, own.weight_decay, own.eps) for own in plan.entries}, cell
    assert not wrong


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_stage_trains_as_torch_with_the_plans_groups(world_size: int, tmp_path: Path) -> None:
    _require_as_torch(QUICK, world_size, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_family_trains_as_torch_with_the_plans_groups(world_size: int, tmp_path: Path) -> None:
    _require_as_torch(SLOW, world_size, tmp_path)
