"""DeepSpeed's pipeline of two stages: as one process, for any split of the layers, without a hang."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ds_pipeline
from support.ds_models import write
from support.ds_pipeline import BLOCKS, HYPERPARAMETERS, TIED
from support.ds_ranks import run_ranks
from support.processes import RankFailure

import mup_megatron.deepspeed
from mup_megatron.deepspeed.guard import live_values
from mup_megatron.modules import apply_plan, param_groups, plan_for_module
from mup_megatron.modules.groups import members
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

STEPS = range(8)
SPLITS = range(1, BLOCKS + 2)


def _plan(recipe: Recipe, *, tied: bool) -> Plan:
    target = ds_pipeline.tied_target if tied else ds_pipeline.untied_target
    return plan_for_module(target, recipe, readout=TIED if tied else None)


def _entry(recipe_path: str, *, tied: bool) -> dict[str, Any]:
    target = f"support.ds_pipeline:{'tied' if tied else 'untied'}_target"
    return {"recipe": recipe_path, "target": target} | ({"readout": TIED} if tied else {})


def _train(engine: Any, steps: range) -> list[float]:
    return [engine.train_batch(ds_pipeline.micro_batches(step)).item() for step in steps]


def _pipelines(recipe_paths: dict[bool, str], cells: list[tuple[bool, int, int, bool]]) -> dict[Any, Any]:
    """(tied, zero, split, bf16) → losses, live values and groups of each stage."""
    import deepspeed

    found = {}
    for tied, zero, split, bf16 in cells:
        low = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}} if bf16 else {}
        content = ds_pipeline.config(zero, **low) | {"mup": _entry(recipe_paths[tied], tied=tied)}
        engine, *_ = deepspeed.initialize(model=ds_pipeline.stage(split, tied=tied), config=content)
        names = [group["name"] for group in engine.optimizer.param_groups]
        found[tied, zero, split, bf16] = _train(engine, STEPS), live_values(engine), names
        engine.destroy()
    return found


def _reference(plan: Plan | None, *, tied: bool) -> list[float]:
    model = ds_pipeline.drawn(4, tied=tied)
    h, groups = HYPERPARAMETERS, model.parameters()
    if plan is not None:
        # The tied readout is no layer, so the model multiplies itself.
        apply_plan(model, replace(plan, output_multiplier=1.0) if tied else plan)
        model.output_multiplier = plan.output_multiplier
        groups = param_groups(model.named_parameters(), plan)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(
        groups, lr=h["lr"], betas=(0.9, h["adam_beta2"]), eps=h["adam_eps"], weight_decay=h["weight_decay"]
    )
    losses = []
    for step in STEPS:
        optimizer.zero_grad()
        of_step = [ds_pipeline.loss_function(model(x), y) for x, y in ds_pipeline.micro_batches(step)]
        loss = torch.stack(of_step).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), h["clip_grad"])
        optimizer.step()
        losses.append(loss.item())
    return losses


RECIPES = {True: ds_pipeline.recipe_for(tied=True), False: ds_pipeline.recipe_for(tied=False)}
CELLS = [(tied, zero, split, False) for tied, zero, split in itertools.product((True, False), (0, 1), SPLITS)]
CELLS += [(True, 0, 2, True), (False, 1, 2, True)]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("recipes")
    paths = {tied: write(recipe, folder, f"{tied}.recipe.yaml") for tied, recipe in RECIPES.items()}
    return run_ranks(_pipelines, 2, paths, CELLS, collective_s=20)


@pytest.mark.parametrize("tied", [True, False])
def test_any_split_trains_as_one_process(tied: bool, pipelines: list[dict[Any, Any]]) -> None:
    plan = _plan(RECIPES[tied], tied=tied)
    wanted = _reference(plan, tied=tied)
    assert wanted != pytest.approx(_reference(None, tied=tied), rel=1e-2)
    for cell in CELLS:
        if cell[0] is not tied:
            continue
        bf16 = cell[3]
        losses, names = [stage[cell][0] for stage in pipelines], [stage[cell][2] for stage in pipelines]
        assert losses[0] == losses[1], cell
        assert losses[0] == pytest.approx(wanted, rel=1e-2 if bf16 else 2e-5), cell
        assert names[0] == names[1] == list(members(plan)), cell
        live = {name: own for stage in pipelines for name, own in stage[cell][1].items()}
        assert live.keys() == plan.by_name.keys()
        for name, own in live.items():
            assert (own.lr, own.weight_decay, own.eps) == (plan[name].lr, plan[name].weight_decay, plan[name].eps)


def _without_padding(recipe_path: str, pad: bool) -> list[float]:
    """Plain DeepSpeed on the plan's groups: the second stage holds the readout alone."""
    import deepspeed

    from mup_megatron.recipe import load_recipe

    model = ds_pipeline.stage(BLOCKS + 1, tied=False)
    plan = _plan(load_recipe(Path(recipe_path)), tied=False)
    groups = mup_megatron.deepspeed.param_groups(model, plan, pad=pad)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_pipeline.config(1))
    return _train(engine, range(2))


@pytest.mark.slow  # what DeepSpeed does without us
def test_stages_with_different_numbers_of_groups_hang_in_plain_deepspeed(tmp_path: Path) -> None:
    """The failure that this is about, and its cure. The collective that nobody joins gives up after some seconds."""
    path = write(RECIPES[False], tmp_path)
    with pytest.raises(RankFailure, match=r"Timed out|not finished"):
        run_ranks(_without_padding, 2, path, False, collective_s=5, timeout_s=15)
    padded = run_ranks(_without_padding, 2, path, True, collective_s=20)
    assert len(padded[0]) == 2
