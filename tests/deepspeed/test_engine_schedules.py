"""Schedulers on a live engine: every group is at its peak times the schedule at every step, or the run is stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ds_models import batch, build, ds_config, part, recipe_for, write
from support.ds_ranks import run_ranks

import mup_megatron.deepspeed  # noqa: F401  the ranks import this module
from mup_megatron.errors import InputError

STEPS = 8
WARMUP = {"warmup_num_steps": 3, "warmup_type": "linear"}
KEPT: dict[str, dict[str, Any]] = {
    "WarmupLR": {"type": "WarmupLR", "params": {**WARMUP, "warmup_min_lr": 0.001, "warmup_max_lr": 0.004}},
    "WarmupDecayLR": {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": STEPS}},
    "WarmupCosineLR": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 3, "total_num_steps": STEPS, "cos_min_ratio": 0.1},
    },
    "OneCycle": {
        "type": "OneCycle",
        "params": {
            "cycle_min_lr": 0.0004,
            "cycle_max_lr": 0.004,
            "cycle_first_step_size": 3,
            "cycle_momentum": False,
        },
    },
}
"""Entries as somebody would write them: one number for all groups."""


def _train(engine: Any, steps: range) -> list[list[float]]:
    """The groups' learning rates at each step."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rates = []
    for step in steps:
        rates.append([float(group["lr"]) for group in engine.optimizer.param_groups])
        engine.backward(engine(**part(batch("gpt2", step), rank, size)).loss)
        engine.step()
    return rates


def _rates(recipe_path: str, zero: int) -> dict[str, Any]:
    import deepspeed

    found = {}
    for name, entry in KEPT.items():
        content = ds_config(zero, world_size=2, scheduler=entry) | {"mup": {"recipe": recipe_path}}
        engine, *_ = deepspeed.initialize(model=build("gpt2", 4), config=content)
        found[name] = _train(engine, range(STEPS))
        engine.destroy()
    plain = ds_config(zero, world_size=2, scheduler=KEPT["WarmupDecayLR"])
    plain["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    from mup_megatron.deepspeed import param_groups
    from mup_megatron.huggingface import plan_for
    from mup_megatron.recipe import load_recipe

    model = build("gpt2", 4)
    groups = param_groups(model, plan_for(model, load_recipe(Path(recipe_path))))
    found["peaks"] = [group["lr"] for group in groups]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=plain)
    found["plain"] = _train(engine, range(STEPS))
    return found


@pytest.fixture(scope="module", params=[1, 3])
def rates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write(recipe_for("gpt2"), tmp_path_factory.mktemp("recipe"))
    return run_ranks(_rates, 2, path, request.param)[0]


def test_plain_deepspeed_gives_all_groups_one_rate(rates: dict[str, Any]) -> None:
    """The failure that this is about, in DeepSpeed itself: WarmupDecayLR over the plan's groups."""
    assert len(set(rates["peaks"])) > 1
    assert all(len(set(of_step)) == 1 for of_step in rates["plain"][1:])


@pytest.mark.parametrize("name", KEPT)
def test_every_group_is_at_its_peak_times_the_schedule(name: str, rates: dict[str, Any]) -> None:
    factors = []
    for of_step in rates[name]:
        of_groups = [lr / peak for lr, peak in zip(of_step, rates["peaks"], strict=True)]
        assert of_groups == pytest.approx([of_groups[0]] * len(of_groups), rel=1e-6)
        factors.append(of_groups[0])
    assert max(factors) == pytest.approx(1.0)
    assert len({round(factor, 9) for factor in factors}) > 2


# ---- what happens during the run -----------------------------------------------------------------------------------


def _stopped(recipe_path: str) -> dict[str, list[str]]:
    """What each rank says when something changes the groups between two steps."""
    import deepspeed

    def one_rate(engine: Any) -> None:
        engine.optimizer.set_lr(0.002)

    def one_group(engine: Any) -> None:
        engine.optimizer.param_groups[1]["lr"] *= 2

    def decay(engine: Any) -> None:
        engine.optimizer.param_groups[1]["weight_decay"] = 0.3

    def eps(engine: Any) -> None:
        engine.optimizer.param_groups[0]["eps"] = 1e-3

    def all_alike(engine: Any) -> None:
        for group in engine.optimizer.param_groups:
            group["lr"] /= 4

    found = {}
    for guard in (True, False):
        for change in (one_rate, one_group, decay, eps, all_alike):
            content = ds_config(2, world_size=2) | {"mup": {"recipe": recipe_path, "guard": guard}}
            engine, *_ = deepspeed.initialize(model=build("gpt2", 2), config=content)
            _train(engine, range(1))
            change(engine)
            try:
                _train(engine, range(1, 2))
                message = ""
            except InputError as error:
                message = str(error)
            everywhere = [""] * 2
            torch.distributed.all_gather_object(everywhere, message)
            found[f"{change.__name__}{'' if guard else ', no guard'}"] = everywhere
            engine.destroy()
    return found


def test_a_change_during_the_run_stops_it_on_every_rank(tmp_path: Path) -> None:
    found = run_ranks(_stopped, 2, write(recipe_for("gpt2"), tmp_path))[0]
    assert all(first == second for first, second in found.values())
    said = {name: first for name, (first, _) in found.items()}
    assert "One learning rate was written into every group" in said["one_rate"]
    assert "param_groups[1]" in said["one_group"]
    assert "weight_decay of the group" in said["decay"]
    assert "eps of the group" in said["eps"]
    assert said["all_alike"] == ""
    assert {said[name] for name in said if name.endswith("no guard")} == {""}
