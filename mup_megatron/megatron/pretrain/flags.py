"""The `--mup-*` flags of a Megatron-LM script, and what a recipe means for the flags that Megatron has already.

Works on an argparse parser and the values that it parsed; imports nothing of Megatron.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.table import STOPPED
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS, absence, distributed_problem, require_possible
from mup_megatron.megatron.versions import fsdp_problem
from mup_megatron.recipe import Recipe, load_recipe

_OWN: dict[str, dict[str, Any]] = {
    "--mup-recipe": {
        "type": str,
        "metavar": "R.recipe.yaml",
        "help": "Train with μP: initial weights, multipliers, attention scale, and each parameter's learning rate, eps "
        "and weight decay follow from this recipe of mup-megatron.",
    },
    "--mup-override": {
        "action": "store_true",
        "help": "Let the recipe win over flags of this line that say something else (--lr, --init-method-std, …). "
        "Without it they are an error.",
    },
    "--mup-print-plan": {
        "action": "store_true",
        "help": "Print what every parameter gets, layers that are alike as one.",
    },
    "--mup-no-verify": {
        "action": "store_true",
        "help": "Don't compare the live model and optimizer with the plan. What cannot be done right is still refused.",
    },
    "--mup-accept-recipe-change": {
        "action": "store_true",
        "help": "Go on from a checkpoint that was trained with another recipe, or with none.",
    },
    "--mup-coordinates-interval": {
        "type": int,
        "metavar": "N",
        "help": "Every N iterations, log the root mean square of each layer's output to TensorBoard and wandb.",
    },
    "--mup-observe": {
        "type": str,
        "metavar": "MODULE:ARGUMENT",
        "help": "Let a module look on while the run trains, as `mup-megatron check --recipe R -- LINE` does.",
    },
    "--mup-write-model-file": {
        "type": str,
        "metavar": "PATH",
        "help": "In place of a recipe: write the model file of this line as Megatron reads it, and end before a model "
        "is built. One process, no GPU.",
    },
}
NAMES = tuple(_OWN)
RECIPE = "--mup-recipe"
WRITE = "--mup-write-model-file"

_GIVEN = "_mup_given"
"""Where the parsed values carry the names of what the command line said itself, until `take_given` takes it off."""


def asked_for(words: Sequence[str]) -> bool:
    """Returns whether a command line has one of our flags, or wants to know which there are."""
    return wants_help(words) or any(word.split("=", 1)[0] in NAMES for word in words)


def wants_help(words: Sequence[str]) -> bool:
    """Returns whether a command line asks for help instead of a run."""
    return "-h" in words or "--help" in words


def add_to(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the flags, in a group of their own, and lets the parser note which flags a command line gives itself."""
    _add_group(parser)
    parse: Callable[..., Any] = parser.parse_known_args

    def parse_and_note(args: Any = None, namespace: Any = None, **more: Any) -> Any:
        values, rest = parse(args, namespace, **more)
        words = sys.argv[1:] if args is None else args
        # Whole names only: Megatron's parser takes no abbreviations.
        actions = (parser._option_string_actions.get(word.split("=", 1)[0]) for word in words)
        setattr(values, _GIVEN, frozenset(action.dest for action in actions if action is not None))
        _require_read(values)
        return values, rest

    parser.parse_known_args = parse_and_note  # type: ignore[method-assign]
    return parser


def help_text() -> str:
    """Returns the flags and what they do, for people."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    _add_group(parser)
    return parser.format_help()


def _add_group(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mup-megatron", "μP with hyperparameters that were tuned on a small model")
    for name, how in _OWN.items():
        group.add_argument(name, **how)


def _require_read(values: argparse.Namespace) -> None:
    """Megatron replaces all values by those of a YAML file, ours with them."""
    if values.mup_recipe is not None and getattr(values, "yaml_cfg", None) is not None:
        raise InputError(
            "--yaml-cfg: Megatron would take all arguments from that file and forget --mup-recipe. Give the arguments "
            "as flags."
        )


def take_given(values: argparse.Namespace) -> frozenset[str]:
    """Returns the names of the arguments that the command line gave itself; takes the note off the values."""
    given: frozenset[str] = vars(values).pop(_GIVEN, frozenset())
    return given


@dataclass(frozen=True, slots=True)
class Options:
    """Our flags, as given."""

    recipe: Path
    override: bool
    print_plan: bool
    verify: bool
    accept_recipe_change: bool
    coordinates_interval: int | None
    observe: str | None = None


def options_of(values: argparse.Namespace) -> Options | None:
    """Our flags among the parsed values; None without --mup-recipe.

    Raises:
        InputError: flags of ours without --mup-recipe, beside Megatron's own μP, or with a value that makes no sense.
    """
    if getattr(values, "mup_recipe", None) == "":
        raise InputError("--mup-recipe: no path. Is the variable set that it comes from?")
    if getattr(values, "mup_recipe", None) is None:
        others = [name for name in NAMES if getattr(values, name[2:].replace("-", "_"), None)]
        if others:
            raise InputError(f"{others[0]}: does nothing without --mup-recipe. Give the recipe, or drop the flag.")
        return None
    if getattr(values, "use_mup", False):
        raise InputError(
            "--use-mup: Megatron's own μP would multiply with the recipe's. Drop --use-mup and the other --mup-* flags "
            "of Megatron. To carry their values over: mup-megatron from-native -o R.recipe.yaml -- FLAGS…"
        )
    interval = values.mup_coordinates_interval
    if interval is not None and interval < 1:
        raise InputError(f"--mup-coordinates-interval {interval}: not a number of iterations. Give 1 or more.")
    if interval is not None and not (getattr(values, "tensorboard_dir", None) or getattr(values, "wandb_project", "")):
        raise InputError(
            "--mup-coordinates-interval: there is nowhere to log to. Give --tensorboard-dir or --wandb-project."
        )
    return Options(
        recipe=Path(values.mup_recipe),
        override=values.mup_override,
        print_plan=values.mup_print_plan,
        verify=not values.mup_no_verify,
        accept_recipe_change=values.mup_accept_recipe_change,
        coordinates_interval=interval,
        observe=values.mup_observe,
    )


def take_over(values: argparse.Namespace, given: frozenset[str], options: Options) -> Recipe:
    """Reads the recipe and writes what it says into Megatron's arguments, before Megatron validates them.

    Raises:
        InputError: a flag says something else and there is no --mup-override, or asks for what no plan can be
            combined with; lists all of them.
    """
    try:
        recipe = load_recipe(options.recipe)
    except InputError as error:
        raise InputError(f"--mup-recipe: {error}") from None
    _refuse(values)
    known = require_possible(recipe.parametrization.optimizer, recipe.optimizers)
    if (absent := absence(recipe.parametrization.optimizer)) is not None:
        raise InputError(absent)
    problems = filter(None, map(distributed_problem, recipe.optimizers))
    if getattr(values, "use_distributed_optimizer", False) and (problem := next(problems, None)) is not None:
        raise InputError(problem)
    ranks = max(getattr(values, key, None) or 1 for key in _TENSOR_PARALLELISM)
    if (split := known.split_problem(_said(recipe, values, given), ranks)) is not None:
        raise InputError(split)
    conflicts = []
    for setting in settings(recipe, values):
        current = getattr(values, setting.dest, setting.value)
        if current == setting.value:
            continue
        if setting.dest in given and not setting.agrees(current):
            conflicts.append(f"  {_flag(setting.dest)} {current} (recipe: {setting.means})")
        setattr(values, setting.dest, setting.value)
    if conflicts and not options.override:
        raise InputError(
            "\n".join(
                [
                    f"these flags say something else than {options.recipe} does:",
                    *conflicts,
                    "Drop them, or let the recipe win with --mup-override.",
                ]
            )
        )
    return recipe


_TENSOR_PARALLELISM = ("tensor_model_parallel_size", "expert_tensor_parallel_size")


def _said(recipe: Recipe, values: argparse.Namespace, given: frozenset[str]) -> dict[str, Any]:
    """Returns what a recipe says of its optimizer, but for what the line says itself."""
    return {key: getattr(values, key) if key in given else value for key, value in recipe.optimizer_values.items()}


def owned(recipe: Recipe, values: argparse.Namespace) -> frozenset[str]:
    """Returns the arguments of Megatron's that a recipe decides."""
    return frozenset(setting.dest for setting in settings(recipe, values))


def require_horizon(recipe: Recipe, values: argparse.Namespace) -> None:
    """Raises InputError where a line, as Megatron has validated it, is not the run that the recipe's values are for."""
    if problems := horizon_problems(recipe, values):
        raise InputError("\n".join(f"{RECIPE}: {problem}" for problem in problems))


def horizon_problems(recipe: Recipe, values: argparse.Namespace) -> list[str]:
    """Returns where a run is not the one that the recipe's values are for, in sentences.

    The run is counted as its schedule is: in samples where the values say samples, else in iterations.
    """
    if recipe.horizon is None:
        return []
    found = []
    if recipe.horizon.made_rule.moves:
        found = [
            f"{_flag(dest)}: horizon's {recipe.horizon.rule} is a rule for one batch throughout the run, and says "
            "nothing of one that grows. Drop it, or write rule: none into the recipe's horizon."
            for dest in ("rampup_batch_size", "step_batch_size_schedule", "decrease_batch_size_if_needed")
            if getattr(values, dest, None)
        ]
    length = values.seq_length or getattr(values, "encoder_seq_length", None)
    samples = values.train_samples or (values.train_iters or 0) * values.global_batch_size
    found += recipe.run_problems(batch=values.global_batch_size, tokens=samples * length, seq_length=length)
    return found


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _refuse(values: argparse.Namespace) -> None:
    """Raises InputError for what reaches past the places where a plan is applied."""
    found = [f"{flag.name}: {flag.refusal}. Drop it." for flag in STOPPED if flag.changed(vars(values))]
    if (sharded := fsdp_problem(values)) is not None:
        found.append(sharded)
    if getattr(values, "step_batch_size_schedule", None) is not None and getattr(values, "train_samples", None) is None:
        found.append(
            "--step-batch-size-schedule: with --train-iters Megatron would measure the run, and with it the learning "
            "rate's schedule, in batches of --micro-batch-size × data-parallel size. Give --train-samples."
        )
    if found:
        raise InputError("\n".join(found))


# ---- what a recipe means in Megatron's arguments -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """One of Megatron's arguments as a recipe has it."""

    dest: str
    value: Any
    means: str
    within: float = 0.0
    """How far off a given value may be and still mean the same: flags take whole numbers."""

    def agrees(self, current: Any) -> bool:
        """Returns whether a value that was given means the same."""
        numbers = isinstance(current, int | float) and isinstance(self.value, int | float)
        return numbers and abs(current - self.value) <= self.within


def settings(recipe: Recipe, values: argparse.Namespace) -> Iterator[Setting]:
    """Yields what a recipe says of a run, for the arguments that it has; `values` give its length and how it counts."""
    h = recipe.moved
    taken: dict[str, Any] = {
        "optimizer": recipe.parametrization.optimizer,
        "lr": h.lr,
        "min_lr": h.min_lr,
        "init_method_std": h.init_method_std,
        "weight_decay": h.weight_decay,
        "clip_grad": h.clip_grad,
        **recipe.optimizer_values,
        **MEGATRON_OPTIMIZERS[recipe.parametrization.optimizer].fixed,
    }
    tuned = recipe.hyperparameters.model_dump()
    for dest, value in taken.items():
        says = f"{value:g}" if isinstance(value, float) else str(value)
        if recipe.horizon is not None and tuned.get(dest, value) != value:
            says += f", to which horizon's {recipe.horizon.rule} has moved {tuned[dest]:g} already"
        yield Setting(dest, value, says)
    yield from _schedule(recipe, values)
    decoupled = any(MEGATRON_OPTIMIZERS[name].decoupled_weight_decay for name in recipe.optimizers)
    # Each of these would give some parameters another value than the plan does.
    for dest, value, means in (
        ("weight_decay_incr_style", "constant", "a constant weight decay"),
        ("start_weight_decay", None, "a constant weight decay"),
        ("end_weight_decay", None, "a constant weight decay"),
        ("lr_warmup_init", 0.0, "a warm-up from 0; another start puts wide layers above their peak"),
        ("decoupled_lr", None, "one rule for all parameters; use per_parameter for embedding and readout"),
        ("decoupled_min_lr", None, "one rule for all parameters; use per_parameter for embedding and readout"),
        ("init_method_xavier_uniform", False, "normal with init_method_std"),
        ("embedding_init_method_std", None, "init_method_std; use per_parameter for the embedding"),
        ("apply_wd_to_qk_layernorm", False, "no weight decay on norms"),
        ("decoupled_weight_decay", True, "AdamW's weight decay"),
    ):
        if hasattr(values, dest) and (decoupled or dest != "decoupled_weight_decay"):
            yield Setting(dest, value, means)


def _schedule(recipe: Recipe, values: argparse.Namespace) -> Iterator[Setting]:
    """Yields the recipe's fractions of the run, in iterations, or in samples where the run is counted in samples."""
    s = recipe.schedule
    unit = "samples" if getattr(values, "train_samples", None) else "iters"
    run = getattr(values, f"train_{unit}", None)
    if not run:
        raise InputError("--train-iters: missing, so the length of the recipe's schedule is not known. Give it.")
    yield Setting("lr_decay_style", s.lr_decay_style, s.lr_decay_style)
    decay = _whole(s.lr_decay_fraction * run)
    warmup = _whole(s.lr_warmup_fraction * run)
    says = f"lr_warmup_fraction {s.lr_warmup_fraction:g} of the run"
    # Megatron takes the warm-up as a fraction of the decay, or counted; never both.
    counted = getattr(values, f"lr_warmup_{unit}", 0)
    as_counted = warmup if counted and abs(counted - warmup) <= _ROUNDED else 0
    fraction = s.lr_warmup_fraction / s.lr_decay_fraction if warmup and not as_counted else None
    yield Setting("lr_warmup_fraction", fraction, says, within=_ROUNDED / decay)
    for u in ("iters", "samples"):
        yield Setting(f"lr_warmup_{u}", as_counted if u == unit else 0, says, within=_ROUNDED if as_counted else 0.0)
    # Megatron's own default is the whole run.
    default = getattr(values, f"lr_decay_{unit}", None) is None and decay == run
    says = f"lr_decay_fraction {s.lr_decay_fraction:g} of the run"
    yield Setting(f"lr_decay_{unit}", None if default else decay, says, within=_ROUNDED)
    if s.lr_decay_style == "WSD":
        final = _whole(s.lr_wsd_decay_fraction * run)
        says = f"lr_wsd_decay_fraction {s.lr_wsd_decay_fraction:g} of the run"
        yield Setting(f"lr_wsd_decay_{unit}", final, says, within=_ROUNDED)
        yield Setting("lr_wsd_decay_style", s.lr_wsd_decay_style, s.lr_wsd_decay_style)


_ROUNDED = 0.5
"""Iterations or samples: a count that was rounded means the fraction."""


def _whole(count: float) -> float:
    """Returns a number that is whole but for rounding as such; others as they are, for one shape at any length."""
    return round(count) if math.isclose(count, round(count), rel_tol=1e-12) else count
