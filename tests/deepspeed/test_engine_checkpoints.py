"""Checkpoints: what the plan gave the groups survives every way of loading, and another recipe's are refused."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ds_models import build, ds_config, recipe_for, train_engine, write
from support.ds_ranks import run_ranks

import mup_megatron.deepspeed  # noqa: F401  the ranks import this module
from mup_megatron.deepspeed.guard import LiveValues, live_values
from mup_megatron.errors import InputError
from mup_megatron.recipe import load_recipe
from mup_megatron.theory import Plan

STAGES = (1, 2, 3)
BEFORE, AFTER = range(3), range(3, 6)
SCHEDULE = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": 6, "cos_min_ratio": 0.1}}
WIDTH = 4


def _engine(zero: int, recipe_path: str | None, *, universal: bool = False, **entry: Any) -> Any:
    """With the entry; or plain DeepSpeed, with the plan's groups made by hand, if there is no recipe."""
    import deepspeed

    from mup_megatron.deepspeed import param_groups
    from mup_megatron.huggingface import plan_for

    size = torch.distributed.get_world_size()
    content = ds_config(zero, world_size=size, scheduler=SCHEDULE, checkpoint={"load_universal": universal})
    model, groups = build("gpt2", WIDTH), None
    if recipe_path is None:
        groups = param_groups(model, plan_for(model, recipe_for("gpt2")))
        for group in groups:
            del group["name"]
    else:
        content["mup"] = {"recipe": recipe_path, **entry}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=content)
    return engine


def _saved(recipe_path: str, root: str) -> dict[Any, Any]:
    """Trains, saves and trains on at every stage, with the entry and in plain DeepSpeed."""
    found = {}
    for zero in STAGES:
        for name, path in (("mup", recipe_path), ("plain", None)):
            engine = _engine(zero, path)
            train_engine(engine, "gpt2", BEFORE)
            engine.save_checkpoint(f"{root}/{name}{zero}", client_state={"mine": 7})
            found[name, zero] = live_values(engine), train_engine(engine, "gpt2", AFTER), live_values(engine)
            engine.destroy()
    return found


def _convert(root: str) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    for zero in STAGES:
        for name in ("mup", "plain"):
            folder = f"{root}/{name}{zero}"
            tag = Path(f"{folder}/latest").read_text()
            settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
            main(
                Namespace(
                    input_folder=f"{folder}/{tag}",
                    output_folder=f"{folder}/{tag}_universal",
                    inject_missing_state=True,
                    **settings,
                )
            )


def _loaded(recipe_path: str, root: str, universal: bool, names: list[str]) -> dict[Any, Any]:
    found = {}
    for zero in STAGES:
        for name in names:
            engine = _engine(zero, recipe_path if name == "mup" else None, universal=universal)
            _, client_state = engine.load_checkpoint(f"{root}/{name}{zero}")
            assert client_state["mine"] == 7
            found[name, zero] = live_values(engine), train_engine(engine, "gpt2", AFTER), live_values(engine)
            engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[Any, Any]]:
    """(path of the recipe, folder of the checkpoints, what went on without a break)."""
    root = tmp_path_factory.mktemp("checkpoints")
    path = write(recipe_for("gpt2"), root)
    found = run_ranks(_saved, 2, path, str(root))[0]
    run_ranks(_convert, 1, str(root))
    return path, str(root), found


@pytest.fixture(scope="module")
def plan() -> Plan:
    from mup_megatron.huggingface import plan_for

    return plan_for(build("gpt2", WIDTH), recipe_for("gpt2"))


def _require_planned(live: dict[str, LiveValues], plan: Plan) -> float:
    """Where the schedule stands."""
    factors = {round(own.lr / plan[name].lr, 9) for name, own in live.items()}
    assert len(factors) == 1
    for name, own in live.items():
        assert (own.weight_decay, own.eps) == (plan[name].weight_decay, plan[name].eps)
    return factors.pop()


def test_a_regular_load_goes_on_bitwise(saved: tuple[str, str, dict[Any, Any]], plan: Plan) -> None:
    path, root, unbroken = saved
    found = run_ranks(_loaded, 2, path, root, False, ["mup"])[0]
    for zero in STAGES:
        assert found["mup", zero] == unbroken["mup", zero], zero
        assert 0 < _require_planned(found["mup", zero][0], plan) < 1
        assert (Path(root) / f"mup{zero}" / "global_step3" / "mup.recipe.yaml").exists()
    assert load_recipe(Path(root) / "mup1" / "global_step3" / "mup.recipe.yaml") == recipe_for("gpt2")


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_universal_load_keeps_the_plan(world_size: int, saved: tuple[str, str, dict[Any, Any]], plan: Plan) -> None:
    path, root, unbroken = saved
    found = run_ranks(_loaded, world_size, path, root, True, ["mup"])[0]
    for zero in STAGES:
        live, losses, last = found["mup", zero]
        assert live == unbroken["mup", zero][0], zero
        assert last == unbroken["mup", zero][2], zero
        _require_planned(live, plan)
        assert losses == pytest.approx(unbroken["mup", zero][1], rel=2e-6), zero


@pytest.mark.slow  # what DeepSpeed does without us
def test_plain_deepspeed_loses_the_groups_in_a_universal_load_at_zero_3(
    saved: tuple[str, str, dict[Any, Any]], plan: Plan
) -> None:
    """The failure that this is about: every group has the values of group 0."""
    path, root, unbroken = saved
    found = run_ranks(_loaded, 2, path, root, True, ["plain"])[0]
    _require_planned(unbroken["plain", 3][0], plan)
    live, losses, _ = found["plain", 3]
    assert len(set(live.values())) == 1 < len(set(unbroken["plain", 3][0].values()))
    assert losses != pytest.approx(unbroken["plain", 3][1], rel=1e-4)


# ---- another recipe ------------------------------------------------------------------------------------------------


def _edited(root: str, recipes: dict[str, str]) -> dict[str, Any]:
    """What happens to a checkpoint under another recipe, and under none."""
    found: dict[str, Any] = {}

    def attempt(name: str, engine: Any, folder: str, **how: Any) -> None:
        try:
            engine.load_checkpoint(f"{root}/{folder}", **how)
            found[name] = live_values(engine)
        except InputError as error:
            found[name] = str(error)
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, found[name])
        assert everywhere[0] == everywhere[1]
        engine.destroy()

    for zero in (1, 3):
        other = recipes["other"]
        attempt(f"{zero} other", _engine(zero, other), f"mup{zero}")
        attempt(f"{zero} other, universal", _engine(zero, other, universal=True), f"mup{zero}")
        attempt(f"{zero} accepted", _engine(zero, other, accept_recipe_change=True), f"mup{zero}")
        accepting = _engine(zero, other, universal=True, accept_recipe_change=True)
        attempt(f"{zero} accepted, universal", accepting, f"mup{zero}")
        attempt(f"{zero} other groups", _engine(zero, recipes["groups"], accept_recipe_change=True), f"mup{zero}")
        attempt(f"{zero} of none", _engine(zero, recipes["same"]), f"plain{zero}")
        attempt(f"{zero} of none, weights", _engine(zero, recipes["same"]), f"plain{zero}", load_module_only=True)
        accepting = _engine(zero, recipes["same"], accept_recipe_change=True)
        attempt(f"{zero} of none, accepted", accepting, f"plain{zero}")
        accepting = _engine(zero, recipes["same"], accept_recipe_change=True)
        attempt(f"{zero} of none, weights, accepted", accepting, f"plain{zero}", load_module_only=True)
        attempt(f"{zero} other, weights", _engine(zero, other), f"mup{zero}", load_module_only=True)
        attempt(f"{zero} no entry", _engine(zero, None), f"mup{zero}")
        attempt(f"{zero} nothing there", _engine(zero, recipes["same"]), "nothing")
    return found


def test_another_recipe_is_refused_or_takes_over(
    saved: tuple[str, str, dict[Any, Any]], plan: Plan, tmp_path: Path
) -> None:
    from mup_megatron.huggingface import plan_for

    path, root, unbroken = saved
    other = recipe_for("gpt2", lr=0.001, adam_eps=3e-7, clip_grad=0.9)
    uneven = recipe_for("gpt2").model_dump(mode="json")
    uneven["per_parameter"] = [{"match": "transformer.wpe.weight", "lr_mult": 2.0}]
    paths = {
        "same": path,
        "other": write(other, tmp_path, "other.yaml"),
        "groups": write(type(other).model_validate(uneven), tmp_path, "groups.yaml"),
    }
    found = run_ranks(_edited, 2, root, paths)[0]
    other_plan = plan_for(build("gpt2", WIDTH), other)
    for zero in (1, 3):
        for name in ("other", "other, universal", "other, weights"):
            assert "lr 0.004 there and 0.001 here" in found[f"{zero} {name}"]
            assert '"accept_recipe_change": true' in found[f"{zero} {name}"]
        factor = _require_planned(unbroken["mup", zero][0], plan)
        for name in ("accepted", "accepted, universal"):
            assert _require_planned(found[f"{zero} {name}"], other_plan) == pytest.approx(factor)
        assert "fall into other groups" in found[f"{zero} other groups"]
        for name in ("of none", "of none, weights", "of none, accepted"):
            assert "was trained without a recipe" in found[f"{zero} {name}"]
            assert '"accept_recipe_change": true' in found[f"{zero} {name}"]
        _require_planned(found[f"{zero} of none, weights, accepted"], plan)
        assert "was trained with a recipe, and without it" in found[f"{zero} no entry"]
        _require_planned(found[f"{zero} nothing there"], plan)


def _with_a_schedule_of_the_script(recipes: list[str], folder: str) -> list[list[dict[str, float]]]:
    """Name → learning rate after each step of a run, and of one with another recipe that goes on from its third."""
    import deepspeed

    def engine(recipe_path: str) -> Any:
        content = ds_config(1) | {"mup": {"recipe": recipe_path, "accept_recipe_change": True}}
        return deepspeed.initialize(model=build("gpt2", WIDTH), config=content, lr_scheduler=_in_two_parts)[0]

    def trained(engine: Any, steps: range) -> list[dict[str, float]]:
        found = []
        for step in steps:
            train_engine(engine, "gpt2", [step])
            found.append({name: own.lr for name, own in live_values(engine).items()})
        return found

    first, second = map(engine, recipes)
    trained(first, BEFORE)
    first.save_checkpoint(folder)
    second.load_checkpoint(folder)
    return [trained(own, AFTER) for own in (first, second)]


def _in_two_parts(optimizer: Any) -> Any:
    from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR

    parts = [LinearLR(optimizer, total_iters=2), LambdaLR(optimizer, _decay)]
    return SequentialLR(optimizer, parts, milestones=[2])


def _decay(step: int) -> float:
    return 0.9**step


def test_another_recipe_takes_over_a_schedule_of_the_script(tmp_path: Path) -> None:
    recipes = [write(recipe_for("gpt2", lr=lr), tmp_path, f"{lr}.yaml") for lr in (0.004, 0.001)]
    first, second = run_ranks(_with_a_schedule_of_the_script, 1, recipes, str(tmp_path / "ck"))[0]
    for old, new in zip(first, second, strict=True):
        assert {name: 4 * lr for name, lr in new.items()} == pytest.approx(old)


# ---- an engine without an entry ------------------------------------------------------------------------------------


def _plain_loads(root: str, recipe_path: str) -> dict[str, str]:
    """What an engine without an entry says to checkpoints that DeepSpeed itself takes, or refuses in its own words."""
    from mup_megatron.modules.applied import applied_plan

    engine = _engine(0, None)
    engine.save_checkpoint(f"{root}/own", tag="t", client_state={"mup": {"mine": 1}})
    states = Path(root, "own", "t", "mp_rank_00_model_states.pt")
    content = torch.load(states, weights_only=False)
    torch.save(content, states, _use_new_zipfile_serialization=False)
    found = {}

    def attempt(name: str, engine: Any, folder: str) -> None:
        try:
            _, state = engine.load_checkpoint(f"{root}/{folder}", tag="t")
            found[name] = str(state.get("mup"))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    attempt("not a zip", engine, "own")
    attempt("not a zip, with an entry", _engine(0, recipe_path, accept_recipe_change=True), "own")
    planned = _engine(0, recipe_path)
    planned.save_checkpoint(f"{root}/planned", tag="t")
    attempt("of a recipe", engine, "planned")
    assert applied_plan(planned.module) is not None
    states.write_bytes(b"nothing")
    attempt("broken", engine, "own")
    attempt("broken, with an entry", _engine(0, recipe_path), "own")
    return found


def test_without_an_entry_deepspeed_decides_what_it_can_read(tmp_path: Path) -> None:
    found = run_ranks(_plain_loads, 1, str(tmp_path), write(recipe_for("gpt2"), tmp_path))[0]
    assert found["not a zip"] == "{'mine': 1}"
    assert "was trained without a recipe" in found["not a zip, with an entry"]
    assert "was trained with a recipe, and without it" in found["of a recipe"]
    assert not found["broken"].startswith("InputError")
    assert re.match("InputError: .*mp_rank_00_model_states.pt: .*damaged", found["broken, with an entry"])


def _edited_plainly(root: str) -> dict[str, LiveValues]:
    engine = _engine(2, None)
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = 0.5
    engine.load_checkpoint(f"{root}/plain2")
    return live_values(engine)


@pytest.mark.slow  # what DeepSpeed does without us
def test_plain_deepspeed_restores_saved_values_over_edited_ones(
    saved: tuple[str, str, dict[Any, Any]], plan: Plan
) -> None:
    """The failure that this is about: what was changed for the second part of a run is taken back in silence."""
    _, root, _ = saved
    _require_planned(run_ranks(_edited_plainly, 2, root)[0], plan)
