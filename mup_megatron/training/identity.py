"""The identity of a run: recipe, model, data and the options that change its numbers. Not where it runs.

A checkpoint and an output folder hold the identity of their run, so that no other run goes on from them by mistake.
"""

import json
from pathlib import Path
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.errors import InputError
from mup_megatron.readback import parse_json
from mup_megatron.recipe import Recipe
from mup_megatron.training.data.prefix import at
from mup_megatron.training.data.reading import check_prefix
from mup_megatron.training.options import TrainingOptions
from mup_megatron.validation import brief, plain

Identity = dict[str, Any]

VERSION = 1

_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "use_distributed_optimizer",
)
"""A checkpoint is for one layout. Data parallelism and micro-batches may change, and with them only rounding does; so
may the number of ranks that hold different experts, unless the optimizer's state is cut along the ranks."""
_LAYOUT_OF_EXPERTS = ("expert_model_parallel_size", "expert_tensor_parallel_size")


def identity_of(model: ModelFile, recipe: Recipe, data: Path, options: TrainingOptions) -> Identity:
    """Returns a run's identity as plain JSON values.

    Raises:
        InputError: there are no sound data at the prefix.
    """
    meta = check_prefix(data)
    own = (
        _LAYOUT_OF_EXPERTS
        if architecture_of(model).expert_parallel(model) and options.use_distributed_optimizer
        else ()
    )
    return {
        "version": VERSION,
        "fingerprint": recipe.fingerprint,
        "model": plain(model),
        "data": {
            "bin_bytes": at(data, ".bin").stat().st_size,
            "bin_sha256": meta.bin_sha256,
            "vocab_size": meta.vocab_size,
            "split": options.split,
        },
        "training": {
            "train_iters": options.train_iters,
            "global_batch_size": options.global_batch_size,
            "seed": options.seed,
            "bf16": options.bf16,
        },
        "layout": {key: getattr(options, key) for key in (*_LAYOUT, *own)},
    }


def require_same(found: Identity, wanted: Identity, *, source: str, remedy: str) -> None:
    """Raises InputError unless what lies at `source` is of the wanted run; names what differs."""
    for section in ("version", "fingerprint", "model", "data", "training", "layout"):
        here, there = found.get(section), wanted[section]
        if here == there:
            continue
        if section == "fingerprint":
            raise InputError(
                f"{source}: of another recipe: its fingerprint is {brief(here)}, this recipe's is {there}. {remedy}"
            )
        if isinstance(here, dict) and isinstance(there, dict):
            missing = object()
            key = next(key for key in {**there, **here} if here.get(key, missing) != there.get(key, missing))
            section, here, there = f"{section}.{key}", here.get(key), there.get(key)
        raise InputError(
            f"{source}: of another run: {brief(section, 40)} is {brief(here, 60)} there and "
            f"{brief(there, 60)} here. {remedy}"
        )


def to_text(identity: Identity) -> str:
    """Returns an identity as it is stored."""
    return json.dumps(identity, indent=1) + "\n"


def from_text(text: str, *, source: str, remedy: str) -> Identity:
    """Reads what `to_text` made.

    Args:
        text: the file's content.
        source: what the file is called in messages.
        remedy: what to do about it, as a sentence.

    Raises:
        InputError: it is truncated, or something else.
    """
    content = parse_json(text, source=source, remedy=remedy)
    if not isinstance(content, dict):
        raise InputError(f"{source}: does not describe a run. {remedy}")
    return content
