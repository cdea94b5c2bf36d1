"""Checkpoints in Megatron's torch_dist format, laid out as Megatron-LM does. A kill at any moment leaves the last one.

    DIR/latest_checkpointed_iteration.txt    which one counts; replaced in one step, after the folder it names is whole
    DIR/iter_0000100/                        written under another name, brought to the disk, then renamed
        *.distcp, .metadata, metadata.json   Megatron's: model, optimizer, schedule, random numbers
        mup/                                 recipe, plan, the run's identity, what it has measured so far
        mup/files.json                       size and sha256 of every file above

Importing it imports Megatron: the CPU runtime has to come before.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from mup_megatron.collectives import raise_together
from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.megatron import versions
from mup_megatron.training.build import Built
from mup_megatron.training.ranks import is_first, on_first_rank

TRACKER = "latest_checkpointed_iteration.txt"
EXTRAS = "mup"
MANIFEST = f"{EXTRAS}/files.json"
_STAGING = ".tmp-"

_SHARDING = {"distrib_optim_sharding_type": "dp_reshardable"}
"""How Megatron cuts the distributed optimizer's state: along the data-parallel ranks, whose number may change."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole."""

    folder: Path
    iteration: int
    extras: Mapping[str, str]
    """The text of every file that `save` was given, by name."""


# ---- saving --------------------------------------------------------------------------------------------------------


def save(root: Path, iteration: int, built: Built, extras: Mapping[str, str]) -> None:
    """Writes the checkpoint of an iteration. Collective.

    Args:
        root: folder of the run's checkpoints.
        iteration: how many are done.
        built: what is saved.
        extras: text files that go with it, by name; the first rank's count.

    Raises:
        InputError: on every rank: the disk is full or cannot be written. What was there before is unchanged.
    """
    staged = on_first_rank(lambda: _staging_folder(root, iteration))
    try:
        with versions.checkpoint_results_in_this_process():
            dist_checkpointing.save({**_state(built, is_loading=False), "iteration": iteration}, str(staged))
    except (OSError, RuntimeError, CheckpointException) as error:
        # Megatron tells all ranks of a failed write; one that breaks off elsewhere takes the connection with it.
        if is_first():
            shutil.rmtree(staged, ignore_errors=True)
        raise _not_written(root, iteration, error) from error
    on_first_rank(lambda: _write_extras(root, staged, iteration, extras))
    checked = _gathered_digests(root, staged, iteration)
    on_first_rank(lambda: _publish(root, staged, iteration, checked))


def _staging_folder(root: Path, iteration: int) -> Path:
    staged = root / f"{_STAGING}{_name(iteration)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left_behind in root.glob(f"{_STAGING}*"):
            shutil.rmtree(left_behind)
        staged.mkdir()
    except OSError as error:
        raise _not_written(root, iteration, error) from None
    return staged


def _write_extras(root: Path, staged: Path, iteration: int, extras: Mapping[str, str]) -> None:
    try:
        (staged / EXTRAS).mkdir()
        for name, text in extras.items():
            (staged / EXTRAS / name).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise _not_written(root, iteration, error) from None


def _gathered_digests(root: Path, staged: Path, iteration: int) -> dict[str, dict[str, Any]]:
    """Size and hash of every file, which is on the disk by then. The ranks share the work."""
    digests, problems = {}, []
    try:
        for name in _my_share(sorted(_files(staged))):
            with (staged / name).open("rb") as stream:
                os.fsync(stream.fileno())
            digests[name] = _digest(staged / name)
    except OSError as error:
        problems.append(str(_not_written(root, iteration, error)))
    raise_together(problems)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, digests)
    return {name: digest for of_rank in gathered for name, digest in of_rank.items()}


def _publish(root: Path, staged: Path, iteration: int, digests: Mapping[str, Any]) -> None:
    folder = root / _name(iteration)
    try:
        (staged / MANIFEST).write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for path in (staged / MANIFEST, staged / EXTRAS, staged):
            _sync(path)
        if folder.exists():
            assert latest(root) != iteration  # the one that counts is never written again
            # Of a run that was killed before the tracker named it, or that went on from an earlier one.
            shutil.rmtree(folder)
        staged.rename(folder)
        _sync(root)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise _not_written(root, iteration, error) from None
    write_atomically(root / TRACKER, str(iteration))
    _sync(root)


def _not_written(root: Path, iteration: int, error: BaseException) -> InputError:
    return InputError(
        f"{root}: the checkpoint of iteration {iteration} cannot be written ({_reason(error)}); those before it are "
        "unchanged. Free some space or choose another place, then go on with --load."
    )


def _reason(error: BaseException) -> str:
    """What the system said. Megatron's writer logs that, and passes on no more than that it failed."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "writing failed, as it does when the disk is full"


# ---- loading -------------------------------------------------------------------------------------------------------


def latest(root: Path) -> int | None:
    """The iteration of the checkpoint that counts; None if there is none yet.

    Raises:
        InputError: what says so is damaged.
    """
    try:
        text = (root / TRACKER).read_text(encoding="utf-8")
        iteration = int(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{root / TRACKER}: does not name an iteration ({error}). Write the number of a checkpoint into it."
        ) from None
    return iteration


def find(root: Path, iteration: int) -> Found:
    """The checkpoint of an iteration, once every file of it is what was written. Collective.

    Raises:
        InputError: on every rank: it is missing, truncated or corrupt; names the file.
    """
    folder = root / _name(iteration)
    manifest: dict[str, Any] = on_first_rank(lambda: _manifest(folder))
    problems = []
    for name in _my_share(sorted(manifest)):
        path = folder / name
        try:
            damaged = path.stat().st_size != manifest[name]["size"] or _digest(path) != manifest[name]
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror}). {_remedy(folder)}")
        else:
            if damaged:
                problems.append(f"{path}: truncated or corrupt: it is not what was written. {_remedy(folder)}")
    raise_together(problems)
    extras: dict[str, str] = on_first_rank(
        lambda: {path.name: path.read_text(encoding="utf-8") for path in (folder / EXTRAS).iterdir()}
    )
    return Found(folder, iteration, extras)


def restore(found: Found, built: Built) -> None:
    """Puts a checkpoint into what was built for it: bitwise what was saved. Collective."""
    state = dist_checkpointing.load(_state(built, is_loading=True), str(found.folder))
    for index, chunk in enumerate(built.chunks):
        chunk.module.load_state_dict(state[f"model{index}"])
    # The distributed optimizer copies into views of the parameters.
    with torch.no_grad():
        built.optimizer.load_state_dict(state["optimizer"])
    built.scheduler.load_state_dict(state["opt_param_scheduler"])
    _set_random_state(state["rng_state"])


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint, but {TRACKER} beside it names it. {_remedy(folder)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: missing: this is not a checkpoint of `mup-megatron train`. {_remedy(folder)}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: truncated or not JSON ({error}). {_remedy(folder)}") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict) and "size" in v for v in content.values()):
        raise InputError(f"{path}: does not describe a checkpoint. {_remedy(folder)}")
    return content


def _remedy(folder: Path) -> str:
    return f"Restore it, or write the number of another checkpoint into {folder.parent / TRACKER}."


# ---- what is saved -------------------------------------------------------------------------------------------------


def _state(built: Built, *, is_loading: bool) -> dict[str, Any]:
    models = {f"model{i}": chunk.module.sharded_state_dict(metadata=_SHARDING) for i, chunk in enumerate(built.chunks)}
    return {
        **models,
        "optimizer": built.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=_SHARDING),
        "opt_param_scheduler": built.scheduler.state_dict(),
        "rng_state": _random_state(),
    }


def _random_state() -> ShardedObject:
    """Every generator that a run may draw from, in plain types. Data-parallel ranks share one state, as in Megatron."""
    numpy_state: Any = np.random.get_state(legacy=False)
    state = {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    ranks = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    return ShardedObject("rng_state", state, sizes, ranks, replica_id=parallel_state.get_data_parallel_rank())


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


# ---- files ---------------------------------------------------------------------------------------------------------


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _my_share(names: list[str]) -> list[str]:
    return names[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"size": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
