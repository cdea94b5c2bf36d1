"""Reads what DeepSpeed's pipeline saves: a file of each layer, of each stage, and under ZeRO of each optimizer.

layer_03-model_00-model_states.pt                  the weights of a layer, in the type that it was trained in
mp_rank_01_model_states.pt                         a stage: no weights, but the names and shapes of its parameters
[bf16_]zero_pp_rank_0_mp_rank_01_optim_states.pt   its single-precision weights, of one data-parallel rank
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.export.zero_states import (
    REMEDY,
    UNIVERSAL,
    of_universal,
    plain_and_scalers,
    put_together,
    read_states,
    require_one_step,
    steps_of,
)

_STAGE = "mp_rank_{:02d}_model_states.pt"
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_TOGETHER = "Put the files of all ranks into one folder."


def is_at(folder: Path) -> bool:
    """Returns whether a checkpoint is of a pipeline, also of one stage."""
    first = folder / _STAGE.format(0)
    if not first.is_file():
        return False
    with plain_and_scalers():
        return read_states(first).get("module", "") is None


def tensors_of_stages(folder: Path, layers: Sequence[int]) -> Mapping[str, Any]:
    """Returns parameters by their names in the pipeline, of whichever stage; in single precision if there is that.

    Args:
        folder: of the checkpoint.
        layers: the places of the pipeline's layers that have weights of their own.

    Raises:
        InputError: it is damaged, a file is missing, it is of another number of layers or of models in parallel, or may
            run code; names the file.
    """
    with plain_and_scalers():
        stages = _stages(folder)
        if (folder / UNIVERSAL).is_dir():
            return dict(of_universal(folder / UNIVERSAL, stages[0]))
        of_layers = _layers(folder, layers)
        found: dict[str, Any] = {}
        if any(folder.glob("*_optim_states.pt")):
            for number, stage in enumerate(stages):
                found = {**_of_stage(folder, number, stage), **found}
        else:
            for place, file in of_layers.items():
                found |= {f"{place}.{name}": tensor for name, tensor in read_states(file).items()}
        return found


def _stages(folder: Path) -> Sequence[Mapping[str, Any]]:
    """Returns the model states of every stage."""
    first = folder / _STAGE.format(0)
    match read_states(first).get("checkpoint_parallel_dimensions"):
        case {"pp_degree": int(count), "tp_degree": 1} if count > 0:
            files = [folder / _STAGE.format(number) for number in range(count)]
        case {"tp_degree": int(count)} if count > 1:
            raise InputError(
                f"{folder}: of a pipeline whose stages are models in parallel, which cannot be exported. Give a "
                "checkpoint of a pipeline without tensor parallelism."
            )
        case _:
            raise InputError(f"{first}: does not say of how many stages it is. {REMEDY}")
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise InputError(f"{missing}: missing. {_TOGETHER}")
    states = [read_states(file) for file in files]
    require_one_step(files, [each.get("global_steps") for each in states])
    return states


def _layers(folder: Path, layers: Sequence[int]) -> Mapping[int, Path]:
    """Returns the file of each layer, by its place."""
    found = {int(match[1]): file for file in folder.iterdir() if (match := _LAYER.fullmatch(file.name))}
    more = next((found[place] for place in sorted(found) if place not in layers), None)
    if more is not None:
        raise InputError(
            f"{more}: the pipeline of the model file has {len(layers)} layers with weights, from 0. Give the model "
            "file of the run."
        )
    missing = next((place for place in layers if place not in found), None)
    if missing is not None:
        raise InputError(
            f"{folder}: layer_{missing:02d}-model_00-model_states.pt is missing, or the model file is of a model with "
            f"more layers. {_TOGETHER}"
        )
    return found


def _of_stage(folder: Path, number: int, stage: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a stage's single-precision weights, put together as those of an engine's whole model are."""
    files = sorted(folder.glob(f"*zero_pp_rank_*_mp_rank_{number:02d}_optim_states.pt"))
    if not files:
        raise InputError(f"{folder}: the files *_mp_rank_{number:02d}_optim_states.pt are missing. {_TOGETHER}")
    require_one_step(files, [steps_of(read_states(file)) for file in files])
    with tempfile.TemporaryDirectory() as parent:
        alone = Path(parent) / folder.name
        alone.mkdir()
        torch.save({**stage, "module": {}, "buffer_names": []}, alone / _STAGE.format(0))
        for file in files:
            (alone / file.name.replace(f"_mp_rank_{number:02d}", "_mp_rank_00")).symlink_to(file.resolve())
        return put_together(alone, source=str(folder))
