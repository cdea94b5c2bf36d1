"""Megatron-Bridge: a recipe into its configuration, and the live run against the plan. Holds no theory.

    pretrain(config, forward_step, callbacks=[use_recipe(config, recipe, target)])

Imports nothing of Bridge: what differs from Megatron-LM is which places a configuration offers, and what is put there
has the methods that Bridge calls. All of these places are in this file.
"""

from argparse import Namespace
from collections.abc import Iterator
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


def use_recipe(config: Any, recipe: Recipe, target: ModelFile) -> "Guard":
    """Prepares a run of Megatron-Bridge for a recipe, and returns the callback that compares the run with it.

    Writes what the recipe says of the run into the configuration, where it wins over what is there, sets the attention
    scale, and registers what makes model and optimizer what the plan says. Call it once, on the last state of the
    configuration, before `pretrain`.

    Args:
        config: a `ConfigContainer`, whose model is a provider or a model configuration; changed in place.
        recipe: what was tuned, and at which base.
        target: the model that the container trains; one that differs is refused when it is built.

    Raises:
        InputError: the container asks for what no plan can be combined with, or is not the run that the recipe is for.
    """
    plan = recipe.plan(target)
    _refuse(config)
    configure(_transformer(config.model), plan)
    _write(config, recipe)
    flags.require_horizon(recipe, _values(config))
    _register(config.model, partial(_applied, plan=plan))
    config.optimizer_config_override_provider = Overrides(plan)
    return Guard(recipe, plan)


@dataclass(frozen=True, slots=True)
class Guard:
    """The callback that compares the live run with the plan: before the first step, after it, and then more rarely.

    Its methods are called by Bridge, on all ranks, with the state, model, optimizer and scheduler of the run.
    """

    recipe: Recipe
    plan: Plan

    def on_train_start(self, context: Any) -> None:
        """Compares the run before its first step. Raises InputError, the same on every rank, unless it is as planned.

        The initial weights are looked at where none were loaded.
        """
        loaded = context.state.cfg.checkpoint
        fresh = context.state.train_state.step == 0 and not loaded.finetune and loaded.pretrained_checkpoint is None
        self._require(context, weights=fresh)
        values = _values(context.state.cfg)
        raise_together(run_values.problems(self.recipe, values, context.optimizer, context.scheduler))

    def on_train_step_end(self, context: Any) -> None:
        """Compares the run again after steps 1, 2, 4, 8 and so on. Raises InputError as before the first."""
        if guard.is_due(context.state.train_state.step):
            self._require(context, weights=False)

    def _require(self, context: Any, *, weights: bool) -> None:
        guard.require_as_planned(context.model, self.plan, context.optimizer, context.scheduler, weights=weights)


@dataclass(frozen=True, slots=True)
class Overrides:
    """Gives a container the overrides of the optimizer's groups, in place of its stock provider."""

    plan: Plan | None = None
    """None in a configuration that was read back: a plan is not written into it."""

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


def _applied(models: list[torch.nn.Module], *, plan: Plan) -> list[torch.nn.Module]:
    """Returns the model that Bridge has built, made what the plan says. Collective."""
    apply_plan(models, plan)
    return models


# ---- the places in a configuration ---------------------------------------------------------------------------------


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
    stock = getattr(config, "optimizer_config_override_provider", None)
    problems = []
    if stock is None:
        problems.append(
            "optimizer_config_override_provider: this container has no such place. Take Megatron-Bridge 0.3 or later."
        )
    elif isinstance(stock, Overrides) and stock.plan is not None:
        problems.append("use_recipe was called on this configuration already. Make it anew, or call it once.")
    elif not isinstance(stock, Overrides) and type(stock).__name__ != "OptimizerConfigOverrideProvider":
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


def _write(config: Any, recipe: Recipe) -> None:
    replaced = []
    for dest, value in _settings(config, recipe):
        places = [section for section in _sections(config) if hasattr(section, dest)]
        assert places, dest
        for section in places:
            if (current := getattr(section, dest)) != value:
                replaced.append(f"{dest} {current} → {value}")
                setattr(section, dest, value)
    say(f"recipe {recipe.fingerprint[:12]} into the configuration: {', '.join(replaced) or 'nothing differs'}.")


def _settings(config: Any, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    decay = recipe.moved.weight_decay
    for setting in flags.settings(recipe, _values(config)):
        # Megatron-LM makes these of weight_decay. Bridge's scheduler takes them as they are, and its recipes have them.
        yield setting.dest, decay if setting.dest in ("start_weight_decay", "end_weight_decay") else setting.value
