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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from pydantic import Field, RootModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from mup_megatron.collectives import gathered, raise_together, raising_together
from mup_megatron.errors import InputError
from mup_megatron.files import read_text, require_ordinary, sync, write_atomically
from mup_megatron.megatron import stored, versions
from mup_megatron.megatron.optimizer import is_sharded, parts_of
from mup_megatron.readback import read_json
from mup_megatron.training.build import Built
from mup_megatron.training.ranks import is_first, on_first_rank
from mup_megatron.validation import Strict, brief, validated

TRACKER = "latest_checkpointed_iteration.txt"
EXTRAS = "mup"
MANIFEST = f"{EXTRAS}/files.json"
FOLDED = "folded.json"
"""Among the extras of a checkpoint whose multipliers are in its weights: what was done to them."""
_STAGING = ".tmp-"
_FORMAT = "metadata.json"
_COMMON = "common.pt"
"""Where releases of Megatron-Core before 0.18 keep what is no tensor; every release reads it where it lies."""

_DISTRIBUTED = {"distrib_optim_sharding_type": "dp_reshardable"}
"""How Megatron cuts the distributed optimizer's state: along the data-parallel ranks, whose number may change."""
_WHOLE = {"chained_optim_avoid_prefix": True}
"""Another optimizer's state is found by the names of parameters, whichever of Megatron's single optimizers has them."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole."""

    folder: Path
    iteration: int
    extras: Mapping[str, str]
    """The text of every file that `save` was given, by name."""
    metadata: Metadata
    """Where its tensors and objects lie."""

    @property
    def remedy(self) -> str:
        """The advice about a checkpoint that cannot be used after all, as a sentence."""
        return _remedy(self.folder)


class _Digest(Strict):
    """A file of a checkpoint as the manifest has it."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(RootModel[dict[str, _Digest]]):
    """The content of `mup/files.json`. It tells of damage; it does not tell who wrote the checkpoint."""


class _Format(Strict):
    """The content of Megatron's `metadata.json`, which chooses the code that reads the rest."""

    sharded_backend: str = Field(pattern="^torch_dist$")
    sharded_backend_version: int = Field(ge=1, le=1)
    common_backend: str = Field(default="torch", pattern="^torch$")
    common_backend_version: int = Field(default=1, ge=1, le=1)


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


def remove_others(root: Path, iteration: int) -> None:
    """Removes the checkpoints of other iterations, which nobody goes on from any more."""
    for folder in root.glob("iter_*"):
        if folder.name != name_of(iteration):
            shutil.rmtree(folder, ignore_errors=True)


def _staging_folder(root: Path, iteration: int) -> Path:
    staged = root / f"{_STAGING}{name_of(iteration)}"
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
    digests = {}
    with raising_together():
        try:
            for name in _my_share(sorted(_files(staged))):
                with (staged / name).open("rb") as stream:
                    os.fsync(stream.fileno())
                digests[name] = _digest(staged / name)
        except OSError as error:
            raise _not_written(root, iteration, error) from None
    return {name: digest for of_rank in gathered(digests) for name, digest in of_rank.items()}


def _publish(root: Path, staged: Path, iteration: int, digests: Mapping[str, Any]) -> None:
    folder = root / name_of(iteration)
    try:
        (staged / MANIFEST).write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for path in (staged / MANIFEST, staged / EXTRAS, staged):
            sync(path)
        if folder.exists():
            assert latest(root) != iteration  # the one that counts is never written again
            # Of a run that was killed before the tracker named it, or that went on from an earlier one.
            shutil.rmtree(folder)
        staged.rename(folder)
        sync(root)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise _not_written(root, iteration, error) from None
    write_atomically(root / TRACKER, str(iteration))
    sync(root)


def _not_written(root: Path, iteration: int, error: BaseException) -> InputError:
    return InputError(
        f"{root}: the checkpoint of iteration {iteration} cannot be written ({_reason(error)}); those before it are "
        "unchanged. Free some space or choose another place, then go on with --load."
    )


def _reason(error: BaseException) -> str:
    """Returns what the system said. Megatron's writer logs that, and passes on no more than that it failed."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "writing failed, as it does when the disk is full"


# ---- loading -------------------------------------------------------------------------------------------------------


def latest(root: Path) -> int | None:
    """Returns the iteration of the checkpoint that counts; None if there is none yet.

    Raises:
        InputError: what says so is damaged.
    """
    try:
        require_ordinary(root / TRACKER)
        text = (root / TRACKER).read_text(encoding="utf-8")
        iteration = int(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{root / TRACKER}: does not name an iteration ({brief(error)}). Write the number of a checkpoint into it."
        ) from None
    return iteration


def seal(root: Path, iteration: int) -> None:
    """Makes a checkpoint of the files that another than `save` has put into an iteration's folder.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    folder = root / name_of(iteration)
    digests = {name: _digest(folder / name) for name in sorted(_files(folder))}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in (*(folder / name for name in (*digests, MANIFEST)), folder / EXTRAS, folder):
        sync(path)
    write_atomically(root / TRACKER, str(iteration))


def find(root: Path, iteration: int, *, extras: Collection[str]) -> Found:
    """Returns the checkpoint of an iteration, once every file of it is what was written. Collective.

    Args:
        root: folder of the run's checkpoints.
        iteration: which one.
        extras: names of the text files that `save` was given; with FOLDED, of one that is folded.

    Raises:
        InputError: on every rank: a part is missing, truncated or corrupt, or holds what may run code; names the file.
            Or multipliers are in its weights, and FOLDED is not among the extras.
    """
    folder = root / name_of(iteration)
    manifest: dict[str, _Digest] = on_first_rank(lambda: _manifest(folder, extras))
    problems = []
    for name in _my_share(sorted(manifest)):
        path = folder / name
        try:
            digest = manifest[name]
            damaged = path.stat().st_size != digest.size or _digest(path) != digest.model_dump()
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror}). {_remedy(folder)}")
        else:
            if damaged:
                problems.append(f"{path}: truncated or corrupt: it is not what was written. {_remedy(folder)}")
    raise_together(problems)
    texts, metadata = on_first_rank(lambda: _parts(folder, manifest, extras))
    return Found(folder, iteration, texts, metadata)


def _parts(folder: Path, files: Collection[str], extras: Collection[str]) -> tuple[dict[str, str], Metadata]:
    """Returns what can be looked at before a model is built."""
    remedy = _remedy(folder)
    validated(_Format, read_json(folder / _FORMAT, remedy=remedy), source=str(folder / _FORMAT))
    texts = {name: read_text(folder / EXTRAS / name, remedy=remedy) for name in extras}
    metadata = stored.read_metadata(folder, files=files, remedy=remedy)
    stored.require_plain_objects(folder, metadata, remedy=remedy)
    return texts, metadata


def restore(found: Found, built: Built) -> None:
    """Puts a checkpoint into what was built for it: bitwise what was saved. Collective.

    Raises:
        InputError: on every rank: it holds something else than what was saved.
    """
    for_this = partial(stored.loading, found.folder, found.metadata, remedy=found.remedy)
    with raising_together(), for_this():
        state = dist_checkpointing.load(_state(built, is_loading=True), str(found.folder))
    with raising_together(), for_this():
        _take_over(found, built, state)


def _take_over(found: Found, built: Built, state: Mapping[str, Any]) -> None:
    if state["iteration"] != found.iteration:
        raise InputError(
            f"{found.folder}: its weights are those of iteration {brief(state['iteration'], 40)}. {found.remedy}"
        )
    for index, chunk in enumerate(built.chunks):
        chunk.module.load_state_dict(state[f"model{index}"])
    # The distributed optimizer copies into views of the parameters.
    with torch.no_grad():
        built.optimizer.load_state_dict(state["optimizer"])
    built.scheduler.load_state_dict(state["opt_param_scheduler"])
    _set_random_state(state["rng_state"])


def _manifest(folder: Path, extras: Collection[str]) -> dict[str, _Digest]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint, but {TRACKER} beside it names it. {_remedy(folder)}")
    if not path.exists():
        raise InputError(f"{path}: missing: this is not a checkpoint of `mup-megatron train`. {_remedy(folder)}")
    content = read_json(path, remedy=_remedy(folder))
    if not isinstance(content, dict) or not all(isinstance(v, dict) and "size" in v for v in content.values()):
        raise InputError(f"{path}: does not describe a checkpoint. {_remedy(folder)}")
    manifest = validated(_Manifest, content, source=str(path)).root
    for name in manifest:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise InputError(f"{path}: speaks of {brief(name)!r}, outside of the checkpoint. {_remedy(folder)}")
    for name in (_FORMAT, stored.METADATA, *(f"{EXTRAS}/{name}" for name in extras)):
        if name not in manifest:
            raise InputError(f"{path}: has no {name}, without which it is no checkpoint. {_remedy(folder)}")
    if f"{EXTRAS}/{FOLDED}" in manifest and FOLDED not in extras:
        raise InputError(
            f"{folder}: its multipliers are folded into its weights, where they would act a second time. Give back the "
            f"weights that were trained with `mup-megatron unfold {folder} --recipe {EXTRAS}/recipe.yaml --to DIR`."
        )
    if _COMMON not in manifest and (folder / _COMMON).exists():
        raise InputError(f"{folder / _COMMON}: not part of the checkpoint, and Megatron would read it. Remove it.")
    return manifest


def _remedy(folder: Path) -> str:
    return f"Restore it, or write the number of another checkpoint into {folder.parent / TRACKER}."


# ---- what is saved -------------------------------------------------------------------------------------------------


def _state(built: Built, *, is_loading: bool) -> dict[str, Any]:
    metadata = _DISTRIBUTED if any(map(is_sharded, parts_of(built.optimizer))) else _WHOLE
    models = {f"model{i}": chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(built.chunks)}
    return {
        **models,
        "optimizer": built.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata),
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


def name_of(iteration: int) -> str:
    """Returns the name of an iteration's folder."""
    return f"iter_{iteration:07d}"


def _files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _my_share(names: list[str]) -> list[str]:
    return names[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"size": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
