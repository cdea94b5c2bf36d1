"""Checkpoints of an engine with a plan: of its own recipe, and with the plan's groups in place after a load."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mup_megatron.checkpoint_recipe import write_sidecar
from mup_megatron.collectives import raising_together
from mup_megatron.deepspeed import checkpoints, no_entry
from mup_megatron.deepspeed.names import computed_by
from mup_megatron.deepspeed.planning import plan_of_entry
from mup_megatron.deepspeed.remarks import say
from mup_megatron.deepspeed.run import PEAK, EngineRun, run_of, verify
from mup_megatron.errors import InputError
from mup_megatron.modules.groups import Group, members

_OF_THE_STEP = ("params", "lr", "step")
"""Keys of a group that change from step to step, and are the checkpoint's after a load."""


@contextmanager
def around_load(engine: Any, load_dir: str, tag: str | None, *, optimizer: bool) -> Iterator[None]:
    """Encloses the loading of a checkpoint: what the plan gave the groups is there afterwards. Collective.

    Args:
        engine: DeepSpeed's.
        load_dir: as in `load_checkpoint`.
        tag: as in `load_checkpoint`.
        optimizer: the optimizer's state is loaded, not the weights alone.

    Raises:
        InputError: the checkpoint is of another recipe.
    """
    from mup_megatron.deepspeed import schedulers

    run = run_of(engine)
    if run is None:
        no_entry.require_same_plan(engine, load_dir, tag)
        yield
        return
    with raising_together():
        found = checkpoints.recipe_of_checkpoint(load_dir, tag, universal=engine.load_universal_checkpoint())
        if found is not None:
            checkpoints.require_same(found, run.recipe, accept=run.entry.accept_recipe_change, optimizer=optimizer)
            if optimizer:
                _require_same_groups(engine, run, found)
    groups = engine.optimizer.param_groups
    before = [{key: value for key, value in group.items() if key not in _OF_THE_STEP} for group in groups]
    held = schedulers.held_learning_rates(engine.lr_scheduler)
    yield
    same = found is None or found.recipe is None or found.recipe.fingerprint == run.recipe.fingerprint
    reapply(engine.optimizer.param_groups, before, keep=("betas", "momentum") if same else ())
    _separate_steps(engine.optimizer)
    schedulers.restore_learning_rates(held)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()
    verify(engine, run)


def _require_same_groups(engine: Any, run: EngineRun, found: checkpoints.CheckpointRecipe) -> None:
    if found.recipe is None or found.recipe.fingerprint == run.recipe.fingerprint:
        return
    before = plan_of_entry(engine, found.recipe, run.entry)
    if tuple(members(before).items()) != tuple(members(run.plan).items()):
        raise InputError(
            f"{found.folder}: under its recipe the parameters fall into other groups than under this run's, so the "
            "optimizer's state does not fit. Take the weights alone with load_module_only=True."
        )


def reapply(groups: Sequence[Group], before: Sequence[Mapping[str, Any]], *, keep: Sequence[str] = ()) -> None:
    """Gives groups back what they had before a load, and the learning rate of where the checkpoint's schedule stood.

    DeepSpeed puts the checkpoint's groups over them: by their place, or from a universal checkpoint under ZeRO-3 group
    0 over all of them.

    Args:
        groups: after the load.
        before: the same groups before it.
        keep: keys that are the checkpoint's: what a schedule may drive beside the learning rate.
    """
    first = groups[0]
    factor = first["lr"] / first[PEAK]
    for group, own in zip(groups, before, strict=True):
        if (group["name"], group[PEAK]) != (own["name"], own[PEAK]):
            group["lr"] = own[PEAK] * factor
        group.update({key: value for key, value in own.items() if key not in keep})


def _separate_steps(optimizer: Any) -> None:
    """Gives each group a count of steps of its own.

    A universal load under ZeRO-3 gives all of them one tensor, which torch's optimizers then advance once for each
    group.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def before_save(engine: Any, client_state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the client state that a checkpoint gets: the user's, with the recipe in it."""
    run = run_of(engine)
    if run is None:
        return dict(client_state or {})
    return dict(client_state or {}) | checkpoints.client_state(run.recipe, computed_by(engine.module))


def after_save(engine: Any, save_dir: str, tag: str | None) -> None:
    """Puts the recipe beside a checkpoint that was written, for people."""
    run = run_of(engine)
    if run is None or engine.global_rank != 0:
        return
    folder = Path(save_dir) / (f"global_step{engine.global_steps}" if tag is None else str(tag))
    problem = write_sidecar(folder, run.recipe)
    if problem is not None:
        say(f"warning: {problem} The recipe is in the checkpoint itself all the same.")
