"""`train`: a target on Megatron-Core with a recipe, in one process or under torchrun."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mup_megatron.cli.options import FILE, load_planned, recipe_option, target_argument
from mup_megatron.messages import is_first
from mup_megatron.training.options import TrainingOptions

DIVERGED = 1
RUNS = Path("results/train")

_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainingOptions)}


def _option(name: str, help_text: str, kind: Any = int, **more: Any) -> Callable[[_CommandT], _CommandT]:
    """Returns a flag in Megatron's spelling for a field of TrainingOptions."""
    default = _DEFAULTS[name]
    flag = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        return click.option(flag, name, is_flag=True, help=help_text)
    if default is dataclasses.MISSING:
        return click.option(flag, name, type=kind, required=True, help=help_text, **more)
    return click.option(
        flag, name, type=kind, default=default, show_default=default is not None, help=help_text, **more
    )


@click.command()
@target_argument
@recipe_option
@click.option("--data", type=FILE, required=True, metavar="PREFIX", help="What `mup-megatron data` made.")
@click.option(
    "--output",
    type=FILE,
    metavar="DIR",
    help="Metrics and result. [default: results/train/, in a folder named after target, recipe and seed]",
)
@_option("train_iters", "Iterations of the whole run.")
@_option("global_batch_size", "Sequences per iteration.")
@_option("micro_batch_size", "Sequences at a time on one rank. [default: its share of the global batch]")
@_option("seed", "Of weights, dropout and the order of the data.")
@_option("save", "Folder for checkpoints.", FILE, metavar="DIR")
@_option("save_interval", "Save every so many iterations, not at the end alone.")
@_option("load", "Folder of checkpoints to go on from. The same as --save: go on, or begin.", FILE, metavar="DIR")
@_option("tensor_model_parallel_size", "Ranks that share each layer.")
@_option("pipeline_model_parallel_size", "Ranks that share the depth.")
@_option("num_layers_per_virtual_pipeline_stage", "Interleave the pipeline in stages of so many layers.")
@_option("expert_model_parallel_size", "Ranks that hold different experts.")
@_option("expert_tensor_parallel_size", "Ranks that share an expert. [default: those that share a layer]")
@_option("sequence_parallel", "Split what tensor parallelism leaves whole along the sequence.")
@_option("use_distributed_optimizer", "Split the optimizer's state over the data-parallel ranks.")
@_option("bf16", "Compute in bfloat16, with weights kept in fp32 by the optimizer.")
@_option(
    "use_cpu_initialization", "Initial weights that don't depend on the tensor parallelism. Always so without GPU."
)
@_option("eval_iters", "Batches of a validation; 0 for none.")
@_option("eval_interval", "Validate every so many iterations, not at the end alone.")
@_option("log_interval", "Log every so many iterations.")
@_option("split", "Shares of the data for training, validation and test.", str)
@_option("data_cache_path", "For Megatron's sample indices.", FILE, metavar="DIR")
@_option("wandb_project", "Log to Weights & Biases. WANDB_MODE=offline needs no account.", str)
@_option("wandb_exp_name", "The run's name there.", str)
@click.pass_context
def command(context: click.Context, /, target: Path, recipe_path: Path, data: Path, **given: Any) -> None:
    """Train TARGET with a recipe on Megatron-Core.

    One process, or as many as torchrun starts: torchrun --nproc-per-node 2 -m mup_megatron train TARGET.yaml …
    Data parallelism follows from their number. Without a GPU it runs on the CPU.

    With --save DIR --load DIR the same command, given again, goes on where the run was stopped, however that was.
    Exit code 1: the run diverged.
    """
    from mup_megatron.training.train import run_training

    model, recipe, _ = load_planned(target, recipe_path)
    if given["output"] is None:
        given["output"] = RUNS / f"{target.stem}-{recipe.fingerprint[:12]}-seed{given['seed']}"
    options = TrainingOptions(**given)
    result = run_training(model, recipe, data, options, show=True)
    if not is_first():
        context.exit(DIVERGED if result.status == "diverged" else 0)
    if result.status == "diverged":
        click.echo(f"mup-megatron: diverged after {result.iterations} iterations: {result.reason}", err=True)
        context.exit(DIVERGED)
    validation = "" if result.validation_loss is None else f", validation loss {result.validation_loss:.4f}"
    click.echo(f"{options.output}: {result.iterations} iterations, training loss {result.train_loss:.4f}{validation}")
