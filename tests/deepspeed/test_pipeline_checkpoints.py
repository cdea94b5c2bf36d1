"""Checkpoints of a pipeline under ZeRO-1: regular and universal, with the entry and in plain DeepSpeed."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from support import ds_pipeline
from support.ds_models import write
from support.ds_pipeline import BLOCKS
from support.ds_ranks import run_ranks

import mup_megatron.deepspeed
from mup_megatron.deepspeed.guard import live_values
from mup_megatron.modules import plan_for_module
from mup_megatron.recipe import load_recipe

BEFORE, AFTER = range(3), range(3, 6)
SCHEDULE = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": 6, "cos_min_ratio": 0.1}}


def _engine(recipe_path: str, *, entry: bool, universal: bool) -> Any:
    """Of two stages; with the entry, or plain DeepSpeed with the plan's groups that a stage has."""
    import deepspeed

    content = ds_pipeline.config(1, scheduler=SCHEDULE, checkpoint={"load_universal": universal})
    stage, groups = ds_pipeline.stage(2, tied=False), None
    if entry:
        content["mup"] = {"recipe": recipe_path, "target": "support.ds_pipeline:untied_target"}
    else:
        plan = plan_for_module(ds_pipeline.untied_target, load_recipe(Path(recipe_path)))
        groups = mup_megatron.deepspeed.param_groups(stage, plan, pad=False)
    engine, *_ = deepspeed.initialize(model=stage, model_parameters=groups, config=content)
    return engine


def _train(engine: Any, steps: range) -> list[float]:
    return [engine.train_batch(ds_pipeline.micro_batches(step)).item() for step in steps]


def _saved(recipe_path: str, root: str) -> dict[bool, Any]:
    found = {}
    for entry in (True, False):
        engine = _engine(recipe_path, entry=entry, universal=False)
        _train(engine, BEFORE)
        engine.save_checkpoint(f"{root}/{entry}")
        found[entry] = live_values(engine), _train(engine, AFTER)
        engine.destroy()
    return found


def _convert(root: str) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    for entry in (True, False):
        main(
            Namespace(
                input_folder=f"{root}/{entry}/global_step3",
                output_folder=f"{root}/{entry}/global_step3_universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


def _loaded(recipe_path: str, root: str) -> dict[tuple[bool, bool], Any]:
    found = {}
    for entry in (True, False):
        for universal in (False, True):
            engine = _engine(recipe_path, entry=entry, universal=universal)
            engine.load_checkpoint(f"{root}/{entry}")
            found[entry, universal] = live_values(engine), _train(engine, AFTER)
            engine.destroy()
    return found


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """What went on without a break, and what was loaded, of each stage."""
    root = tmp_path_factory.mktemp("checkpoints")
    # The readout alone has another rate, so that the stages' groups differ.
    path = write(ds_pipeline.recipe_for(tied=False, **{f"_{BLOCKS + 1}": 3.0}), root)
    unbroken = run_ranks(_saved, 2, path, str(root), collective_s=20)
    run_ranks(_convert, 1, str(root))
    return unbroken, run_ranks(_loaded, 2, path, str(root), collective_s=20)


@pytest.mark.parametrize("universal", [False, True])
def test_a_load_keeps_the_plan_on_every_stage(universal: bool, stages: tuple[list[Any], list[Any]]) -> None:
    for unbroken, loaded in zip(*stages, strict=True):
        assert loaded[True, universal] == unbroken[True]


def test_plain_deepspeed_gives_later_stages_the_groups_of_the_first(stages: tuple[list[Any], list[Any]]) -> None:
    """The failure that this is about: a universal load applies the first stage's groups by their place."""
    unbroken, loaded = stages
    assert loaded[0][False, True][0] == unbroken[0][False][0]
    assert loaded[1][False, True][0] != unbroken[1][False][0]
    readout = f"{BLOCKS + 1}.weight"
    assert loaded[1][False, True][0][readout].lr != unbroken[1][False][0][readout].lr
