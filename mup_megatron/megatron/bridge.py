"""Megatron-Bridge: a recipe into its configuration, and the live run against the plan. Holds no theory.

    pretrain(config, forward_step, callbacks=[use_recipe(config, recipe, target)])

Imports nothing of Bridge: what differs from Megatron-LM is which places a configuration offers, and what is put there
has the methods that Bridge calls. All of these places are in this file.
"""

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.collectives import raise_together
from mup_megatron.errors import InputError
from mup_megatron.megatron import guard
from mup_megatron.megatron.model import apply_plan, configure
from mup_megatron.megatron.optimizer import config_overrides
from mup_megatron.megatron.pretrain import flags, run_values
from mup_megatron.megatron.versions import fsdp_problem
from mup_megatron.messages import say
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

__all__ = ["Guard", "use_recipe"]


# ---- its words -----------------------------------------------------------------------------------------------------

_INSTEAD = {
    "Build the optimizer with the plan's config_overrides": "Leave optimizer_config_override_provider to use_recipe",
    ", or pass initialize=False for weights that are loaded": (
        "; weights to go on from belong into checkpoint.pretrained_checkpoint"
    ),
}
"""What others advise who build a model and an optimizer themselves → what it is in a container."""


@contextmanager
def _in_its_words() -> Iterator[None]:
    """Encloses what is called in a run of Bridge: an InputError speaks of its fields, where others speak of flags."""
    try:
        yield
    except InputError as error:
        error.args = (_reworded(str(error)),)
        raise


def _reworded(text: str) -> str:
    for others, here in _INSTEAD.items():
        text = text.replace(others, here)
    text = re.sub(r"--no-([a-z][\w-]*)", lambda flag: f"{_field(flag[1])}=False", text)
    return re.sub(r"--([a-z][\w-]*)", lambda flag: _field(flag[1]), text)


def _field(flag: str) -> str:
    return flag.replace("-", "_")


# ---- a run ---------------------------------------------------------------------------------------------------------


@_in_its_words()
def use_recipe(config: Any, recipe: Recipe, target: ModelFile) -> "Guard":
    """Prepares a run of Megatron-Bridge for a recipe, and returns the callback that compares the run with it.

    Writes what the recipe says of the run into the configuration, where it wins over what is there, sets the attention
    scale, and registers what makes model and optimizer what the plan says. Call it once, on the last state of the
    configuration, before `pretrain`. A configuration that is refused is left as it was.

    Args:
        config: a `ConfigContainer`, whose model is a provider or a model configuration; changed in place.
        recipe: what was tuned, and at which base.
        target: the model that the container trains; one that differs is refused when it is built.

    Raises:
        InputError: the container asks for what no plan can be combined with, is not the run that the recipe is for, or
            is of a release without a field that the recipe needs.
    """
    plan = recipe.plan(target)
    _refuse(config)
    settings = _settings(config, recipe)
    configure(_transformer(config.model), plan)  # refuses before it changes anything
    _write(config, recipe, settings)
    _register(config.model, partial(_applied, plan=plan))
    config.optimizer_config_override_provider = Overrides(plan)
    return Guard(recipe, plan)


_BEGAN_AT = f"{__name__}.began_at"
"""Where a run keeps the step that it began at, or went on from, for its callbacks."""


@dataclass(frozen=True, slots=True)
class Guard:
    """The callback that compares the live run with the plan: before the first step, after it, and then more rarely.

    Its methods are called by Bridge, on all ranks, with the state, model, optimizer and scheduler of the run. What it
    remembers of a run is kept with the run: one object may be the callback of several.
    """

    recipe: Recipe
    plan: Plan

    @_in_its_words()
    def on_train_start(self, context: Any) -> None:
        """Compares the run before its first step. Raises InputError, the same on every rank, unless it is as planned.

        Weights are compared with a fresh draw, so not where a checkpoint was resumed, and not in a run with
        `checkpoint.finetune` or `checkpoint.pretrained_checkpoint`.
        """
        context.user_state[_BEGAN_AT] = context.state.train_state.step
        loaded = context.state.cfg.checkpoint
        fresh = context.state.train_state.step == 0 and not loaded.finetune and loaded.pretrained_checkpoint is None
        self._require(context, weights=fresh)
        values = _values(context.state.cfg)
        raise_together(run_values.problems(self.recipe, values, context.optimizer, context.scheduler))

    @_in_its_words()
    def on_train_step_end(self, context: Any) -> None:
        """Compares the run again after 1, 2, 4, 8 and so on of its own steps. Raises InputError as before the first.

        A resumed run counts anew.
        """
        if guard.is_due(context.state.train_state.step - context.user_state[_BEGAN_AT]):
            self._require(context, weights=False)

    def _require(self, context: Any, *, weights: bool) -> None:
        guard.require_as_planned(context.model, self.plan, context.optimizer, context.scheduler, weights=weights)


@dataclass(frozen=True, slots=True)
class Overrides:
    """Gives a container the overrides of the optimizer's groups, in place of its stock provider."""

    plan: Plan | None = None
    """None in a configuration that was read back: a plan is not written into it."""

    @_in_its_words()
    def build_config_overrides(self, context: Any) -> dict[Any, dict[str, Any]]:
        """Returns the `config_overrides` of `get_megatron_optimizer`. Collective. Raises InputError without a plan."""
        if self.plan is None:
            raise InputError(
                "This configuration was saved by a run with a plan, and does not contain it. Call use_recipe on it "
                "before pretrain."
            )
        chunks = context.model if isinstance(context.model, list) else [context.model]
        return config_overrides(chunks, self.plan, context.optimizer_config)

    def to_cfg_dict(self) -> dict[str, str]:
        """Returns what is written of it into a saved configuration: its class alone."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"}


@_in_its_words()
def _applied(models: list[torch.nn.Module], *, plan: Plan) -> list[torch.nn.Module]:
    """Returns the model that Bridge has built, made what the plan says. Collective."""
    apply_plan(models, plan)
    return models


# ---- the places in a configuration ---------------------------------------------------------------------------------

_READ = (
    "model.seq_length",
    "train.train_iters",
    "train.train_samples",
    "train.global_batch_size",
    "optimizer",
    "optimizer_config_override_provider",
    "scheduler",
    "dist",
    "checkpoint.finetune",
    "checkpoint.pretrained_checkpoint",
)
"""What is read of a container, or put into it, whatever the recipe says."""


def _has(config: Any, place: str) -> bool:
    section, _, field = place.partition(".")
    return hasattr(config, section) and (not field or hasattr(getattr(config, section), field))


def _require(absent: Iterable[str]) -> None:
    """Raises InputError if there are any fields that a container would need and does not have."""
    if names := list(absent):
        raise InputError(
            f"{', '.join(names)}: not in this container. Take a release of Megatron-Bridge that has "
            f"{'it' if len(names) == 1 else 'them'}; 0.6.2 was tried."
        )


def _transformer(model: Any) -> Any:
    """Returns the TransformerConfig of a model configuration; a provider is one itself."""
    return getattr(model, "transformer", model)


def _register(model: Any, hook: partial[list[torch.nn.Module]]) -> None:
    """Puts the hook before all others: who loads weights does so into a model that has its multipliers."""
    if hasattr(model, "register_pre_wrap_hook"):
        model.register_pre_wrap_hook(hook, prepend=True)
    else:
        model.pre_wrap_hooks.insert(0, hook)


def _refuse(config: Any) -> None:
    absent = [place for place in _READ if not _has(config, place)]
    hooks = any(_has(config, place) for place in ("model.register_pre_wrap_hook", "model.pre_wrap_hooks"))
    _require(absent if hooks else [*absent, "model.pre_wrap_hooks"])
    stock = config.optimizer_config_override_provider
    problems = []
    if isinstance(stock, Overrides) and stock.plan is not None:
        problems.append("use_recipe was called on this configuration already. Make it anew, or call it once.")
    elif not isinstance(stock, Overrides | None) and type(stock).__name__ != "OptimizerConfigOverrideProvider":
        problems.append(
            f"optimizer_config_override_provider: {type(stock).__name__} gives the optimizer overrides of its own, "
            "which the plan would replace. Say it with per_parameter in the recipe."
        )
    if getattr(config, "peft", None) is not None:
        problems.append("peft: a recipe was tuned training every parameter, and adapters train none of them. Drop it.")
    if (sharded := fsdp_problem(config.dist)) is not None:
        problems.append(sharded)
    if problems:
        raise InputError("\n".join(problems))


def _sections(config: Any) -> tuple[Any, ...]:
    """Returns the parts of a container that have Megatron-LM's arguments as fields."""
    return config.optimizer, config.scheduler, _transformer(config.model)


def _values(config: Any) -> Namespace:
    """Returns a container's values as Megatron-LM's arguments."""
    merged = {key: value for section in (*_sections(config), config.train) for key, value in vars(section).items()}
    return Namespace(**{**merged, "seq_length": config.model.seq_length})


def _settings(config: Any, recipe: Recipe) -> dict[str, Any]:
    """Returns what the recipe says of the run that a container is for, by field. Raises InputError if it is another."""
    values = _values(config)
    settings = {setting.dest: setting.value for setting in flags.settings(recipe, values)}
    # Megatron-LM makes these of weight_decay. Bridge's scheduler takes them as they are, and its recipes have them.
    settings |= {dest: recipe.moved.weight_decay for dest in _ACTING_DECAY if dest in settings}
    if problems := flags.horizon_problems(recipe, values):
        raise InputError("\n".join(problems))
    _require(dest for dest in settings if not any(hasattr(section, dest) for section in _sections(config)))
    return settings


_ACTING_DECAY = ("start_weight_decay", "end_weight_decay")


def _write(config: Any, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    replaced = []
    for dest, value in settings.items():
        for section in _sections(config):
            if hasattr(section, dest) and (current := getattr(section, dest)) != value:
                replaced.append(f"{dest} {current} → {value}")
                setattr(section, dest, value)
    say(f"recipe {recipe.fingerprint[:12]} into the configuration: {', '.join(replaced) or 'nothing differs'}.")
