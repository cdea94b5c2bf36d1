"""A checkpoint of the fork carries its recipe; another one is refused, and a load does not change the plan's groups."""

import argparse
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fork_models import GPTModel, OptimizerParamScheduler, get_param_groups
from support.fork_runs import built, parsed
from support.shapes import gpt, recipe_for

from mup_megatron import megatron_deepspeed
from mup_megatron.errors import InputError
from mup_megatron.megatron_deepspeed import groups, run
from mup_megatron.recipe import PerParameter, Recipe

RECIPE = recipe_for(gpt(1))


def training(recipe: Recipe, folder: Path, *words: str) -> tuple[argparse.Namespace, Any, Any]:
    """Arguments, optimizer and scheduler of a run that has come to its first step."""
    model, args = built(GPTModel, gpt(2), recipe, folder, *words)
    made = megatron_deepspeed.param_groups([model], get_param_groups([model]), torch.optim.AdamW)
    optimizer = torch.optim.AdamW(made, lr=args.lr, weight_decay=args.weight_decay, eps=args.adam_eps)
    scheduler = OptimizerParamScheduler(
        optimizer, max_lr=args.lr, min_lr=args.min_lr, weight_decay=args.weight_decay, steps=20, warmup=5
    )
    return args, optimizer, scheduler


def saved(args: argparse.Namespace, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the fork saves: its arguments, pickled, and the optimizer with its groups."""
    state: dict[str, Any] = pickle.loads(pickle.dumps({"args": args, "iteration": 3}))
    return state, copy.deepcopy(optimizer.state_dict())


def lrs(optimizer: Any) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def test_a_run_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    args, optimizer, scheduler = training(RECIPE, tmp_path)
    scheduler.step(3, 0)
    state, saved_optimizer = saved(args, optimizer)
    _, again, scheduler_again = training(RECIPE, tmp_path)
    again.load_state_dict(saved_optimizer)
    scheduler_again.step(3, 0)
    megatron_deepspeed.require_same_recipe(state, again, scheduler_again)
    assert [dict(g, params=[]) for g in again.param_groups] == [dict(g, params=[]) for g in optimizer.param_groups]


def test_another_recipes_checkpoint_is_refused(tmp_path: Path) -> None:
    state, _ = saved(*training(RECIPE, tmp_path)[:2])
    _, optimizer, scheduler = training(recipe_for(gpt(1), lr=0.1), tmp_path)
    with pytest.raises(InputError, match=r"(?s)another recipe: its fingerprint is .*hyperparameters.lr: 0.003 there"):
        megatron_deepspeed.require_same_recipe(state, optimizer, scheduler)


def test_an_accepted_change_takes_effect_at_once(tmp_path: Path) -> None:
    args, optimizer, scheduler = training(RECIPE, tmp_path)
    scheduler.step(3, 0)
    state, saved_optimizer = saved(args, optimizer)
    _, now, scheduler_now = training(recipe_for(gpt(1), adam_eps=1e-6), tmp_path, "--mup-accept-recipe-change")
    expected = [{key: g[key] for key in ("name", "lr_mult", "wd_mult", "eps")} for g in now.param_groups]
    now.load_state_dict(saved_optimizer)
    scheduler_now.step(3, 0)  # DeepSpeed loads the scheduler last, on groups that hold what was saved
    megatron_deepspeed.require_same_recipe(state, now, scheduler_now)
    assert [{key: g[key] for key in ("name", "lr_mult", "wd_mult", "eps")} for g in now.param_groups] == expected
    assert lrs(now) == [scheduler_now.get_lr() * g["lr_mult"] for g in now.param_groups]
    assert {g["eps"] for g in now.param_groups} != {g["eps"] for g in optimizer.param_groups}


def test_a_change_of_ratios_reaches_the_learning_rates_before_the_first_step(tmp_path: Path) -> None:
    def recipe(lr_mult: float) -> Recipe:
        own = (PerParameter(match="*.linear_fc1.weight", lr_mult=lr_mult),)
        return RECIPE.model_copy(update={"per_parameter": own})

    args, optimizer, scheduler = training(recipe(1.5), tmp_path)
    scheduler.step(3, 0)
    state, saved_optimizer = saved(args, optimizer)
    _, now, scheduler_now = training(recipe(3.0), tmp_path, "--mup-accept-recipe-change")
    now.load_state_dict(saved_optimizer)
    scheduler_now.step(3, 0)
    before = lrs(now)
    megatron_deepspeed.require_same_recipe(state, now, scheduler_now)
    changed = [b / a for a, b in zip(before, lrs(now), strict=True)]
    assert sorted(changed)[-1] == pytest.approx(2.0)
    assert sorted(changed)[:-1] == pytest.approx([1.0] * (len(changed) - 1))


def test_a_change_that_tells_other_parameters_apart_is_refused(tmp_path: Path) -> None:
    state, _ = saved(*training(RECIPE, tmp_path)[:2])
    other = RECIPE.model_copy(update={"per_parameter": (PerParameter(match="*.linear_fc1.weight", lr_mult=1.5),)})
    _, optimizer, scheduler = training(other, tmp_path, "--mup-accept-recipe-change")
    with pytest.raises(InputError, match="the two recipes tell other parameters apart"):
        megatron_deepspeed.require_same_recipe(state, optimizer, scheduler)
    # Weights alone can be taken from it.
    _, optimizer, scheduler = training(other, tmp_path, "--mup-accept-recipe-change", "--finetune")
    megatron_deepspeed.require_same_recipe(state, optimizer, scheduler)


def test_a_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    plain = {"args": parsed(gpt(2))}
    _, optimizer, scheduler = training(RECIPE, tmp_path)
    with pytest.raises(InputError, match="the checkpoint was trained without a recipe"):
        megatron_deepspeed.require_same_recipe(plain, optimizer, scheduler)


def test_groups_that_are_not_the_plans_are_refused(tmp_path: Path) -> None:
    plain = {"args": parsed(gpt(2))}
    _, optimizer, scheduler = training(RECIPE, tmp_path, "--mup-accept-recipe-change")
    optimizer.param_groups[0]["name"] = "wd_no_scale_lr"
    with pytest.raises(InputError, match="the optimizer has a group 'wd_no_scale_lr' now"):
        megatron_deepspeed.require_same_recipe(plain, optimizer, scheduler)


def test_a_recipes_checkpoint_is_not_loaded_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, _ = saved(*training(RECIPE, tmp_path)[:2])
    monkeypatch.setattr(run, "_run", None)
    with pytest.raises(InputError, match=rf"fingerprint {RECIPE.fingerprint}\), and without it .* Give --mup-recipe"):
        megatron_deepspeed.require_same_recipe(state, None, None)


def test_without_recipes_nothing_is_looked_at() -> None:
    megatron_deepspeed.require_same_recipe({"args": parsed(gpt(2))}, None, None)
    megatron_deepspeed.require_same_recipe({}, None, None)


def test_the_groups_of_a_wrapped_optimizer_are_restored_in_place(tmp_path: Path) -> None:
    args, optimizer, scheduler = training(RECIPE, tmp_path)
    state, _ = saved(args, optimizer)
    for group in optimizer.param_groups:
        group.update(lr_mult=9.0, wd_mult=9.0, eps=9.0)
    megatron_deepspeed.require_same_recipe(state, optimizer, scheduler)
    plan = RECIPE.plan(gpt(2))
    for group in optimizer.param_groups:
        values = groups.values(plan)[group["name"]]
        assert group["lr_mult"] == values.lr / plan.lr
        assert group["eps"] == values.eps
