"""Reads what DeepSpeed's engine saves of a model without a pipeline: ZeRO 0 to 3, of any number of ranks, universal.

Under ZeRO the single-precision weights are in the optimizer's files, in pieces, which DeepSpeed's own function puts
together. It unpickles whatever a file asks for; here each file is read before, and again by it, without running code.
"""

import contextlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch

from mup_megatron.checkpoint_recipe import SIDECAR
from mup_megatron.deepspeed.checkpoints import CheckpointRecipe, recipe_of_checkpoint
from mup_megatron.errors import InputError
from mup_megatron.export.tags import MODEL_STATES
from mup_megatron.export.weights import Stored, require_fingerprint
from mup_megatron.recipe import Recipe
from mup_megatron.unpickling import not_read, read_torch, torch_loads_only_tensors

_OPTIMIZER = "*_optim_states.pt"
_WHOLE = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_00_model_states\.pt")
UNIVERSAL = "zero"
"""The folder of a universal checkpoint that has one for each parameter."""
REMEDY = "Give another checkpoint."


class Tensors:
    """Tensors by name, in memory or in files that are mapped into it."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """Takes tensors, and what gives one by `contiguous`, as DeepSpeed's pieces do."""
        self._tensors = tensors

    @cached_property
    def stored(self) -> Mapping[str, Stored]:
        """Everything that there is."""
        return {name: Stored(tuple(each.shape), each.dtype) for name, each in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor, put together."""
        found: torch.Tensor = self._tensors[name].contiguous()
        return found.detach()


def require_recipe(folder: Path, recipe: Recipe, recipe_source: str) -> CheckpointRecipe:
    """Returns what a checkpoint says of its run.

    Raises:
        InputError: it has no recipe, or another one.
    """
    found = recipe_of_checkpoint(folder.parent, folder.name, universal=False)
    if found is None:
        raise InputError(
            f"{folder}: has no model states of a whole model (mp_rank_00_model_states.pt). Give a checkpoint of "
            "DeepSpeed's engine."
        )
    if found.recipe is None:
        raise InputError(f"{folder}: trained without a recipe, so that there is nothing to fold. {REMEDY}")
    require_fingerprint(
        recipe,
        found.recipe.fingerprint,
        recipe_source=recipe_source,
        trained=folder,
        remedy=f"Give {SIDECAR} of that folder.",
    )
    return found


def tensors_of_engine(folder: Path) -> Mapping[str, Any]:
    """Returns parameters and buffers by their names in the engine's module.

    Raises:
        InputError: it is damaged, of a pipeline or of parallel models, or may run code; names the file.
    """
    models, optimizers = (sorted(folder.glob(pattern)) for pattern in (MODEL_STATES, _OPTIMIZER))
    apart = next((each for each in models if not _WHOLE.fullmatch(each.name)), None)
    if apart is not None:
        raise InputError(
            f"{apart}: a part of a pipeline, of a model in parallel or of its experts, which cannot be exported. Give "
            "a checkpoint of ZeRO alone."
        )
    with plain_and_scalers():
        states = [read_states(each) for each in models]
        module = states[0].get("module")
        if not isinstance(module, Mapping):
            raise InputError(f"{models[0]}: not a file of DeepSpeed's model states. {REMEDY}")
        if (folder / UNIVERSAL).is_dir():
            return {**module, **dict(of_universal(folder / UNIVERSAL, states[0]))}
        if not optimizers:
            return module
        steps = [steps_of(read_states(each)) for each in optimizers]
        require_one_step(models, [each.get("global_steps") for each in states])
        require_one_step(optimizers, steps)
        return put_together(folder, source=str(folder))


def steps_of(states: Mapping[str, Any]) -> Any:
    """Returns how many steps the optimizer in a rank's file has done; nothing where it does not count them."""
    content = states.get("optimizer_state_dict")
    own = content.get("base_optimizer_state", content.get("optimizer_state_dict")) if _is_table(content) else None
    of_tensors = own.get("state") if _is_table(own) else None
    kept = of_tensors.values() if _is_table(of_tensors) else ()
    return sorted({float(each["step"]) for each in kept if _is_table(each) and "step" in each})


def require_one_step(files: Sequence[Path], steps: Sequence[Any]) -> None:
    """Raises InputError if a rank's file is of another step than the first one's: together they are no model."""
    for file, step in zip(files, steps, strict=True):
        if step != steps[0]:
            raise InputError(
                f"{file}: of another step than {files[0].name}. Put the files of one step into one folder."
            )


def _is_table(content: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(content, Mapping)


def of_universal(folder: Path, states: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of each parameter of a universal checkpoint; what ZeRO 3 was is flat there, and padded."""
    shapes = {name: shape for group in states.get("param_shapes") or () for name, shape in group.items()}
    for file in sorted(folder.glob("*/fp32.pt")):
        name, content = file.parent.name, read_torch(file, source=str(file), remedy=REMEDY)
        if isinstance(content, Mapping):
            content = content.get("param")
        elif isinstance(content, torch.Tensor) and content.dim() == 1 and name in shapes:
            content = content[: math.prod(shapes[name])].reshape(shapes[name])
        if not isinstance(content, torch.Tensor):
            raise InputError(f"{file}: holds no tensor of a universal checkpoint's. {REMEDY}")
        yield name, content


def put_together(folder: Path, *, source: str) -> Mapping[str, Any]:
    """Returns DeepSpeed's single-precision weights, and buffers, of files that were read before.

    Args:
        folder: of the checkpoint.
        source: what it is called in messages.

    Raises:
        InputError: the files do not go together.
    """
    with contextlib.redirect_stdout(sys.stderr), torch_loads_only_tensors():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        try:
            found: Mapping[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name, lazy_mode=True
            )
        except Exception as error:  # it raises whatever it likes for files that do not go together
            raise not_read(error, source=source, remedy=REMEDY) from None
    return found


def read_states(file: Path) -> Mapping[str, Any]:
    """Returns the content of a file of DeepSpeed's, whose tensors are read once they are used.

    Raises:
        InputError: it is damaged, or may run code.
    """
    found = read_torch(file, source=str(file), remedy=REMEDY)
    if not isinstance(found, Mapping):
        raise InputError(f"{file}: not a file of DeepSpeed's. {REMEDY}")
    return found


@contextlib.contextmanager
def plain_and_scalers() -> Iterator[None]:
    """Within it torch reads, beside tensors and plain values, the classes of DeepSpeed's that its files consist of.

    They hold numbers, and run nothing when they are made.
    """
    with contextlib.redirect_stdout(sys.stderr):
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    listed: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(listed):
        yield
