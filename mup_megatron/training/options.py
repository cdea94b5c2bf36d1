"""The options of a training run beside model, recipe and data, in Megatron-LM's names, and if they are possible.

Nothing here needs torch. Hyperparameters are not options: they are the recipe's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mup_megatron.architectures.layout import Layout
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.errors import InputError
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS, absence, distributed_problem
from mup_megatron.recipe import Recipe
from mup_megatron.training.data import CACHE
from mup_megatron.training.data.dataset import DEFAULT_SPLIT
from mup_megatron.validation import brief


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """One run. Fields are Megatron-LM's arguments of the same name unless they say otherwise."""

    train_iters: int
    global_batch_size: int
    micro_batch_size: int | None = None
    """Default: a data-parallel rank's whole share of the global batch."""
    seed: int = 1234
    """Of the weights, of dropout, and of the order of the data."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    sequence_parallel: bool = False
    expert_model_parallel_size: int = 1
    """Ranks that hold different experts; they share the rest of the model, or its data."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share an expert, by default those that share tensors."""
    use_distributed_optimizer: bool = False
    bf16: bool = False
    use_cpu_initialization: bool = False
    """Draw weights on the CPU, whole, so that they do not depend on tensor and expert parallelism. Always so without a
    GPU."""
    eval_iters: int = 10
    """Batches of a validation loss; 0 for none. It is measured at the end of the run in any case."""
    eval_interval: int | None = None
    """Measure it every so many iterations too."""
    log_interval: int = 10
    save: Path | None = None
    """Folder of checkpoints. One is written at the end of the run in any case."""
    save_interval: int | None = None
    load: Path | None = None
    """Folder of checkpoints to go on from. If it is `save` too and holds none yet, the run begins."""
    output: Path | None = None
    """Folder for metrics and results (not Megatron's). None: nothing is written."""
    split: str = DEFAULT_SPLIT
    data_cache_path: Path = CACHE
    """Where Megatron's sample indices are kept."""
    wandb_project: str | None = None
    """Log to Weights & Biases. `WANDB_MODE=offline` needs no account."""
    wandb_exp_name: str | None = None
    wandb_group: str | None = None
    """Of which the run is one there."""

    @property
    def saves_where_it_loads(self) -> bool:
        """True if `save` and `load` are one folder, however the two are spelled."""
        return self.save is not None and self.load is not None and self.save.resolve() == self.load.resolve()

    def layout(self, world_size: int) -> Layout:
        """Returns how a run on so many ranks divides its model."""
        return Layout(
            world_size=world_size,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            expert_model_parallel_size=self.expert_model_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size or self.tensor_model_parallel_size,
            sequence_parallel=self.sequence_parallel,
        )

    def virtual_stages(self, model: ModelFile) -> int | None:
        """Returns the number of stages that each pipeline rank holds; None without a virtual pipeline."""
        stages = architecture_of(model).stages(model)
        if stages is not None and len(stages) > self.pipeline_model_parallel_size > 1:
            return len(stages) // self.pipeline_model_parallel_size
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        return model.num_layers // (self.pipeline_model_parallel_size * self.num_layers_per_virtual_pipeline_stage)


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """The sizes in which a global batch is dealt out."""

    global_batch: int
    micro_batch: int
    data_parallel: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank in an iteration."""
        return self.global_batch // (self.micro_batch * self.data_parallel)


def batch_sizes(options: TrainingOptions, world_size: int) -> BatchSizes:
    """Returns the batch of a run on so many ranks. Call `require_possible` first."""
    data_parallel = world_size // (options.tensor_model_parallel_size * options.pipeline_model_parallel_size)
    micro_batch = options.micro_batch_size or options.global_batch_size // data_parallel
    return BatchSizes(global_batch=options.global_batch_size, micro_batch=micro_batch, data_parallel=data_parallel)


def require_possible(model: ModelFile, recipe: Recipe, options: TrainingOptions, world_size: int) -> None:
    """Raises InputError unless this model can be trained with these options on so many ranks.

    The same on every rank, since it reads nothing but its arguments.
    """
    problems = [*_bad_numbers(options), *_bad_folders(options)]
    if not problems:
        model.require_tensor_parallel(options.tensor_model_parallel_size)
        problems = [
            *_bad_layout(model, recipe, options),
            *_bad_layers(model, options, world_size),
            *_bad_batch(model, options, world_size),
            *recipe.run_problems(
                batch=options.global_batch_size,
                tokens=options.train_iters * options.global_batch_size * model.seq_length,
                seq_length=model.seq_length,
            ),
        ]
    if problems:
        raise InputError("\n".join(problems))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_POSITIVE = (
    "train_iters",
    "global_batch_size",
    "micro_batch_size",
    "seed",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "eval_interval",
    "log_interval",
    "save_interval",
)
_LARGEST = 2**31 - 1
"""What numpy's seeds and torch's sizes take."""
_LONGEST = 100_000_000
"""Iterations of a run or a validation: a hundred times more than the longest runs have."""
_SAMPLES = 2**32 - 2
"""What Megatron numbers in the index of a data set."""


def _bad_numbers(options: TrainingOptions) -> Iterator[str]:
    for name in _POSITIVE:
        value = getattr(options, name)
        if value is not None and value < 1:
            yield f"{_flag(name)} {value}: must be at least 1. Give a positive whole number."
        elif value is not None and value > _LARGEST:
            yield f"{_flag(name)} {brief(value, 40)}: must be at most {_LARGEST}. Give a smaller one."
    for name in ("train_iters", "eval_iters"):
        value = getattr(options, name)
        if value > _LONGEST and not (name in _POSITIVE and value > _LARGEST):
            yield f"{_flag(name)} {brief(value, 40)}: must be at most {_LONGEST}. Give a smaller one."
        elif value * options.global_batch_size > _SAMPLES and options.global_batch_size <= _LARGEST:
            yield (
                f"{_flag(name)} {value} × --global-batch-size {options.global_batch_size}: more than the {_SAMPLES} "
                "samples that Megatron can number. Lower one of them."
            )
    if options.eval_iters < 0:
        yield f"--eval-iters {options.eval_iters}: must not be negative. Give 0 for no validation."
    if options.eval_interval is not None and options.eval_iters == 0:
        yield f"--eval-interval {options.eval_interval}: --eval-iters 0 turns validation off. Drop one of them."


def _bad_folders(options: TrainingOptions) -> Iterator[str]:
    if options.save_interval is not None and options.save is None:
        yield f"--save-interval {options.save_interval}: there is no place to save to. Add --save DIR."
    if options.wandb_exp_name is not None and options.wandb_project is None:
        yield f"--wandb-exp-name {options.wandb_exp_name}: it needs a project. Add --wandb-project NAME."
    if options.wandb_project is not None and options.output is None:
        yield f"--wandb-project {options.wandb_project}: it needs a folder for its files. Add --output DIR."
    for name in ("save", "load", "output"):
        folder = getattr(options, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            yield f"{_flag(name)} {folder}: this is a file. Name a folder."


def _bad_layout(model: ModelFile, recipe: Recipe, options: TrainingOptions) -> Iterator[str]:
    stages = options.pipeline_model_parallel_size
    per_stage = options.num_layers_per_virtual_pipeline_stage
    said = architecture_of(model).stages(model)
    if said is not None and per_stage is not None:
        yield f"--num-layers-per-virtual-pipeline-stage {per_stage}: the model file says its stages itself. Drop it."
    elif said is not None and stages > 1 and len(said) % stages:
        yield (
            f"--pipeline-model-parallel-size {stages} does not divide the {len(said)} stages of the model file. Choose "
            "a divisor of it."
        )
    elif said is None and model.num_layers % stages:
        yield (
            f"--pipeline-model-parallel-size {stages} does not divide num_layers {model.num_layers}. "
            "Choose a divisor of it."
        )
    elif per_stage is not None and stages == 1:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {per_stage} needs a pipeline. Drop it, or raise "
            "--pipeline-model-parallel-size."
        )
    elif per_stage is not None and (model.num_layers // stages) % per_stage:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {per_stage} does not divide the {model.num_layers // stages} "
            "layers of a pipeline stage. Choose a divisor of it."
        )
    if stages > 1 and not architecture_of(model).pipelines:
        yield (
            f"--pipeline-model-parallel-size {stages}: Megatron-Core does not split "
            f"{architecture_of(model).description} over pipeline stages. Drop it."
        )
    if options.sequence_parallel:
        if options.tensor_model_parallel_size == 1:
            yield (
                "--sequence-parallel needs tensor parallelism. Drop it, or raise --tensor-model-parallel-size above 1."
            )
        elif model.seq_length % options.tensor_model_parallel_size:
            yield (
                f"--sequence-parallel: seq_length {model.seq_length} is not divisible by "
                f"--tensor-model-parallel-size {options.tensor_model_parallel_size}. Drop it, or change one of them."
            )
    yield from filter(None, (absence(recipe.parametrization.optimizer), _split_problem(recipe, options)))
    if options.use_distributed_optimizer:
        yield from filter(None, map(distributed_problem, recipe.optimizers))


def _split_problem(recipe: Recipe, options: TrainingOptions) -> str | None:
    known = MEGATRON_OPTIMIZERS[recipe.parametrization.optimizer]
    ranks = max(options.tensor_model_parallel_size, options.expert_tensor_parallel_size or 1)
    return known.split_problem(recipe.optimizer_values, ranks)


def _bad_layers(model: ModelFile, options: TrainingOptions, world_size: int) -> Iterator[str]:
    """Yields what the kinds of layers that the model has say of the ranks."""
    architecture = architecture_of(model)
    for name, default in (("expert_model_parallel_size", 1), ("expert_tensor_parallel_size", None)):
        value = getattr(options, name)
        if value != default and not architecture.expert_parallel(model):
            yield f"{_flag(name)} {value}: the model has no experts. Drop it."
    yield from architecture.problems(model, options.layout(world_size))


def _bad_batch(model: ModelFile, options: TrainingOptions, world_size: int) -> Iterator[str]:
    split = options.tensor_model_parallel_size * options.pipeline_model_parallel_size
    if world_size % split:
        yield (
            f"--tensor-model-parallel-size {options.tensor_model_parallel_size} × --pipeline-model-parallel-size "
            f"{options.pipeline_model_parallel_size} needs a multiple of {split} processes, and there "
            f"{'is one' if world_size == 1 else f'are {world_size}'}. "
            f"Start that many: torchrun --nproc-per-node {split} -m mup_megatron …"
        )
        return
    data_parallel = world_size // split
    micro = options.micro_batch_size
    if options.global_batch_size % ((micro or 1) * data_parallel):
        yield (
            f"--global-batch-size {options.global_batch_size} is not divisible by "
            + (f"--micro-batch-size {micro} × " if micro else "")
            + f"{data_parallel} data-parallel ranks. Choose sizes that divide."
        )
    elif options.virtual_stages(model) is not None:
        count = batch_sizes(options, world_size).micro_batches
        if count % options.pipeline_model_parallel_size:
            per_stage = options.num_layers_per_virtual_pipeline_stage
            by = "several stages on each rank" if per_stage is None else "--num-layers-per-virtual-pipeline-stage"
            yield (
                f"{by}: the {count} micro-batches of a rank are not divisible by "
                f"--pipeline-model-parallel-size {options.pipeline_model_parallel_size}. Choose another "
                "--micro-batch-size."
            )
