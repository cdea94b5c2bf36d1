"""The DeepSpeed engines of a check: the user's configuration, for runs as short as a check's."""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed, nn

from mup_megatron.check.family.stress import FLOOR
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.optimizers import require_one_optimizer
from mup_megatron.check.subjects.scripts import Task
from mup_megatron.errors import InputError
from mup_megatron.json_io import read_json
from mup_megatron.recipe import Recipe, save_recipe
from mup_megatron.theory import Plan
from mup_megatron.training.ranks import backend, process_group
from mup_megatron.validation import brief

PRECISIONS = ("fp16", "bf16", "amp", "data_types")
_SHORT = {"total_num_steps": 1.0, "warmup_num_steps": 0.25, "cycle_first_step_size": 0.5, "cycle_second_step_size": 0.5}
"""Keys of DeepSpeed's schedulers that are numbers of steps → their part of a run of the check."""
_RATES = ("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr")


def fitting_configuration(path: Path, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Returns the content of a DeepSpeed configuration, which has to fit the recipe as it is.

    Raises:
        InputError: it is no JSON object, has no "mup" entry, or says something else than the recipe; or the recipe
            needs several optimizers.
    """
    from mup_megatron.deepspeed import entry
    from mup_megatron.deepspeed.config import require_fitting_scheduler

    require_one_optimizer(recipe)
    content = read_json(path)
    typed = entry.configuration(content, source=str(path))
    assert isinstance(content, dict)
    if not entry.has_entry(content):
        raise InputError(
            f'{path}: no "{entry.KEY}" entry, so an engine would train without μP. Write "{entry.KEY}": '
            '{"recipe": "…"}; `mup-megatron ds-config` does.'
        )
    try:
        entry.entry_of(content)
        entry.require_supported(typed)
        entry.optimizer_params(typed.made_optimizer.type, typed.made_optimizer.params, recipe)
        entry.gradient_clipping(typed.gradient_clipping, recipe)
        require_fitting_scheduler(typed, plan)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return content


class Engines:
    """Makes the engine of each run, with the recipe of the check in place of the user's."""

    def __init__(self, content: Mapping[str, Any], folder: Path, recipe: Recipe) -> None:
        h = recipe.moved
        self._content, self._folder, self._lr = content, folder, h.lr
        self._floor = max(h.min_lr / h.lr, FLOOR)
        """Of the schedule, relative to its peak, where it has one: that of the recipe under stress."""

    def prepare(self, model: nn.Module, task: Task) -> Any:
        """Returns the engine of one run."""
        import deepspeed

        import mup_megatron.deepspeed  # noqa: F401  # takes its place in the engine

        path = self._folder / f"{task.recipe.fingerprint}.{os.environ.get('RANK', '0')}.recipe.yaml"
        save_recipe(task.recipe.settled(), path)  # of a check's batch, and not of the recipe's horizon
        try:
            engine, *_ = deepspeed.initialize(model=model, config=self._config(path, task))
        except InputError:
            raise
        except Exception as error:  # it validates its configuration by whatever its parts raise
            raise InputError(
                f"--deepspeed: DeepSpeed refuses the configuration ({brief(error, 200)}). Correct it."
            ) from error
        return engine

    def schedule(self, step: int, steps: int) -> float:
        """Returns what the configuration's scheduler makes of one learning rate."""
        from mup_megatron.deepspeed.schedulers import for_one_group

        scheduler = self._scheduler(steps, self._lr)
        if scheduler is None:
            return 1.0
        made = for_one_group(scheduler, self._lr)
        for _ in range(step):
            made.optimizer.step()
            made.step()
        return float(made.optimizer.param_groups[0]["lr"]) / self._lr

    def _scheduler(self, steps: int, lr: float) -> dict[str, Any] | None:
        own = self._content.get("scheduler")
        if not own:
            return None
        given = dict(own.get("params") or {})
        params = {key: value for key, value in given.items() if value != "auto"}
        for key in [key for key in _SHORT if key in given or (key == "total_num_steps" and "Decay" in own["type"])]:
            params[key] = max(1, round(_SHORT[key] * steps))
        if own["type"] == "WarmupCosineLR":
            params["cos_min_ratio"] = self._floor
        for key in [key for key in _RATES if isinstance(params.get(key), int | float)]:
            params[key] *= lr / self._lr
        return {"type": own["type"], "params": params}

    def _config(self, recipe: Path, task: Task) -> dict[str, Any]:
        size, ranks = levels.EARLY.batch_size, distributed.get_world_size()
        if size % ranks:
            raise InputError(
                f"{ranks} processes: a check's batch of {size} has to be shared out among them. Use fewer."
            )
        from mup_megatron.deepspeed import entry

        content = {key: value for key, value in copy.deepcopy(dict(self._content)).items() if key not in PRECISIONS}
        for key in ("gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu", "scheduler"):
            content.pop(key, None)
        optimizer = content["optimizer"]
        own = ("lr", "betas", "eps", "weight_decay", "momentum")
        optimizer["params"] = {k: v for k, v in dict(optimizer.get("params") or {}).items() if k not in own}
        scheduler = self._scheduler(task.steps, task.recipe.moved.lr)
        return {
            **content,
            **({} if scheduler is None else {"scheduler": scheduler}),
            "train_batch_size": size,
            "train_micro_batch_size_per_gpu": size // ranks,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 10**9,
            entry.KEY: {**content[entry.KEY], "recipe": str(recipe), "initialize": True, "target": None},
        }


@contextmanager
def process_group_of_deepspeed() -> Iterator[None]:
    """The process group of a run, which DeepSpeed finds, and what it wants to read of it in the environment."""
    with process_group(backend()):
        said = {k: v for k, v in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items() if k not in os.environ}
        os.environ.update(said)
        try:
            yield
        finally:
            for key in said:
                del os.environ[key]
