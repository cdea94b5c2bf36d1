"""The run of this process, as the fork's patched functions see it: what they call, in the order they call it.

One for each process, because the fork's arguments and model are. Imports nothing of Megatron or DeepSpeed until there
is a model.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron.pretrain import checkpoints, flags
from mup_megatron.megatron_deepspeed import arguments, groups
from mup_megatron.messages import is_first, say
from mup_megatron.modules.groups import Group
from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS
from mup_megatron.plan_table import print_plan
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan


@dataclasses.dataclass
class _ForkRun:
    """Holds what is known of a run so far; filled in as the fork goes along."""

    recipe: Recipe
    options: flags.Options
    args: argparse.Namespace
    model: ModelFile | None = None
    plan: Plan | None = None


_run: _ForkRun | None = None


# ---- arguments -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the `--mup-*` flags, and lets the parser put a recipe's values into what it parses.

    Raises (when it parses):
        InputError: the arguments do not go with the recipe; lists all of them.
    """
    flags.add_to(parser)
    parse: Callable[..., Any] = parser.parse_known_args

    def parse_and_begin(*args: Any, **kwargs: Any) -> Any:
        values, rest = parse(*args, **kwargs)
        _begin(values)
        return values, rest

    parser.parse_known_args = parse_and_begin  # type: ignore[method-assign]
    return parser


def _begin(values: argparse.Namespace) -> None:
    global _run
    _run = None
    given = flags.take_given(values)
    if values.mup_recipe is not None:
        arguments.refuse(values)
    options = flags.options_of(values)
    if options is None:
        return
    recipe = flags.take_over(values, given, options)
    arguments.refuse_recipe(recipe)
    # The fork writes its arguments into every checkpoint.
    checkpoints.sign(values, recipe)
    _run = _ForkRun(recipe, options, values)


# ---- model ---------------------------------------------------------------------------------------------------------


def apply_to_model(chunks: Sequence[torch.nn.Module], args: argparse.Namespace) -> None:
    """Makes this rank's part of the model that the fork has just built what the recipe's plan says. Collective.

    Args:
        chunks: what `get_model` has built, before anything wraps it.
        args: the fork's, validated, with the padded vocabulary.

    Raises:
        InputError: the same on every rank.
    """
    run = _run
    if run is None:
        return
    from mup_megatron.collectives import gathered, raise_together
    from mup_megatron.megatron_deepspeed.model import Drawn, apply_plan

    fingerprints = set(gathered(run.recipe.fingerprint))
    raise_together(
        [
            f"--mup-recipe {run.options.recipe}: not the same file on all ranks: fingerprints "
            f"{', '.join(sorted(fingerprints))}. Put one recipe where all of them read it."
        ]
        if len(fingerprints) > 1
        else []
    )
    # From here on all ranks find the same problems.
    if getattr(args, "compression_training", False):
        raise InputError(
            "compression_training in DeepSpeed's configuration: it replaces the layers that the plan was applied to. "
            "Drop it."
        )
    flags.require_horizon(run.recipe, args)
    _take_over_clipping(run, args)
    run.args = args
    run.model = arguments.model_from_fork_args(args)
    run.plan = _plan(run, run.recipe)
    drawn = Drawn(args.init_method_std, args.num_layers, args.tensor_model_parallel_size)
    apply_plan(chunks, run.plan, drawn, initialize=args.perform_initialization)
    for name in arguments.notes(args):
        say(f"{name}: a model file has no key for it. Take care that the recipe's base was tuned with it as well.")
    say(
        f"recipe {run.options.recipe} (fingerprint {run.recipe.fingerprint[:12]}) from width "
        f"{run.recipe.megatron_base.hidden_size} to {run.model.hidden_size}."
    )
    if run.options.print_plan and is_first():
        print_plan(run.plan, brief=True, moved=run.recipe.told_horizon)


def _plan(run: _ForkRun, recipe: Recipe) -> Plan:
    assert run.model is not None
    try:
        return recipe.plan(run.model)
    except InputError as error:
        raise InputError(f"{run.options.recipe} for the command line: {error}") from None


def _take_over_clipping(run: _ForkRun, args: argparse.Namespace) -> None:
    """DeepSpeed clips by its own configuration and never reads --clip-grad."""
    config = getattr(args, "deepspeed_config_dict", None)  # scripts that only generate text have none
    wanted = run.recipe.moved.clip_grad
    if not args.deepspeed or config is None or config.get("gradient_clipping", 0.0) == wanted:
        return
    if not run.options.override:
        raise InputError(
            f"gradient_clipping in DeepSpeed's configuration is {config.get('gradient_clipping', 0.0):g}, the recipe's "
            f"clip_grad is {wanted:g}. Write the recipe's, or let the recipe win with --mup-override."
        )
    config["gradient_clipping"] = wanted


def scale_head_input(x: torch.Tensor) -> torch.Tensor:
    """Returns the input of the readout, [sequence, batch, hidden], with the readout's multiplier.

    For the function that both of the fork's models compute their logits with, but for the pipeline whose readout is not
    tied: that one has a module, which is hooked.
    """
    factor = 1.0 if _run is None or _run.plan is None else _run.plan.output_multiplier
    return x if factor == 1.0 else x * factor


# ---- optimizer -----------------------------------------------------------------------------------------------------


def param_groups(
    modules: Sequence[torch.nn.Module], given: list[Group], adam: type[torch.optim.Optimizer]
) -> list[Group]:
    """Returns the plan's groups in place of the fork's: name, params, lr_mult, wd_mult, eps. Collective.

    In the plan's order, the same on every rank; none is missing on a stage of DeepSpeed's pipeline.

    Args:
        modules: as passed to `get_param_groups`.
        given: what the fork made of them.
        adam: the class that the fork is going to use for Adam, unless a flag says otherwise.

    Raises:
        InputError: the script has groups of its own, a parameter is frozen, or the optimizer's weight decay is not
            AdamW's; the same on every rank.
    """
    run = _run
    if run is None:
        return given
    from mup_megatron.collectives import raise_together

    plan = _applied(run)
    raise_together(_adam_problems(run, plan, adam) + groups.problems(modules, plan, given))
    pipeline = run.args.deepspeed and run.args.pipeline_model_parallel_size > 1
    return groups.param_groups(modules, plan, every_group=pipeline)


def _applied(run: _ForkRun) -> Plan:
    if run.plan is None:
        raise InputError(
            "--mup-recipe: the model was built by something else than the fork's get_model, so the recipe was not "
            "applied."
        )
    return run.plan


def _adam_problems(run: _ForkRun, plan: Plan, adam: type[torch.optim.Optimizer]) -> list[str]:
    # Without CUDA the fork uses torch's Adam, which adds weight decay to the gradient.
    if adam is not TORCH_OPTIMIZERS.only(plan.optimizers).coupled or plan.weight_decay == 0:
        return []
    if run.args.ds_fused_adam or run.args.cpu_optimizer:
        return []
    return [
        "--optimizer adam: on this accelerator the fork uses torch's Adam, whose weight decay is not the plan's AdamW. "
        "Use --ds_fused_adam or --cpu-optimizer."
    ]


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def require_same_recipe(state: dict[str, Any], optimizer: Any, scheduler: Any) -> None:
    """To be called when the fork has loaded a checkpoint: refuses another recipe's, and gives the groups their values.

    Args:
        state: what the fork wrote beside the weights; its arguments carry the recipe.
        optimizer: DeepSpeed's or the fork's; None where there is none.
        scheduler: the fork's `OptimizerParamScheduler`, or None.

    Raises:
        InputError: the checkpoint is of another recipe or of none, or of one and this run has none.
    """
    found = checkpoints.recipe_within(state.get("args"))
    run = _run
    if run is None:
        if found.fingerprint is not None:
            raise InputError(
                f"--load: the checkpoint was trained with a recipe (fingerprint {found.fingerprint}), and without it "
                "every parameter would go on with another learning rate and scale. Give --mup-recipe."
            )
        return
    checkpoints.require_same(found, run.recipe, accept=run.options.accept_recipe_change)
    if optimizer is None:
        return
    plan = _applied(run)
    changed = found.recipe is not None and found.fingerprint != run.recipe.fingerprint
    if changed and not getattr(run.args, "finetune", False):
        assert found.recipe is not None
        if not groups.tell_apart_the_same(_plan(run, found.recipe), plan):
            raise InputError(
                "--mup-accept-recipe-change: the two recipes tell other parameters apart, so the optimizer's state "
                "cannot be matched. Load the weights alone with --finetune."
            )
    groups.restore(optimizer.param_groups, plan)
    if changed and scheduler is not None:
        # It has computed learning rates from what the groups held in the checkpoint.
        scheduler.step(0, scheduler.num_tokens)
