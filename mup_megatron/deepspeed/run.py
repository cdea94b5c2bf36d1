"""The run of one engine: from the `"mup"` entry to a model and an optimizer that are what the plan says, and stay so.

What calls it is in `hooks.py`. Everything that raises does so on all ranks together.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from mup_megatron.collectives import gathered, raise_together, raising_together
from mup_megatron.deepspeed import entry as entries
from mup_megatron.deepspeed import guard, pipeline, versions
from mup_megatron.deepspeed.names import is_pipeline, named_parameters, param_groups, prepared_plan
from mup_megatron.deepspeed.optimizers import optimizer_of
from mup_megatron.deepspeed.planning import plan_applied_to, plan_on_all_ranks, require_match
from mup_megatron.deepspeed.remarks import say
from mup_megatron.errors import InputError
from mup_megatron.modules.applied import require_applied
from mup_megatron.modules.apply import apply_plan
from mup_megatron.modules.groups import members
from mup_megatron.modules.names import unwrapped
from mup_megatron.modules.weights import Initialize
from mup_megatron.recipe import Recipe, load_recipe
from mup_megatron.theory import Plan

if TYPE_CHECKING:  # it imports DeepSpeed
    from mup_megatron.deepspeed.schedulers import RatioWatch

PEAK = "mup_peak_lr"
"""Key of a group: its planned learning rate. Beside its present one a checkpoint's says where the schedule stood."""

_OF_THE_CALLER = ("lr", "weight_decay", "eps", "betas", "momentum")


@dataclass(frozen=True)
class EngineRun:
    """The recipe, plan and groups that an engine was built from."""

    recipe: Recipe
    entry: entries.Entry
    plan: Plan
    planned: tuple[Mapping[str, Any], ...]
    """The groups of this rank's optimizer without their parameters, in its order."""
    watch: "RatioWatch"
    frozen: tuple[torch.nn.Parameter, ...]
    """What the optimizer does not have, because it was not trainable."""

    @property
    def peaks(self) -> list[float]:
        """The planned learning rate of each group."""
        return [group[PEAK] for group in self.planned]


_runs: "WeakKeyDictionary[Any, EngineRun]" = WeakKeyDictionary()
_not_initialized: "WeakSet[torch.nn.Module]" = WeakSet()
"""Models with multipliers whose weights an engine without an optimizer has left alone."""


def run_of(engine: Any) -> EngineRun | None:
    """Returns the run of an engine; None where its configuration has no entry."""
    return _runs.get(engine)


def plan_of(engine: Any) -> Plan | None:
    """Returns the plan that an engine trains by; None where its configuration has no entry."""
    run = run_of(engine)
    return None if run is None else run.plan


# ---- before the engine is built ------------------------------------------------------------------------------------


def before_init(arguments: MutableMapping[str, Any]) -> EngineRun | None:
    """Makes the model what the plan says, and the engine's arguments too. Collective; None where it cannot train.

    Args:
        arguments: of the construction of an engine with an entry, by name. Changed in place; what the user handed
            over is not, but for the model.

    Raises:
        InputError: configuration, recipe and model do not go together.
    """
    from mup_megatron.deepspeed import schedulers

    config = arguments["config_class"]
    with raising_together():
        entry, recipe, optimizer_params, clipping = _settings(config, arguments)
    if len(set(gathered(recipe.fingerprint))) > 1:
        raise InputError(f"{entry.recipe}: not the same file on all ranks. Put one recipe where all of them read it.")
    model = arguments["model"]
    plan = plan_applied_to(model)
    if plan is None:
        plan = plan_on_all_ranks(model, recipe, entry)
        require_match(model, plan)
        _apply(model, plan, entry, trains=optimizer_params is not None)
    else:
        raise_together(_applied_problems(model, plan, recipe, entry, trains=optimizer_params is not None))
        if is_pipeline(model) and prepared_plan(unwrapped(model)) is None:
            plan = plan_on_all_ranks(model, recipe, entry)  # what was applied is this stage's share
    if optimizer_params is None:
        say('no "optimizer" in the configuration, so this engine cannot train: multipliers alone are applied.')
        return None
    raise_together(_caller_problems(arguments, model, plan))

    _tell_who_steps(model, plan, recipe)
    groups = [{**group, PEAK: group["lr"]} for group in param_groups(model, plan)]
    peaks = [group[PEAK] for group in groups]
    _say_what_is_planned(model, plan, recipe, entry)
    config.optimizer_params = optimizer_params
    config.gradient_clipping = clipping
    if arguments.get("lr_scheduler") is None and config.scheduler_name is not None:
        config.scheduler_params = _scheduler(config, plan, peaks)
    arguments["model_parameters"] = groups
    planned = tuple({key: value for key, value in group.items() if key != "params"} for group in groups)
    frozen = tuple(parameter for _, parameter in named_parameters(model) if not parameter.requires_grad)
    return EngineRun(recipe, entry, plan, planned, schedulers.RatioWatch(plan.lr, peaks), frozen)


def _applied_problems(
    model: torch.nn.Module, plan: Plan, recipe: Recipe, entry: entries.Entry, *, trains: bool
) -> list[str]:
    """Says why a model to which a plan was applied before cannot be taken as it is, if it cannot."""
    inner = unwrapped(model)
    if plan.fingerprint != recipe.fingerprint:
        return [
            f"{entry.recipe}: its fingerprint is {recipe.fingerprint[:12]}, and a plan of the recipe "
            f"{plan.fingerprint[:12]} was applied to the model before. Use one recipe."
        ]
    if trains and inner in _not_initialized and entry.how_to_initialize is not Initialize.KEEP:
        return [
            "an engine without an optimizer was built on this model before, and left its initial weights alone. Build "
            'the engine that trains first, or the model anew; weights that were loaded take "initialize": "keep".'
        ]
    if prepared_plan(inner) is None:
        try:
            require_applied(inner, plan)
        except InputError as error:
            return [str(error)]
    return []


def _apply(model: torch.nn.Module, plan: Plan, entry: entries.Entry, *, trains: bool) -> None:
    """Gives a model its initial weights, multipliers and the scale of attention. Collective.

    An engine that does not train has weights that were loaded, or gets them later.
    """
    inner = unwrapped(model)
    held = dict(named_parameters(inner))
    with raising_together():
        # A stage of a pipeline has its share of the plan.
        share = replace(plan, entries=tuple(own for own in plan.entries if own.name in held))
        if is_pipeline(inner) and pipeline.scale_tied_readout(inner, plan):
            share = replace(share, output_multiplier=plan.stock_readout_ratio)
        apply_plan(inner, share, initialize=entry.how_to_initialize if trains else Initialize.KEEP)
        if not trains:
            _not_initialized.add(inner)
        if is_pipeline(inner):
            pipeline.count_once(inner)


def _settings(config: Any, arguments: Mapping[str, Any]) -> tuple[entries.Entry, Recipe, dict[str, Any] | None, float]:
    """Returns entry, recipe, the optimizer's values (None without an optimizer), and the threshold of clipping."""
    content = config._param_dict
    entry = entries.entry_of(content)
    assert entry is not None
    versions.require_supported()
    if arguments.get("optimizer") is not None:
        raise InputError(
            '"mup": deepspeed.initialize was given an optimizer of its own, which the entry would not reach. Drop '
            'optimizer= and write "optimizer" into the configuration, or drop the entry and make the optimizer from '
            "mup_megatron.deepspeed.param_groups."
        )
    typed = entries.configuration(content, source="the DeepSpeed configuration")
    entries.require_supported(typed)
    recipe = load_recipe(Path(entry.recipe))
    entries.require_horizon(config.train_batch_size, recipe)
    name = typed.made_optimizer.type
    if name is not None:
        entries.require_possible(typed, recipe)
    params = None if name is None else entries.optimizer_params(name, config.optimizer_params, recipe)
    return entry, recipe, params, entries.gradient_clipping(typed.gradient_clipping, recipe)


def _caller_problems(arguments: MutableMapping[str, Any], model: torch.nn.Module, plan: Plan) -> list[str]:
    """Lists what the caller said of the parameters and the plan would take back. Reads the caller's iterator."""
    given = arguments.get("model_parameters")
    if given is None:
        return []
    given = arguments["model_parameters"] = list(given)
    ours = members(plan)
    parameters = []
    for index, item in enumerate(given):
        if not isinstance(item, Mapping):
            parameters.append(item)
            continue
        held = item["params"]
        parameters += [held] if isinstance(held, torch.Tensor) else list(held)
        own = [f"{key} {item[key]}" for key in _OF_THE_CALLER if key in item]
        if own and item.get("name") not in ours:
            return [
                f"model_parameters: group {index} has values of its own ({', '.join(own)}), which the plan would "
                "replace. Hand over model.parameters(), and say it with per_parameter in the recipe."
            ]
    handed = {id(parameter) for parameter in parameters if isinstance(parameter, torch.Tensor)}
    missing = [name for name, p in named_parameters(model) if p.requires_grad and id(p) not in handed]
    return [
        f"{name}: not among model_parameters although it is trainable. Freeze it with requires_grad_(False), or hand "
        "it over."
        for name in missing[:1]
    ]


def _tell_who_steps(model: torch.nn.Module, plan: Plan, recipe: Recipe) -> None:
    """Tells DeepSpeed which optimizer steps a parameter, in its own way: it has told itself, by words in names."""
    own = optimizer_of(recipe)
    if own.flag is None:
        return
    if is_pipeline(unwrapped(model)):
        raise InputError(f"{own.type} is not tested in a pipeline of DeepSpeed's. Train without stages.")
    for name, parameter in named_parameters(model):
        setattr(parameter, own.flag, plan[name].optimizer == plan.optimizer)


def _scheduler(config: Any, plan: Plan, peaks: Sequence[float]) -> dict[str, Any]:
    from mup_megatron.deepspeed import schedulers

    if schedulers.drives_betas(config.scheduler_name, config.scheduler_params or {}):
        say(
            f"{config.scheduler_name} drives beta1 or momentum as well, over the recipe's. To keep the recipe's, write "
            '"cycle_momentum": false.'
        )
    with raising_together():
        given = {"type": config.scheduler_name, "params": config.scheduler_params or {}}
        params: dict[str, Any] = schedulers.rewritten(given, plan, peaks)["params"]
    return params


def _say_what_is_planned(model: torch.nn.Module, plan: Plan, recipe: Recipe, entry: entries.Entry) -> None:
    changed = sum(own.lr != plan.lr for own in plan.entries)
    say(
        f"recipe {entry.recipe} (fingerprint {recipe.fingerprint[:12]}): {changed} of {len(plan.entries)} parameters "
        "get a learning rate of their own."
    )
    frozen = [name for name, parameter in named_parameters(model) if not parameter.requires_grad]
    if frozen:
        say(f"{len(frozen)} frozen parameters ({frozen[0]}, …) are left out of the optimizer.")


# ---- the engine that was built -------------------------------------------------------------------------------------


def after_init(engine: Any, run: EngineRun) -> None:
    """Checks an engine that was built, and remembers its run. Collective.

    Raises:
        InputError: its scheduler breaks the ratios, or it is not what the plan says.
    """
    from mup_megatron.deepspeed import schedulers

    _runs[engine] = run
    if optimizer_of(run.recipe).flag is not None:
        # Of each of these groups DeepSpeed has made one of its own. How many there are, the guard looks at.
        for group, own in zip(engine.optimizer.param_groups, run.planned, strict=False):
            group.update({key: own[key] for key in ("name", "optimizer", PEAK)})
    scheduler = engine.lr_scheduler
    if getattr(scheduler, "cycle_momentum", False) and engine.client_lr_scheduler is not None:
        say(f"{type(scheduler).__name__} drives beta1 or momentum as well, over the recipe's (cycle_momentum).")
    with raising_together():
        if scheduler is not None and engine.client_lr_scheduler is not None:
            schedulers.require_proportional(scheduler, run.peaks)
    verify(engine, run, at_peak=scheduler is None)


def verify(engine: Any, run: EngineRun, *, at_peak: bool = False) -> None:
    """Compares the live engine with the plan. Collective."""
    if run.entry.guard:
        raise_together(guard.problems(engine, run.plan, run.recipe.moved.clip_grad, at_peak=at_peak))


def before_step(engine: Any, run: EngineRun) -> None:
    """Checks the groups that the optimizer is about to step with.

    Not collective: all ranks have the same groups, so they see the same.

    Raises:
        InputError: something changed the groups, and this step would not be the plan's.
    """
    if not run.entry.guard:
        return
    groups = engine.optimizer.param_groups
    problem = guard.group_problem(groups, run.planned, [_betas_or_momentum(engine, run, own) for own in run.planned])
    problem = problem or run.watch.check([group["lr"] for group in groups])
    if problem is None and any(parameter.requires_grad for parameter in run.frozen):
        problem = (
            '"mup": a parameter that was frozen when the engine was built is trainable now, and the optimizer does not '
            "have it. Build the engine anew."
        )
    if problem is not None:
        raise InputError(problem)


def _betas_or_momentum(engine: Any, run: EngineRun, group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe's betas or momentum of a group; nothing where a schedule drives them."""
    if getattr(engine.lr_scheduler, "cycle_momentum", False):
        return {}
    return entries.group_settings(run.recipe, group.get("optimizer", run.plan.optimizer))
