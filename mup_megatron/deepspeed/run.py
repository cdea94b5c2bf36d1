"""The run of one engine: from the `"mup"` entry to a model and an optimizer that are what the plan says, and stay so.

What calls it is in `hooks.py`. Everything that raises does so on all ranks together.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from mup_megatron.checkpoint_recipe import write_sidecar
from mup_megatron.collectives import gathered, raise_together
from mup_megatron.deepspeed import checkpoints, guard, pipeline, versions
from mup_megatron.deepspeed import entry as entries
from mup_megatron.deepspeed.names import (
    is_pipeline,
    named_parameters,
    param_groups,
    prepared_plan,
)
from mup_megatron.deepspeed.ranks import say
from mup_megatron.errors import InputError
from mup_megatron.modules.apply import Initialize, applied_plan, apply_plan, require_applied, whole_shape
from mup_megatron.modules.groups import Group, members
from mup_megatron.modules.marker import marked
from mup_megatron.modules.names import unwrapped
from mup_megatron.modules.plan import plan_for_module
from mup_megatron.recipe import HuggingFaceBase, ModuleBase, Recipe, load_recipe
from mup_megatron.targets import plan_for_file
from mup_megatron.theory import Plan

if TYPE_CHECKING:  # it imports DeepSpeed
    from mup_megatron.deepspeed.schedulers import RatioWatch

PEAK = "mup_peak_lr"
"""Key of a group: its planned learning rate. Beside its present one a checkpoint's says where the schedule stood."""

_OF_THE_RUN = ("params", "lr", "step")
"""Keys of a group that change from step to step, and are the checkpoint's after a load."""

_OF_THE_CALLER = ("lr", "weight_decay", "eps", "betas", "momentum")


@dataclass(frozen=True)
class Run:
    """What the engine was built from."""

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


_runs: "WeakKeyDictionary[Any, Run]" = WeakKeyDictionary()
_not_initialized: "WeakSet[torch.nn.Module]" = WeakSet()
"""Models with multipliers whose weights an engine without an optimizer has left alone."""


def run_of(engine: Any) -> Run | None:
    """The run of an engine; None where its configuration has no entry."""
    return _runs.get(engine)


def plan_of(engine: Any) -> Plan | None:
    """The plan that an engine trains by; None where its configuration has no entry."""
    run = run_of(engine)
    return None if run is None else run.plan


# ---- the plan ------------------------------------------------------------------------------------------------------


def plan_for(model: torch.nn.Module, recipe: Recipe, target: str | None = None, *, readout: str | None = None) -> Plan:
    """What every parameter of a model gets.

    Args:
        model: wrapped or not; of a pipeline, this rank's stage.
        recipe: what is transferred. Its base decides how the model is looked at.
        target: what the whole model is, where that can't be read off it: `package.module:function` that builds it, for
            any torch module; else the path of a Hugging Face configuration or of a model file. None: a Hugging Face
            model says it itself.
        readout: name of the weight that computes a torch module's output, where it is tied to an embedding.

    Raises:
        InputError: model and recipe are not of one architecture.
    """
    if isinstance(recipe.base, ModuleBase):
        return plan_for_module(_factory(target), recipe, readout=readout)
    if target is not None:
        return plan_for_file(Path(target), recipe)
    if not isinstance(recipe.base, HuggingFaceBase):
        raise InputError(
            "the recipe is for Megatron-Core models, which are prepared before: call mup_megatron.deepspeed.megatron."
            "prepare(model, plan), or build them with its pipeline_module."
        )
    inner: Any = unwrapped(model)
    if not hasattr(getattr(inner, "config", None), "model_type"):
        raise InputError(
            f"the recipe is for a Hugging Face model, and a {type(inner).__name__} has no configuration of one. Write "
            'the path of the configuration as "target".'
        )
    from mup_megatron import huggingface

    return huggingface.plan_for(inner, recipe)


def _factory(target: str | None) -> Callable[[], torch.nn.Module]:
    """The function that `package.module:function` names."""
    module, _, name = (target or "").partition(":")
    if not name:
        raise InputError(
            "the recipe is for a torch module, so its initialisation has to be looked at: write what builds the model "
            'as "target", "package.module:function".'
        )
    try:
        function: Callable[[], torch.nn.Module] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f'"target" {target}: {error}. Write "package.module:function".') from None
    return function


def _require_match(model: torch.nn.Module, plan: Plan) -> None:
    """Raises InputError unless all ranks together have the plan's parameters, and no other. Collective."""
    held = {name: whole_shape(parameter) for name, parameter in named_parameters(model)}
    problems = []
    for name, shape in held.items():
        if name not in plan.by_name:
            problems.append(f"{name}: the plan has no such parameter. Make the plan from the model that is trained.")
        elif shape != plan[name].shape:
            problems.append(
                f'{name}: its shape is {list(shape)} and the plan\'s {list(plan[name].shape)}. Correct "target".'
            )
    everywhere = set().union(*gathered(set(held)))
    problems += [
        f'{entry.name}: the model has no such parameter. Correct "target" or the recipe\'s base.'
        for entry in plan.entries
        if entry.name not in everywhere
    ]
    raise_together(problems[:1])


# ---- before the engine is built ------------------------------------------------------------------------------------


def begin(arguments: MutableMapping[str, Any]) -> Run | None:
    """Makes the model what the plan says, and the engine's arguments too. Collective; None where it cannot train.

    Args:
        arguments: of the construction of an engine with an entry, by name. Changed in place; what the user handed
            over is not, but for the model.

    Raises:
        InputError: configuration, recipe and model do not go together.
    """
    from mup_megatron.deepspeed import schedulers

    config = arguments["config_class"]
    problems = []
    try:
        entry, recipe, optimizer_params, clipping = _settings(config, arguments)
        fingerprint = recipe.fingerprint
    except InputError as error:
        problems.append(str(error))
        fingerprint = ""
    raise_together(problems)
    if len(set(gathered(fingerprint))) > 1:
        raise InputError(f"{entry.recipe}: not the same file on all ranks. Put one recipe where all of them read it.")
    model = arguments["model"]
    plan = applied_by(model)
    if plan is None:
        plan = _planned(model, recipe, entry)
        _require_match(model, plan)
        _apply(model, plan, entry, trains=optimizer_params is not None)
    else:
        raise_together(_applied_problems(model, plan, recipe, entry, trains=optimizer_params is not None))
        if is_pipeline(model) and prepared_plan(unwrapped(model)) is None:
            plan = _planned(model, recipe, entry)  # what was applied is this stage's share
    if optimizer_params is None:
        say('no "optimizer" in the configuration, so this engine cannot train: multipliers alone are applied.')
        return None
    raise_together(_caller_problems(arguments, model, plan))

    groups = [{**group, PEAK: group["lr"]} for group in param_groups(model, plan)]
    peaks = [group[PEAK] for group in groups]
    _remark(model, plan, recipe, entry)
    config.optimizer_params = optimizer_params
    config.gradient_clipping = clipping
    if arguments.get("lr_scheduler") is None and config.scheduler_name is not None:
        config.scheduler_params = _scheduler(config, plan, peaks)
    arguments["model_parameters"] = groups
    planned = tuple({key: value for key, value in group.items() if key != "params"} for group in groups)
    frozen = tuple(parameter for _, parameter in named_parameters(model) if not parameter.requires_grad)
    return Run(recipe, entry, plan, planned, schedulers.RatioWatch(plan.lr, peaks), frozen)


def require_no_training(arguments: Mapping[str, Any]) -> None:
    """Raises InputError if an engine without an entry and without a plan is to train: it has an optimizer."""
    content = arguments["config_class"]._param_dict
    if arguments.get("optimizer") is not None or content.get("optimizer"):
        raise InputError(
            f'"{entries.KEY}": missing in the configuration, so this engine would train without μP. Write '
            f'"{entries.KEY}": {{"recipe": "…"}}, or start the script without mup_megatron.launch.'
        )


def require_not_forgotten(arguments: Mapping[str, Any]) -> None:
    """Raises InputError if an engine without an entry is to train a model that was trained with a recipe before."""
    model, content = arguments["model"], getattr(arguments.get("config_class"), "_param_dict", {})
    if applied_by(model) is not None or not (arguments.get("optimizer") is not None or content.get("optimizer")):
        return
    if (mark := marked(model)) is not None:
        raise InputError(
            f"the model was trained with the recipe {mark.fingerprint[:12]}, and this engine would train it without a "
            f'plan. Write "{entries.KEY}": {{"recipe": "…", "initialize": "keep"}} into the configuration.'
        )


def applied_by(model: torch.nn.Module) -> Plan | None:
    """The plan that the script has applied to a model itself, through whichever of the adapters."""
    inner = unwrapped(model)
    return prepared_plan(inner) or applied_plan(inner)


def _applied_problems(
    model: torch.nn.Module, plan: Plan, recipe: Recipe, entry: entries.Entry, *, trains: bool
) -> list[str]:
    """Why a model to which a plan was applied before cannot be taken as it is, if it cannot."""
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
    """Initial weights, multipliers and the scale of attention. Collective.

    An engine that does not train has weights that were loaded, or gets them later.
    """
    inner = unwrapped(model)
    held = dict(named_parameters(inner))
    problems = []
    try:
        # A stage of a pipeline has its share of the plan.
        share = replace(plan, entries=tuple(own for own in plan.entries if own.name in held))
        if is_pipeline(inner) and pipeline.scale_tied_readout(inner, plan):
            share = replace(share, output_multiplier=plan.stock_readout_ratio)
        apply_plan(inner, share, initialize=entry.how_to_initialize if trains else Initialize.KEEP)
        if not trains:
            _not_initialized.add(inner)
        if is_pipeline(inner):
            pipeline.count_once(inner)
    except InputError as error:
        problems.append(str(error))
    raise_together(problems)


def _settings(config: Any, arguments: Mapping[str, Any]) -> tuple[entries.Entry, Recipe, dict[str, Any] | None, float]:
    """Entry, recipe, the optimizer's values (None without an optimizer), and the threshold of clipping."""
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
    name = typed.made_optimizer.type
    params = None if name is None else entries.optimizer_params(name, config.optimizer_params, recipe)
    return entry, recipe, params, entries.gradient_clipping(typed.gradient_clipping, recipe)


def _planned(model: torch.nn.Module, recipe: Recipe, entry: entries.Entry) -> Plan:
    problems, plan, cause = [], None, None
    try:
        plan = _plan_by(entry, model, recipe)
    except InputError as error:
        problems.append(f"{entry.recipe}: {error}")
        cause = error.__cause__
    raise_together(problems, cause=cause)
    assert plan is not None
    return plan


def _plan_by(entry: entries.Entry, model: torch.nn.Module, recipe: Recipe) -> Plan:
    """As `plan_for`. A mistake in what "target" names is an InputError too: the other ranks have to hear of it."""
    try:
        return plan_for(model, recipe, entry.target, readout=entry.readout)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f'no plan could be made of "target" {entry.target} ({type(error).__name__}: {error}). Correct it.'
        ) from error


def _caller_problems(arguments: MutableMapping[str, Any], model: torch.nn.Module, plan: Plan) -> list[str]:
    """What the caller said of the parameters that the plan would take back. Reads the caller's iterator to its end."""
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


def _scheduler(config: Any, plan: Plan, peaks: Sequence[float]) -> dict[str, Any]:
    from mup_megatron.deepspeed import schedulers

    if schedulers.drives_betas(config.scheduler_name, config.scheduler_params or {}):
        say(
            f"{config.scheduler_name} drives beta1 or momentum as well, over the recipe's. To keep the recipe's, write "
            '"cycle_momentum": false.'
        )
    problems, params = [], {}
    try:
        given = {"type": config.scheduler_name, "params": config.scheduler_params or {}}
        params = schedulers.rewritten(given, plan, peaks)["params"]
    except InputError as error:
        problems.append(str(error))
    raise_together(problems)
    return params


def _remark(model: torch.nn.Module, plan: Plan, recipe: Recipe, entry: entries.Entry) -> None:
    changed = sum(own.lr != plan.lr for own in plan.entries)
    say(
        f"recipe {entry.recipe} (fingerprint {recipe.fingerprint[:12]}): {changed} of {len(plan.entries)} parameters "
        "get a learning rate of their own."
    )
    frozen = [name for name, parameter in named_parameters(model) if not parameter.requires_grad]
    if frozen:
        say(f"{len(frozen)} frozen parameters ({frozen[0]}, …) are left out of the optimizer.")


# ---- the engine that was built -------------------------------------------------------------------------------------


def built(engine: Any, run: Run) -> None:
    """An engine is there. Collective.

    Raises:
        InputError: its scheduler breaks the ratios, or it is not what the plan says.
    """
    from mup_megatron.deepspeed import schedulers

    _runs[engine] = run
    problems = []
    scheduler = engine.lr_scheduler
    if getattr(scheduler, "cycle_momentum", False) and engine.client_lr_scheduler is not None:
        say(f"{type(scheduler).__name__} drives beta1 or momentum as well, over the recipe's (cycle_momentum).")
    if scheduler is not None and engine.client_lr_scheduler is not None:
        try:
            schedulers.require_proportional(scheduler, run.peaks)
        except InputError as error:
            problems.append(str(error))
    raise_together(problems)
    verify(engine, run, at_peak=scheduler is None)


def verify(engine: Any, run: Run, *, at_peak: bool = False) -> None:
    """Compares the live engine with the plan. Collective."""
    if run.entry.guard:
        raise_together(guard.problems(engine, run.plan, run.recipe.hyperparameters.clip_grad, at_peak=at_peak))


def stepping(engine: Any, run: Run) -> None:
    """The optimizer is about to step. Not collective: all ranks have the same groups, so they see the same.

    Raises:
        InputError: something changed the groups, and this step would not be the plan's.
    """
    if not run.entry.guard:
        return
    groups = engine.optimizer.param_groups
    problem = guard.group_problem(groups, run.planned, _moments(engine, run))
    problem = problem or run.watch.check([group["lr"] for group in groups])
    if problem is None and any(parameter.requires_grad for parameter in run.frozen):
        problem = (
            '"mup": a parameter that was frozen when the engine was built is trainable now, and the optimizer does not '
            "have it. Build the engine anew."
        )
    if problem is not None:
        raise InputError(problem)


def _moments(engine: Any, run: Run) -> dict[str, Any]:
    """The recipe's betas or momentum; nothing where a schedule drives them."""
    if getattr(engine.lr_scheduler, "cycle_momentum", False):
        return {}
    h = run.recipe.hyperparameters
    adam = run.recipe.parametrization.optimizer == "adam"
    return {"betas": (h.adam_beta1, h.adam_beta2)} if adam else {"momentum": h.sgd_momentum}


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@contextmanager
def loading(engine: Any, load_dir: str, tag: str | None, *, optimizer: bool) -> Iterator[None]:
    """Around the loading of a checkpoint: what the plan gave the groups is there afterwards. Collective.

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
        _require_plain(engine, load_dir, tag)
        yield
        return
    problems, found = [], None
    try:
        found = checkpoints.origin(load_dir, tag, universal=engine.load_universal_checkpoint())
        if found is not None:
            checkpoints.require_same(found, run.recipe, accept=run.entry.accept_recipe_change, optimizer=optimizer)
            if optimizer:
                _require_same_groups(engine, run, found)
    except InputError as error:
        problems.append(str(error))
    raise_together(problems)
    before = [_kept(group) for group in engine.optimizer.param_groups]
    held = schedulers.held_learning_rates(engine.lr_scheduler)
    yield
    same = found is None or found.recipe is None or found.recipe.fingerprint == run.recipe.fingerprint
    reapply(engine.optimizer.param_groups, before, keep=("betas", "momentum") if same else ())
    _separate_steps(engine.optimizer)
    schedulers.restore_learning_rates(held)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()
    verify(engine, run)


def _require_plain(engine: Any, load_dir: str, tag: str | None) -> None:
    """For an engine without an entry. Not collective, and what cannot be read is DeepSpeed's to load or to refuse.

    Then it is told that nobody looked.
    """
    plan = applied_by(engine)
    if engine.optimizer is None and plan is None:
        return
    try:
        found = checkpoints.origin(load_dir, tag, universal=engine.load_universal_checkpoint())
    except (InputError, OSError) as error:
        say(f"warning: {error} Whether the checkpoint was trained with a recipe is not known.")
        return
    if found is None:
        return
    if plan is None:
        checkpoints.require_plain(found)
    elif found.recipe is not None and found.recipe.fingerprint != plan.fingerprint:
        raise InputError(
            f"{found.folder}: it was trained with another recipe (fingerprint {found.recipe.fingerprint[:12]}) than "
            f"the one whose plan was applied to the model ({plan.fingerprint[:12]}), and would be another function "
            "under its multipliers. Apply the plan of that recipe."
        )


def _require_same_groups(engine: Any, run: Run, found: checkpoints.Origin) -> None:
    if found.recipe is None or found.recipe.fingerprint == run.recipe.fingerprint:
        return
    before = _plan_by(run.entry, engine, found.recipe)
    if tuple(members(before).items()) != tuple(members(run.plan).items()):
        raise InputError(
            f"{found.folder}: under its recipe the parameters fall into other groups than under this run's, so the "
            "optimizer's state does not fit. Take the weights alone with load_module_only=True."
        )


def _kept(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _OF_THE_RUN}


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


def client_state(engine: Any, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The client state with the recipe in it."""
    run = run_of(engine)
    return dict(given or {}) | ({} if run is None else checkpoints.client_state(run.recipe))


def saved(engine: Any, save_dir: str, tag: str | None) -> None:
    """A checkpoint was written: puts the recipe beside it, for people."""
    run = run_of(engine)
    if run is None or engine.global_rank != 0:
        return
    folder = Path(save_dir) / (f"global_step{engine.global_steps}" if tag is None else str(tag))
    problem = write_sidecar(folder, run.recipe)
    if problem is not None:
        say(f"warning: {problem} The recipe is in the checkpoint itself all the same.")
